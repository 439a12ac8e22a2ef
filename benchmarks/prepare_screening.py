"""Precision and recall of the injection rule: jailbreak prompts seen in the wild against GSM8K's questions and other rows.

The collection's distinct prompts are cut in two by the parity of their sha256. The rule's phrases were chosen on the half with
even digests; what is claimed is measured on the other half. Prompts of one family stand in both halves, so an attack of a new
family is found less often than this says. Some of the collection are plain role plays, which no rule should find.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from common import claim, merged, parser, report

from tunesmith.quality.injection import injection_score

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _jailbreaks(odd: int) -> list[str]:
    texts = json.loads((DATA / "injection" / "inthewild_jailbreak_llms.json").read_text(encoding="utf-8"))
    return [text for text in dict.fromkeys(texts) if hashlib.sha256(text.encode()).digest()[-1] % 2 == odd]


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
            texts += [row[0] for row in csv.reader(handle) if row[-1] != "answer"]  # the copy has a header
    return texts


def _found(texts: Sequence[str]) -> int:
    return sum(injection_score(text) >= 1 for text in texts)


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    sets = {"jailbreaks, chosen on": _jailbreaks(0), "jailbreaks, measured": _jailbreaks(1)}
    sets |= {"gsm8k test questions": _gsm8k(), "alpaca_en_demo prompts": _alpaca(), "mmlu test questions": _mmlu()}
    rows = [{"part": "screening", "set": name, "texts": len(texts), "found": _found(texts)} for name, texts in sets.items()]
    for row in rows:
        print(f"{row['set']:<28} {row['found']:>5} of {row['texts']}")
    right, total, wrong = rows[1]["found"], rows[1]["texts"], rows[2]["found"]
    claims = [
        claim("injection_recall", right / total, "share of the half that was kept for measuring"),
        claim("injection_precision", right / max(1, right + wrong), "share of findings, that half with gsm8k's test questions"),
    ]
    report(options.json, *merged(options.json, claims, rows))


if __name__ == "__main__":
    main()
