"""Precision and recall of the injection rule: jailbreak prompts seen in the wild against GSM8K's questions and other rows.

The rule's phrases were chosen on every second prompt of the collection. The claims are measured on prompts at odd positions,
both in the collection as it is and in the collection without repeated prompts, so that none was seen under either count. Both
parts contain prompts of the same families, so recall on a new family of attacks is lower than claimed. A separate row has the
prompts that share less than a third of their three-word runs with any prompt of the other part. Some prompts of the collection
are plain role plays, which no rule should find.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from common import claim, merged, parser, report

from tunesmith.quality.injection import injection_score
from tunesmith.quality.words import words

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _jailbreaks() -> tuple[list[str], list[str]]:
    """The prompts on which the phrases may have been chosen, and the others."""
    texts = json.loads((DATA / "injection" / "inthewild_jailbreak_llms.json").read_text(encoding="utf-8"))
    distinct = list(dict.fromkeys(texts))
    seen = {*texts[::2], *distinct[::2]}
    return [text for text in distinct if text in seen], [text for text in distinct if text not in seen]


def _new(texts: Sequence[str], known: Sequence[str]) -> list[str]:
    """The texts that are unlike all known ones."""
    sets = [_runs(text) for text in known]
    return [text for text in texts if all(3 * len(runs & _runs(text)) < len(runs | _runs(text)) for runs in sets)]


def _runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + 3]) for i in range(len(found) - 2)}


def _gsm8k() -> list[str]:
    lines = (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["question"] for line in lines if line]


def _alpaca() -> list[str]:
    rows = json.loads((DATA / "alpaca_demo" / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    return [f"{row['instruction']}\n\n{row['input']}" for row in rows]


def _mmlu() -> list[str]:
    texts = []
    for path in sorted((DATA / "mmlu" / "test").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as handle:
            texts += [row[0] for row in csv.reader(handle) if row[-1] != "answer"]  # this copy has a header
    return texts


def _found(texts: Sequence[str]) -> int:
    return sum(injection_score(text) >= 1 for text in texts)


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    seen, unseen = _jailbreaks()
    sets = {"jailbreaks, chosen on": seen, "jailbreaks, measured": unseen, "of these unlike all others": _new(unseen, seen)}
    sets |= {"gsm8k test questions": _gsm8k(), "alpaca_en_demo prompts": _alpaca(), "mmlu test questions": _mmlu()}
    rows = [{"part": "screening", "set": name, "texts": len(texts), "found": _found(texts)} for name, texts in sets.items()]
    for row in rows:
        print(f"{row['set']:<28} {row['found']:>5} of {row['texts']}")
    found = {row["set"]: row["found"] for row in rows}
    right, wrong = found["jailbreaks, measured"], found["gsm8k test questions"]
    claims = [
        claim("injection_recall", right / len(unseen), "share of the prompts that were kept for measuring"),
        claim("injection_precision", right / max(1, right + wrong), "share of findings, those with gsm8k's test questions"),
    ]
    report(options.json, *merged(options.json, claims, rows))


if __name__ == "__main__":
    main()
