"""Conversations to token ids with a loss mask, for any chat template.

How the loss mask is computed: the template is rendered once with a marker word in place of every turn's content. The text
between the markers is the template's own; the real rendering is that text with the contents put back (trimmed if the
template trims). So each character of the rendering is known to be template or content. The labelled part is an assistant's
content plus the end-of-turn that follows it. Nothing is derived from pad ids (pad may equal eos) or from a list of known
templates.

Why a turn cannot be forged: text such as `<|im_end|>` inside content is encoded as plain text, cut so that it yields no
control id. Everything else is encoded as the model will see it when it is served.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from tunesmith.chat.formats import Message
from tunesmith.chat.tools import texts as texts_in
from tunesmith.chat.tools import tools_of, uses_tools
from tunesmith.errors import ModelError, Problem
from tunesmith.io.signals import TEMPLATE_SECONDS, TooLongError, cpu_limit

_TRIMS = (str, str.strip, str.lstrip, str.rstrip)  # how templates may change contents


@dataclass(frozen=True)
class Piece:
    """A part of a rendering; `turn` is the index of the message whose content it is, None for template text."""

    text: str
    turn: int | None


@dataclass(frozen=True)
class Span:
    """A part of the text to encode: `labelled` carries loss, `content` must not yield control ids."""

    text: str
    labelled: bool
    content: bool


@dataclass(frozen=True)
class Encoded:
    """One row: `input_ids` and a `loss_mask` of the same length, True where an id carries loss.

    `notes` names deviations from the normal encoding: `last-answer-only`, `end-of-turn-added`, `system-dropped`.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    notes: tuple[str, ...] = ()

    def spans(self, tokenizer: Any) -> Iterator[tuple[str, bool]]:
        """The row as text, split where labelled spans begin and end: (text, labelled)."""
        for labelled, group in groupby(zip(self.input_ids, self.loss_mask, strict=True), key=lambda pair: pair[1]):
            yield tokenizer.decode([token for token, _ in group], skip_special_tokens=False), labelled


def sides_of(row: Mapping[str, Any]) -> list[Encoded]:
    """The sides of a prepared row: the chosen and the rejected one of a pair, else one."""
    sides = [Encoded(row["input_ids"], row["loss_mask"])]
    if "rejected_input_ids" in row:
        sides.append(Encoded(row["rejected_input_ids"], row["rejected_loss_mask"]))
    return sides


class _RefusedError(Exception):
    """The template raised an exception; the text is the first line of its message."""


def _shared_start(texts: Sequence[str]) -> str:
    """The longest common prefix of the texts."""
    return os.path.commonprefix(texts)  # noqa: RUF071 - texts, compared character by character


class ChatTemplate:
    """A chat template with its tokenizer. Raises ModelError if there is no template, or if it is not valid Jinja."""

    def __init__(self, tokenizer: Any, source: str | None = None, name: str = "the tokenizer") -> None:
        template = source if source is not None else tokenizer.chat_template
        why = "training rows must have the form in which the model will be prompted"
        if not isinstance(template, str):
            fix = "name a Jinja file in data.chat_template"
            raise ModelError(Problem("TS120", "no chat template", name, why, fix))
        self.tokenizer, self.name = tokenizer, name
        self.source = template
        self._check(name, why)
        self._control = control_pattern(tokenizer)
        self._skeletons: dict[tuple[str, ...], list[Piece] | str] = {}
        self._turn_end = self._shared_turn_end()
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("Hi", add_special_tokens=False)["input_ids"])
        #: SentencePiece-like tokenizers add a space before any text they encode, so their text is never split.
        self._prefixes_space = tokens[0].startswith("\u2581")

    def _check(self, name: str, why: str) -> None:
        """Raise ModelError for a template that is not valid Jinja; a template that refuses this probe may still accept rows."""
        from jinja2 import TemplateSyntaxError

        try:
            self._render_foreign([{"role": "user", "content": "Hi"}])
        except _RefusedError as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                problem = Problem("TS123", f"not valid Jinja: {error}", name, why, "correct the template")
                raise ModelError(problem) from error

    def _render_foreign(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """`render`, with any exception as `_RefusedError`: the template is untrusted code and may raise anything."""
        try:
            with cpu_limit(TEMPLATE_SECONDS):
                return self.render(messages, add_generation_prompt=add_generation_prompt)
        except TooLongError as error:
            why = "a template is untrusted code and may run forever"
            fix = "name another template in data.chat_template"
            raise ModelError(Problem("TS124", f"the template does not terminate: {error}", self.name, why, fix)) from error
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise _RefusedError(lines[0][:200]) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, with the renderer that transformers and vLLM use. Template errors propagate."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tools = tools_of(messages)
        texts, _ = render_jinja_template(
            [[{key: value for key, value in message.items() if key != "tools"} for message in messages]],
            tools=tools,
            chat_template=self.source,
            add_generation_prompt=add_generation_prompt,
            # transformers 4 also passed this list to templates, and some rely on it (GigaChat).
            additional_special_tokens=list(getattr(self.tokenizer, "extra_special_tokens", None) or ()),
            **self.tokenizer.special_tokens_map,
        )
        return str(texts[0])

    def encode(self, rows: Sequence[Sequence[Message]], *, last_answer: bool = False) -> list[Encoded | Problem]:
        """Token ids and loss mask of each conversation, or the Problem that prevents encoding it.

        All answers are labelled, or only an answer in the last turn with `last_answer`. The tokenizer is called once for all
        rows.
        """
        plans = [self._plan(messages, range(len(messages) - 1 if last_answer else 0, len(messages))) for messages in rows]
        return self._encode_plans(plans)

    def encode_prompts(self, rows: Sequence[Sequence[Message]]) -> list[Encoded | Problem]:
        """Token ids of each conversation followed by the generation prompt, as in serving."""
        return self._encode_plans([self._plan(messages, range(0), prompt=True) for messages in rows])

    def _plan(
        self, messages: Sequence[Message], turns: range, *, prompt: bool = False
    ) -> tuple[list[Span], tuple[str, ...]] | Problem:
        """Spans of a conversation with the answers among `turns` labelled, and notes."""
        try:
            text = self._render_foreign(messages, add_generation_prompt=prompt)
            tools = uses_tools(messages)
            pieces = None if tools else self._pieces(messages, text, prompt)
            if tools and (lost := _lost_calls(messages, text)):
                return lost
            if pieces is not None:
                answers = {turn for turn in turns if messages[turn]["role"] == "assistant"}
                spans, notes = self._spans(pieces, answers)
                notes += self._dropped(messages, pieces)
            elif prompt:
                spans, notes = [Span(text, labelled=False, content=False)], ()
            elif tools:
                answers = {turn for turn in turns if messages[turn]["role"] == "assistant"}
                spans, notes = self._answers_after_prompts(messages, text, answers)
            else:
                spans, notes = self._last_answer(messages, text)
        except _RefusedError as error:
            why = "the model has no format for this conversation"
            return Problem("TS121", f"the chat template refused the row: {error}", "", why, "reorder the turns")
        if (pieces is None or self._prefixes_space) and any(
            self._control.search(part) for message in messages for part in texts_in(message)
        ):
            what = "control tokens written as text inside the content"
            why = "with this template and tokenizer they cannot be distinguished from real ones and would forge a turn"
            return Problem("TS108", what, "", why, "remove them from the row")
        if not prompt and not any(span.labelled and span.text for span in spans):
            why = "the tokens of the answer cannot be identified, so the loss mask would be wrong"
            what = "the chat template rewrites the answer"
            return Problem("TS122", what, "", why, "use another template, or write answers in its form")
        return spans, notes

    @staticmethod
    def _dropped(messages: Sequence[Message], pieces: Sequence[Piece]) -> tuple[str, ...]:
        """`system-dropped` if the template silently drops a system turn."""
        shown = {piece.turn for piece in pieces}
        lost = any(message["role"] == "system" and turn not in shown for turn, message in enumerate(messages))
        return ("system-dropped",) if lost else ()

    def _skeleton(self, roles: tuple[str, ...], prompt: bool) -> list[Piece] | str:
        """The rendering of a conversation with these roles and marker words as contents, split at the markers."""
        key = (*roles, "+") if prompt else roles
        if key not in self._skeletons:
            messages = [{"role": role, "content": f"zq{turn:05d}qz"} for turn, role in enumerate(roles)]
            try:
                marked = self._render_foreign(messages, add_generation_prompt=prompt)
            except _RefusedError as error:
                self._skeletons[key] = str(error)
                return self._skeletons[key]
            parts = re.split(r"zq(\d{5})qz", marked)
            self._skeletons[key] = [
                Piece(part, None) if number % 2 == 0 else Piece("", int(part)) for number, part in enumerate(parts)
            ]
        return self._skeletons[key]

    def _pieces(self, messages: Sequence[Message], text: str, prompt: bool) -> list[Piece] | None:
        """`text` split into template and content, or None if the template does more than trim the contents."""
        skeleton = self._skeleton(tuple(message["role"] for message in messages), prompt)
        if isinstance(skeleton, str):
            return None
        pieces: list[Piece] = []
        position = 0
        for index, piece in enumerate(skeleton):
            if piece.turn is None:
                if not text.startswith(piece.text, position):
                    return None
                found = piece.text
            else:
                content, after = messages[piece.turn]["content"], skeleton[index + 1].text
                variants = (trim(content) for trim in _TRIMS)
                match = next((v for v in variants if text.startswith(v + after, position)), None)
                if match is None:
                    return None
                found = match
            pieces.append(Piece(found, piece.turn))
            position += len(found)
        return pieces if position == len(text) else None

    def _spans(self, pieces: Sequence[Piece], answers: Collection[int]) -> tuple[list[Span], tuple[str, ...]]:
        """The spans to encode; the contents of the turns in `answers` and their ends of turn are labelled."""
        spans: list[Span] = []
        notes = tuple[str, ...]()
        answered = False  # whether the previous piece was labelled content
        for number, piece in enumerate(pieces):
            if piece.turn is not None:
                answered = piece.turn in answers
                spans.append(Span(piece.text, labelled=answered, content=True))
                continue
            end = self._end_of_turn(piece.text) if answered else 0
            if end:
                spans.append(Span(piece.text[:end], labelled=True, content=False))
            elif answered and number == len(pieces) - 1 and self.tokenizer.eos_token:
                spans.append(Span(self.tokenizer.eos_token, labelled=True, content=False))
                notes = ("end-of-turn-added",)
            spans.append(Span(piece.text[end:], labelled=False, content=False))
            answered = False
        return [span for span in spans if span.text], notes

    def _end_of_turn(self, text: str) -> int:
        """Length of the end of turn in the template's `text` after an answer; 0 if there is none.

        The end of turn is the text that follows both a middle answer and the last one (`_shared_turn_end`). If the two
        differ (gpt-oss ends the last turn with its own token), it is the first control token.
        """
        if self._turn_end and text.startswith(self._turn_end):
            return len(self._turn_end)
        match = self._control.search(text)
        return match.end() if match and not text[: match.start()].strip() else 0

    def _shared_turn_end(self) -> str:
        """The end of turn that the template writes after every answer, in the middle and at the end.

        It reaches to the last control token in that text; without one it is the plain text without trailing blanks. Empty
        if the template has no end of turn, or refuses the probe.
        """
        skeleton = self._skeleton(("user", "assistant", "user", "assistant"), prompt=False)
        if isinstance(skeleton, str):
            return ""
        turns = [piece.turn for piece in skeleton]
        if turns.count(1) != 1 or turns.count(3) != 1:
            return ""
        after = [skeleton[turns.index(turn) + 1].text for turn in (1, 3)]
        shared = _shared_start(after)
        ends = []
        for match in self._control.finditer(after[0]):
            if match.group() == self._opener(skeleton[0].text):
                break
            if match.end() > len(shared):
                shared = shared[: match.start()]  # two control tokens with a common prefix
                break
            ends.append(match.end())
        return shared[: ends[-1]] if ends else shared.rstrip()

    def _opener(self, text: str) -> str | None:
        """The control token that opens a turn: the first one in a rendering that is not the tokenizer's bos."""
        found = (match.group() for match in self._control.finditer(text))
        return next((token for token in found if token != self.tokenizer.bos_token), None)

    def _last_answer(self, messages: Sequence[Message], text: str) -> tuple[list[Span], tuple[str, ...]]:
        """Spans with only the last answer labelled: the text after the generation prompt. Empty if it cannot be identified.

        For templates that rewrite answers, like those of reasoning models.
        """
        if messages[-1]["role"] != "assistant":
            return [], ()
        prompt = self._render_foreign(messages[:-1], add_generation_prompt=True)
        if not text.startswith(prompt):
            return [], ()
        answer = text[len(prompt) :]
        ends = [m.end() for m in self._control.finditer(answer) if not answer[m.end() :].strip()]
        end = ends[0] if ends else len(answer.rstrip())
        spans = [Span(prompt, False, False), Span(answer[:end], True, False), Span(answer[end:], False, False)]
        return [span for span in spans if span.text], ("last-answer-only",)

    def _answers_after_prompts(
        self, messages: Sequence[Message], text: str, answers: Collection[int]
    ) -> tuple[list[Span], tuple[str, ...]]:
        """Spans with each of the `answers` labelled: the text that the rendering up to it adds to its generation prompt.

        For conversations with tools, where an answer is more than its content. Falls back to the last answer if the
        template renders an earlier turn differently once other turns follow.
        """
        spans: list[Span] = []
        position = 0
        for turn in sorted(answers):
            prompt = self._render_foreign(messages[:turn], add_generation_prompt=True) if turn else ""
            shared = _shared_start([text, self._render_foreign(messages[: turn + 1])])
            if not turn or not text.startswith(prompt) or not position <= len(prompt) < len(shared):
                return self._last_answer(messages, text)
            answer = shared[len(prompt) :]
            ends = [match.end() for match in self._control.finditer(answer) if not answer[match.end() :].strip()]
            end = len(prompt) + (ends[0] if ends else len(answer.rstrip()))
            spans += [Span(text[position : len(prompt)], False, False), Span(text[len(prompt) : end], True, False)]
            position = end
        spans.append(Span(text[position:], False, False))
        return [span for span in spans if span.text], ()

    def _encode_plans(self, plans: Sequence[tuple[list[Span], tuple[str, ...]] | Problem]) -> list[Encoded | Problem]:
        by_offsets = self._prefixes_space
        texts: list[str] = []
        for plan in plans:
            if not isinstance(plan, Problem):
                joined = [(span.text, False) for span in plan[0]] if by_offsets else self._parts(plan[0])
                texts += ["".join(t for t, _ in joined)] if by_offsets else [t for t, _ in joined]
        encoded = self._tokenize(texts, offsets=by_offsets)
        cursor = 0
        rows: list[Encoded | Problem] = []
        for plan in plans:
            if isinstance(plan, Problem):
                rows.append(plan)
            elif by_offsets:
                rows.append(_by_offsets(plan, encoded["input_ids"][cursor], encoded["offset_mapping"][cursor]))
                cursor += 1
            else:
                ids: list[int] = []
                loss_mask: list[bool] = []
                for _, flag in self._parts(plan[0]):
                    ids += encoded["input_ids"][cursor]
                    loss_mask += [flag] * len(encoded["input_ids"][cursor])
                    cursor += 1
                rows.append(Encoded(ids, loss_mask, plan[1]))
        return rows

    def _tokenize(self, texts: list[str], *, offsets: bool) -> Mapping[str, Any]:
        if not texts:
            return {"input_ids": [], "offset_mapping": []}
        result: Mapping[str, Any] = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=offsets, return_attention_mask=False
        )
        return result

    def _parts(self, spans: Sequence[Span]) -> list[tuple[str, bool]]:
        """Texts to encode separately: neighbours with the same label are joined, control tokens in contents are cut in two."""
        parts: list[tuple[str, bool]] = []
        joinable = False
        for span in spans:
            cuts = control_cuts(self._control, span.text) if span.content else []
            edges = [0, *cuts, len(span.text)]
            for number, (start, end) in enumerate(pairwise(edges)):
                if joinable and number == 0 and parts[-1][1] == span.labelled:
                    parts[-1] = (parts[-1][0] + span.text[start:end], span.labelled)
                else:
                    parts.append((span.text[start:end], span.labelled))
                joinable = True
        return parts


def _lost_calls(messages: Sequence[Message], text: str) -> Problem | None:
    """The Problem of a template that omits tool calls or tool results from the rendering."""
    for message in messages:
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        content = str(message["content"]).strip() if message["role"] == "tool" else ""
        if any(name not in text for name in names) or content not in text:
            why = "the model would learn answers without the calls that led to them"
            fix = "set data.chat_template to a template with tools"
            return Problem("TS121", "the chat template omits tool calls", "", why, fix)
    return None


def _by_offsets(plan: tuple[list[Span], tuple[str, ...]], ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
    """The loss mask of a text encoded as a whole: an id is labelled if it covers any labelled character."""
    flags: list[bool] = []
    for span in plan[0]:
        flags += [span.labelled] * len(span.text)
    return Encoded(list(ids), [any(flags[start:end]) for start, end in offsets], plan[1])


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches the text of any special or added token, which the tokenizer matches as a whole."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    words = sorted({word for word in added if word.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) if words else r"(?!)")


def control_cuts(control: re.Pattern[str], text: str) -> list[int]:
    """Where to cut `text` so that no piece contains a whole control token: inside each occurrence, overlaps included."""
    cuts: list[int] = []
    position = 0
    while match := control.search(text, position):
        cuts.append(match.start() + 1)
        position = match.start() + 1
    return cuts
