"""The data stage: every row that comes in is trained on, held out, or rejected with a reason."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.chat.document import Document, DocumentEncoder, to_document, to_pieces
from tunesmith.chat.formats import Message, to_messages
from tunesmith.chat.judged import Asked, Judged, judged_or_plain, to_asked, to_judged
from tunesmith.chat.preference import Pair, chosen_messages, equal_answers, to_pair
from tunesmith.chat.template import ChatTemplate, Encoded
from tunesmith.errors import CODES, DataError, Problem, RecipeError
from tunesmith.io.atomic import read_json, sha256_file, sha256_json, write_json, write_jsonl, write_text
from tunesmith.io.documents import folder_digest, read_documents
from tunesmith.io.rows import read_rows
from tunesmith.models.load import load_tokenizer, locate, model_digest
from tunesmith.models.rope import check_scalable, window
from tunesmith.recipe import DataSection, Recipe
from tunesmith.runs import Run
from tunesmith.sections import ON_PAIRS, SAMPLED
from tunesmith.stages.prepare.files import SCHEMA, marked_sample, schema_of, write_arrow

_MAX_SHOWN = 20  # kinds of problems named in one error; the rest are counted
_CHUNK = 1000  # rows encoded with one call of the tokenizer
_SAMPLES = 20  # rows shown in samples.txt

#: Why a row is left out, by the code of its problem, as `ledger.json` spells it.
_REASONS = {code: name.removeprefix("data-") for code, name in CODES.items()}


#: What the notes of an encoded row mean.
_NOTES = {
    "last-answer-only": "the template rewrites earlier answers, so only the last one is trained",
    "end-of-turn-added": "the template ends no turn, so the tokenizer's eos was put after the last answer",
    "system-dropped": "the template leaves the system turn out",
    "document-split": "longer than data.max_length, so they go on in further rows",
    "no-end-of-document": "the tokenizer has no eos to end them with",
}


#: Makes a conversation, or a pair of them, out of a row: (row, where, format, system).
Reader = Callable[[Mapping[str, Any], str, str, str | None], list[Message] | Pair | Judged | Asked | Document | Problem]

#: Which rows each objective reads.
READERS: dict[str, Reader] = {
    "sft": to_messages,
    "pretrain": to_document,
    **dict.fromkeys(ON_PAIRS, to_pair),
    "kto": to_judged,
    **dict.fromkeys(SAMPLED, to_asked),
}

#: Which rows a test set may have; by default conversations and preference rows.
TEST_READERS: dict[str, Reader] = {"kto": judged_or_plain, **dict.fromkeys(SAMPLED, to_asked)}


@dataclass(frozen=True)
class Candidate:
    """A row on its way: where it stands, its conversation, and once encoded, its token ids.

    A pair's conversation is the chosen one; the rejected one stands beside it. A document has a text instead, and once encoded
    its pieces.
    """

    where: str
    messages: list[Message]
    rejected: list[Message] | None = None
    encoded: Encoded | None = None
    encoded_rejected: Encoded | None = None
    text: str | None = None
    pieces: tuple[Encoded, ...] = ()
    more: Judged | Asked | None = None
    prompt_ids: list[int] | None = None

    @property
    def key(self) -> str:
        """Equal for rows with the same conversation, or the same two."""
        label = self.more.label if isinstance(self.more, Judged) else None
        return sha256_json([self.messages, self.rejected, self.text, label])

    @property
    def sides(self) -> list[Encoded]:
        """What was encoded: one conversation, or the two of a pair."""
        return [side for side in (self.encoded, self.encoded_rejected) if side is not None]

    @property
    def shown(self) -> dict[str, Any]:
        """What is kept of it as JSON: a conversation, or a text."""
        return {"messages": self.messages} if self.text is None else {"text": self.text}

    @property
    def rows(self) -> list[Candidate]:
        """The rows that are trained on: itself, or one for each piece of a document."""
        count = len(self.pieces)
        names = [self.where] if count == 1 else [f"{self.where} (piece {n} of {count})" for n in range(1, count + 1)]
        pieces = zip(names, self.pieces, strict=True)
        return [replace(self, where=where, encoded=piece, pieces=()) for where, piece in pieces] if count else [self]


@dataclass
class Ledger:
    """Counts that add up: rows_in = rows_train + rows_heldout + rows_rejected.

    Documents count as rows; `pieces` tells in how many rows they are trained on and held out.
    """

    rows_in: int = 0
    rows_train: int = 0
    rows_heldout: int = 0
    rejects: list[dict[str, Any]] = field(default_factory=list)
    test: dict[str, Any] = field(default_factory=dict)
    tokens_train: int = 0
    tokens_trained_on: int = 0
    pieces: dict[str, int] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def reject(self, where: str, reason: str, detail: str) -> None:
        """Count one row out."""
        self.rejects.append({"where": where, "reason": reason, "detail": detail})

    def as_dict(self) -> dict[str, Any]:
        """The content of ledger.json; `reasons` maps each reason to its count."""
        if self.rows_in != self.rows_train + self.rows_heldout + len(self.rejects):
            raise AssertionError("rows in and rows out do not add up")
        return {
            "rows_in": self.rows_in,
            "rows_train": self.rows_train,
            "rows_heldout": self.rows_heldout,
            "rows_rejected": len(self.rejects),
            "reasons": dict(sorted(Counter(entry["reason"] for entry in self.rejects).items())),
            "tokens_train": self.tokens_train,
            "tokens_trained_on": self.tokens_trained_on,
            "notes": dict(sorted(self.notes.items())),
            "test": self.test,
        } | ({"pieces": self.pieces} if self.pieces else {})


def prepare(run: Run) -> dict[str, Any]:
    """Write the run's `data/` and return its ledger; a no-op when rows, template and settings are unchanged.

    Raises DataError naming every bad row (up to 20) unless the recipe rejects bad rows; nothing is written then.
    """
    recipe = run.recipe
    folder = locate(recipe.model, recipe.revision)
    inputs = _inputs(recipe, folder)
    if not run.is_current("prepare", inputs):
        with run.perform("prepare", "data", inputs) as target:
            _write(run, folder, target)
    ledger: dict[str, Any] = read_json(run.path / "data" / "ledger.json")
    return ledger


def _inputs(recipe: Recipe, folder: Path) -> dict[str, str]:
    inputs = {"recipe": recipe.section_digest("data", "seed", "objective", "rope_scaling"), "model": model_digest(folder)}
    for name in ("train", "test", "chat_template"):
        path = getattr(recipe.data, name)
        if path is not None:
            inputs[name] = _file_digest(Path(path))
    return inputs


def _file_digest(path: Path) -> str:
    if path.is_dir():
        return folder_digest(path)
    return sha256_file(path) if path.is_file() else "missing"


def _check_pretrain(recipe: Recipe) -> None:
    """Raise RecipeError naming every key that has no meaning where raw text is learned."""
    if recipe.objective != "pretrain":
        return
    data, scored = recipe.data, recipe.evaluate
    asked = {
        "data.format": data.format != "auto",
        "data.system": data.system is not None,
        "data.chat_template": data.chat_template is not None,
        "evaluate.json_schema": scored.json_schema is not None,
        "evaluate.label": scored.label is not None,
    }
    why = "raw text has no turns and no answers, so the key would be without effect"
    fix = "remove it, or train on conversations with objective: sft"
    keys = [key for key, given in asked.items() if given]
    problems = [Problem("TS003", f"{key} with objective: pretrain", "recipe", why, fix) for key in keys]
    if problems:
        raise RecipeError(problems)


def _write(run: Run, model_folder: Path, target: Path) -> None:
    recipe, data = run.recipe, run.recipe.data
    ledger = Ledger()
    config = _model_config(recipe, model_folder)
    # Rows first: what is wrong with them shows before anything heavy is loaded.
    _check_pretrain(recipe)
    read, documents = READERS[recipe.objective], recipe.objective == "pretrain"
    candidates = _draw(_unique(_read(Path(data.train), read, data, ledger), ledger), recipe, ledger)
    tokenizer = load_tokenizer(model_folder)
    template = None if documents else ChatTemplate(tokenizer, _template_source(data), str(model_folder))
    if template is None:
        rows = _encode_documents(candidates, DocumentEncoder(tokenizer), data, ledger)
    else:
        rows = _encode(candidates, template, data, ledger)
    if not rows:
        why = f"{ledger.rows_in} rows came in and {len(ledger.rejects)} were rejected"
        detail = ", ".join(f"{n} {reason}" for reason, n in Counter(e["reason"] for e in ledger.rejects).items())
        raise DataError(Problem("TS109", f"no row is left to train on ({detail})", data.train, why, "correct the data"))
    heldout, train = _split(rows, recipe)
    ledger.rows_train, ledger.rows_heldout = len(train), len(heldout)
    kept = heldout
    if documents:
        heldout, train = ([row for document in part for row in document.rows] for part in (heldout, train))
        ledger.pieces = {"train": len(train), "heldout": len(heldout)}
    sides = [side for row in train for side in row.sides]
    ledger.tokens_train = sum(len(side.input_ids) for side in sides)
    # A reference is compared with what is sampled; nothing of it is trained on.
    ledger.tokens_trained_on = 0 if recipe.objective in SAMPLED else sum(sum(side.trained) for side in sides)
    if data.test is not None:
        _write_any_test(Path(data.test), tokenizer, recipe, target, ledger)
    schema = schema_of(recipe.objective)
    write_arrow(target / "train.arrow", train, schema)
    write_arrow(target / "heldout.arrow", heldout, schema)
    write_jsonl(target / "heldout.jsonl", [{"where": row.where, **row.shown} for row in kept])
    write_jsonl(target / "rejects.jsonl", ledger.rejects)
    counts = ledger.as_dict()
    write_json(target / "ledger.json", counts)
    _tell(run, target, counts, _beyond(config, recipe, [*train, *heldout]))
    if template is not None:
        write_text(target / "chat_template.jinja", template.source)
    write_text(target / "samples.txt", "\n".join(marked_sample(row, tokenizer) for row in train[:_SAMPLES]))


def _model_config(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises ModelError where its positions cannot be scaled as the recipe asks."""
    config: dict[str, Any] = read_json(folder / "config.json")
    if recipe.rope_scaling is not None:
        check_scalable(config, folder)
    return config


def _beyond(config: Mapping[str, Any], recipe: Recipe, rows: Sequence[Candidate]) -> tuple[int, int | None]:
    """How many rows are longer than the model's positions, and how many positions it has."""
    positions = window(config, recipe.rope_scaling)
    if positions is None:
        return 0, None
    return sum(any(len(side.input_ids) > positions for side in row.sides) for row in rows), positions


def _tell(run: Run, target: Path, counts: Mapping[str, Any], beyond: tuple[int, int | None]) -> None:
    """Events for what was left out, what differs from the plain reading, and rows beyond the model's window."""
    many, positions = beyond
    if many:
        text = f"{many} rows are longer than the model's {positions} positions: lower data.max_length, or set rope_scaling"
        run.event(target, "rows-beyond-window", text, count=many, window=positions)
    for reason, count in counts["reasons"].items():
        run.event(target, "rows-rejected", f"{count} rows left out: {reason}", reason=reason, count=count)
    for note, count in counts["notes"].items():
        run.event(target, note, f"{count} rows: {_NOTES[note]}", count=count)


def _template_source(data: DataSection) -> str | None:
    if data.chat_template is None:
        return None
    path = Path(data.chat_template)
    if not path.is_file():
        why = "rows must be trained on in the form in which the model will be asked"
        raise DataError(Problem("TS120", "the chat template file does not exist", str(path), why, "check the path"))
    return path.read_text(encoding="utf-8")


def _read(path: Path, read: Reader, data: DataSection, ledger: Ledger) -> list[Candidate]:
    """All usable rows; bad ones are rejected, or raised together, as the recipe says."""
    candidates: list[Candidate] = []
    problems: list[Problem] = []
    for row in read_documents(path) if read is to_document else read_rows(path):
        ledger.rows_in += 1
        result = row.problem or read(row.value or {}, row.where, data.format, data.system)
        if not isinstance(result, Problem):
            candidates.append(_candidate(row.where, result))
        elif data.on_bad_row == "reject":
            ledger.reject(row.where, _REASONS[result.code], result.what)
        else:
            problems.append(result)
    if problems:
        raise DataError(_shortened(problems))
    if ledger.rows_in == 0:
        why = "there is nothing to train on"
        raise DataError(Problem("TS103", "the data file holds no rows", str(path), why, "write rows, or check the path"))
    return candidates


def _candidate(where: str, result: list[Message] | Pair | Judged | Asked | Document) -> Candidate:
    if isinstance(result, Document):
        return Candidate(where, [], text=result.text)
    if isinstance(result, Pair):
        return Candidate(where, result.chosen, result.rejected)
    return Candidate(where, result.messages, more=result) if isinstance(result, Judged | Asked) else Candidate(where, result)


def _shortened(problems: list[Problem]) -> list[Problem]:
    """Rows with the same problem told as one, by the first of them; at most 20, the last saying how to go on without."""
    alike: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        alike.setdefault((problem.code, problem.what), []).append(problem)
    shown = []
    for first, *others in list(alike.values())[:_MAX_SHOWN]:
        where = f"{first.where} and {len(others)} more rows" if others else first.where
        shown.append(replace(first, where=where))
    left = len(alike) - len(shown)
    more = f" ({left} more kinds of problems are not shown)" if left else ""
    hint = f"{shown[-1].fix}; or set data.on_bad_row: reject to leave such rows out, counted{more}"
    return [*shown[:-1], replace(shown[-1], fix=hint)]


def _unique(candidates: Sequence[Candidate], ledger: Ledger) -> list[Candidate]:
    """The first of each set of equal conversations."""
    first: dict[str, str] = {}
    kept = []
    for candidate in candidates:
        original = first.setdefault(candidate.key, candidate.where)
        if original == candidate.where:
            kept.append(candidate)
        else:
            ledger.reject(
                candidate.where, "duplicate", f"the same {'conversation' if candidate.text is None else 'text'} as {original}"
            )
    return kept


def _draw(candidates: list[Candidate], recipe: Recipe, ledger: Ledger) -> list[Candidate]:
    """At most `data.max_rows` of them, drawn by the seed, in their order."""
    limit = recipe.data.max_rows
    if limit is None or len(candidates) <= limit:
        return candidates
    chosen = set(random.Random(recipe.seed).sample(range(len(candidates)), limit))
    for index, candidate in enumerate(candidates):
        if index not in chosen:
            ledger.reject(candidate.where, "over-max-rows", f"data.max_rows is {limit}")
    return [candidates[index] for index in sorted(chosen)]


def _encode(candidates: Sequence[Candidate], template: ChatTemplate, data: DataSection, ledger: Ledger) -> list[Candidate]:
    rows: list[Candidate] = []
    problems: list[Problem] = []
    for start in range(0, len(candidates), _CHUNK):
        for candidate, result in _encoded(candidates[start : start + _CHUNK], template):
            if isinstance(result, Problem):
                if data.on_bad_row == "reject":
                    ledger.reject(candidate.where, _REASONS[result.code], result.what)
                else:
                    problems.append(replace(result, where=candidate.where))
                continue
            longest = max(len(side.input_ids) for side in result.sides)
            if longest > data.max_length:
                ledger.reject(candidate.where, "too-long", f"{longest} tokens, data.max_length is {data.max_length}")
            else:
                ledger.notes.update({note for side in result.sides for note in side.notes})
                rows.append(result)
    if problems:
        raise DataError(_shortened(problems))
    return rows


def _encode_documents(
    candidates: Sequence[Candidate], encoder: DocumentEncoder, data: DataSection, ledger: Ledger
) -> list[Candidate]:
    """The documents with their pieces; bad ones are rejected, or raised together, as the recipe says."""
    rows: list[Candidate] = []
    problems: list[Problem] = []
    for start in range(0, len(candidates), _CHUNK):
        chunk = candidates[start : start + _CHUNK]
        for candidate, ids in zip(chunk, encoder.encode([each.text or "" for each in chunk]), strict=True):
            if not isinstance(ids, Problem):
                rows.append(replace(candidate, pieces=tuple(to_pieces(ids, data.max_length))))
            elif data.on_bad_row == "reject":
                ledger.reject(candidate.where, _REASONS[ids.code], ids.what)
            else:
                problems.append(replace(ids, where=candidate.where))
    if problems:
        raise DataError(_shortened(problems))
    ledger.notes["document-split"] += sum(len(row.pieces) > 1 for row in rows)
    ledger.notes["no-end-of-document"] += 0 if encoder.ends else len(rows)
    ledger.notes = +ledger.notes  # only what there is
    return rows


def _encoded(chunk: Sequence[Candidate], template: ChatTemplate) -> Iterator[tuple[Candidate, Candidate | Problem]]:
    """Each candidate with itself encoded, or with its problem. Of pairs and judged rows last answers alone carry loss."""
    if chunk and isinstance(chunk[0].more, Asked):
        yield from encoded_prompts(chunk, template)
        return
    pairs = [candidate for candidate in chunk if candidate.rejected is not None]
    last_answer = bool(pairs) or any(candidate.more is not None for candidate in chunk)
    firsts = template.encode([candidate.messages for candidate in chunk], last_answer=last_answer)
    others = iter(template.encode([pair.rejected for pair in pairs if pair.rejected is not None], last_answer=True))
    for candidate, first in zip(chunk, firsts, strict=True):
        other = next(others) if candidate.rejected is not None else None
        if isinstance(first, Problem):
            yield candidate, first
        elif isinstance(other, Problem):
            yield candidate, other
        elif other is not None and first.input_ids == other.input_ids:
            yield candidate, equal_answers(candidate.where)  # they differed in what the template trims
        else:
            yield candidate, replace(candidate, encoded=first, encoded_rejected=other)


def encoded_prompts(chunk: Sequence[Candidate], template: ChatTemplate) -> Iterator[tuple[Candidate, Candidate | Problem]]:
    """Each prompt as it is asked; with a reference, also the conversation that it ends, which the held-out loss reads."""
    asked = [candidate.more for candidate in chunk if isinstance(candidate.more, Asked)]
    prompts = template.encode_prompts([each.prompt for each in asked])
    answered = iter(template.encode([each.messages for each in asked if each.reference is not None], last_answer=True))
    for candidate, each, prompt in zip(chunk, asked, prompts, strict=True):
        whole = prompt if each.reference is None else next(answered)
        if isinstance(prompt, Problem):
            yield candidate, prompt
        elif isinstance(whole, Problem):
            yield candidate, whole
        else:
            yield candidate, replace(candidate, encoded=whole, prompt_ids=prompt.input_ids)


def _split(rows: list[Candidate], recipe: Recipe) -> tuple[list[Candidate], list[Candidate]]:
    """Held-out and train rows, drawn by the seed; at least one of each where there are two rows and a share is asked."""
    share = recipe.data.heldout
    count = min(len(rows) - 1, max(1, round(share * len(rows)))) if share > 0 else 0
    chosen = set(random.Random(recipe.seed + 1).sample(range(len(rows)), count))
    return [rows[i] for i in sorted(chosen)], [row for i, row in enumerate(rows) if i not in chosen]


def _write_test(path: Path, data: DataSection, objective: str, target: Path, ledger: Ledger) -> None:
    """Test rows as conversations; they are generated from, not trained on, so they are not encoded here.

    Of a preference row the chosen answer is the reference, of a judged one the answer if it is desirable.
    """
    counts = Ledger()
    usable: list[Candidate] = []
    for row in _read(path, TEST_READERS.get(objective, chosen_messages), data, counts):
        if isinstance(row.more, Judged) and not row.more.label:
            counts.reject(row.where, "no-reference", "the answer is judged undesirable")
        elif row.messages[-1]["role"] == "assistant":
            usable.append(row)
        else:
            counts.reject(row.where, "no-reference", "the last turn is not an assistant's")
    counts.rows_heldout = len(usable)
    ledger.test = {key: value for key, value in counts.as_dict().items() if key in ("rows_in", "rows_rejected", "reasons")}
    ledger.test["rows_test"] = len(usable)
    write_jsonl(target / "test.jsonl", [{"where": row.where, "messages": row.messages} for row in usable])


def _write_any_test(path: Path, tokenizer: Any, recipe: Recipe, target: Path, ledger: Ledger) -> None:
    if recipe.objective == "pretrain":
        _write_test_documents(path, DocumentEncoder(tokenizer), recipe.data, target, ledger)
    else:
        _write_test(path, recipe.data, recipe.objective, target, ledger)


def _write_test_documents(path: Path, encoder: DocumentEncoder, data: DataSection, target: Path, ledger: Ledger) -> None:
    """Test documents as rows, of which the loss is taken."""
    counts = Ledger()
    usable = _encode_documents(_read(path, to_document, data, counts), encoder, data, counts)
    counts.rows_heldout = len(usable)
    ledger.test = {key: value for key, value in counts.as_dict().items() if key in ("rows_in", "rows_rejected", "reasons")}
    ledger.test["rows_test"] = len(usable)
    write_arrow(target / "test.arrow", [row for document in usable for row in document.rows], SCHEMA)
