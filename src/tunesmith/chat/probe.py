"""Probes a chat template with known conversations: their renderings, a digest of them, and findings.

The digest checks parity: a server of the model renders the same conversations and must get the same text.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from tunesmith.chat.template import ChatTemplate, Encoded
from tunesmith.io.atomic import sha256_json

_SYSTEM = {"role": "system", "content": "Probe system 7."}
_TURNS = [
    {"role": "user", "content": "Probe question 1?"},
    {"role": "assistant", "content": "Probe answer 2."},
    {"role": "user", "content": "Probe question 3?"},
    {"role": "assistant", "content": "Probe answer 4."},
]

#: Name, conversation, and whether the generation prompt follows.
PROBES: list[tuple[str, list[dict[str, Any]], bool]] = [
    ("one round", _TURNS[:2], False),
    ("two rounds", _TURNS, False),
    ("system", [_SYSTEM, *_TURNS[:2]], False),
    ("system, asked", [_SYSTEM, *_TURNS[:1]], True),
]

_CONTROL_LIKE = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<bos>|<eos>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>")


def probe(template: ChatTemplate) -> dict[str, Any]:
    """`renderings` (name, and the text or the refusal message), their `digest`, and `findings` (rule, detail)."""
    renderings = [_rendering(template, *each) for each in PROBES]
    return {"digest": sha256_json(renderings), "renderings": renderings, "findings": _findings(template, renderings)}


def _rendering(template: ChatTemplate, name: str, messages: list[dict[str, Any]], asked: bool) -> dict[str, str]:
    try:
        return {"name": name, "text": template.render(messages, add_generation_prompt=asked)}
    except (TemplateError, TypeError, ValueError, KeyError) as error:  # untrusted code; `encode` handles rows one by one
        return {"name": name, "refused": (str(error).splitlines() or [type(error).__name__])[0][:200]}


def _findings(template: ChatTemplate, renderings: list[dict[str, str]]) -> list[dict[str, str]]:
    found: list[tuple[str, str]] = []
    texts = {each["name"]: each.get("text") for each in renderings}
    whole = "\n".join(text for text in texts.values() if text)
    added = {str(token) for token in template.tokenizer.added_tokens_decoder.values()}
    unknown = sorted(set(_CONTROL_LIKE.findall(whole)) - added)
    if unknown:
        found.append(
            ("template-token-mismatch", f"the tokenizer has no token {', '.join(unknown)}: it is split into ordinary tokens")
        )
    if (system := texts["system"]) is None:
        found.append(("system-refused", "the template refuses a system turn"))
    elif _SYSTEM["content"] not in system:
        found.append(("system-dropped", "the template drops the system turn"))
    (row,) = template.encode([_TURNS[:2]])
    if isinstance(row, Encoded) and "end-of-turn-added" in row.notes:
        found.append(
            ("missing-end-of-turn", "the template has no end of turn; the tokenizer's eos is added after the last answer")
        )
    if _begins_twice(template, texts["one round"] or ""):
        found.append(("double-bos", "the text begins with bos, and the tokenizer adds a second one when serving"))
    return [{"rule": rule, "detail": detail} for rule, detail in found]


def _begins_twice(template: ChatTemplate, text: str) -> bool:
    """Whether a server that tokenizes the rendered text like any other text gets two bos tokens."""
    bos = template.tokenizer.bos_token_id
    ids = template.tokenizer(text)["input_ids"][:2] if text else []
    return bos is not None and list(ids) == [bos, bos]
