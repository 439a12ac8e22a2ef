"""Planted duplicates: 20,000 rows of real data sets, of which 1,000 are exact copies of others and 1,000 are near-duplicates.

Rows are drawn from gsm8k, clinc150, alpaca (en, zh) and hh-rlhf, seeded, after removing rows that the sets contain twice. A
near-duplicate has words changed, removed or inserted one by one as long as its Jaccard index with its original stays at 0.8 or
above (on sets of three-word runs, computed here independently of the measured code). Short rows that drop below it with any
change are not used. A found row is false if its index with the row it is matched to is below the threshold; the claim is
the share of false rows among all rows found. Rows that are found and true but not planted are natural near-duplicates.
"""

from __future__ import annotations

import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import claim, merged, parser, report

from tunesmith.quality import NearDuplicates
from tunesmith.quality.duplicates import RUN
from tunesmith.quality.words import words

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS, PLANTED, THRESHOLD, SEED = 20_000, 1_000, 0.8, 42


def _texts() -> Iterator[str]:
    for line in (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            yield f"{row['question']}\n{row['answer']}"
    for language in ("en", "zh"):
        for row in json.loads((DATA / "alpaca_demo" / f"alpaca_{language}_demo.json").read_text(encoding="utf-8")):
            yield "\n".join(filter(None, (row["instruction"], row.get("input"), row["output"])))
    with gzip.open(DATA / "hh_rlhf" / "test.jsonl.gz", "rt", encoding="utf-8") as handle:
        yield from (json.loads(line)["chosen"] for line in handle)
    for text, intent in json.loads((DATA / "clinc150" / "data_full.json").read_text(encoding="utf-8"))["train"]:
        yield f"{text}\n{intent}"


def _runs(text: str) -> set[tuple[str, ...]]:
    padded = ["<"] * (RUN - 1) + words(text) + [">"] * (RUN - 1)
    return {tuple(padded[i : i + RUN]) for i in range(len(padded) - RUN + 1)}


def jaccard(one: str, other: str) -> float:
    first, second = _runs(one), _runs(other)
    return len(first & second) / len(first | second)


def near_copy(text: str, draw: random.Random, vocabulary: list[str]) -> str | None:
    """The text changed word by word until the next change would be too large; None if no change is small enough."""
    changed, parts = None, text.split(" ")
    while len(parts) > 1:
        at = draw.randrange(len(parts))
        parts[at : at + draw.randint(0, 1)] = [draw.choice(vocabulary)] * draw.randint(0, 1)
        candidate = " ".join(parts)
        if jaccard(text, candidate) < THRESHOLD:
            return changed
        changed = candidate if words(candidate) != words(text) else changed
    return changed


def planted(draw: random.Random, rows: int, copies: int) -> list[tuple[str, str, int]]:
    """(text, kind, number of the original), shuffled so that an original can come before or after its copy."""
    originals = list({" ".join(words(text)): text for text in _texts()}.values())
    draw.shuffle(originals)
    originals = originals[: rows - 2 * copies]
    vocabulary = [word for text in originals[:500] for word in text.split(" ") if word.strip()]
    made = [(text, "own", number) for number, text in enumerate(originals)]
    order = draw.sample(range(len(originals)), len(originals))
    made += [(originals[number], "exact", number) for number in order[:copies]]
    near = ((near_copy(originals[number], draw, vocabulary), number) for number in order[copies:])
    for text, number in near:
        if text is not None:
            made.append((text, "near", number))
        if len(made) == rows:
            break
    draw.shuffle(made)
    return made


def measure(rows: list[tuple[str, str, int]]) -> dict[str, Any]:
    """Recall of both kinds, the share of false findings, and the times."""
    index, shown = NearDuplicates(THRESHOLD), [text for text, _, _ in rows]
    begun = time.perf_counter()
    signatures = [index.signature(text) for text in shown]
    signed = time.perf_counter()
    found = {i: int(key) for i, signature in enumerate(signatures) if (key := index.add(str(i), signature)) is not None}
    added = time.perf_counter()
    members: dict[int, list[int]] = {}
    for i, (_, _, number) in enumerate(rows):
        members.setdefault(number, []).append(i)
    # The second of each pair is the one to find.
    hits, totals = Counter[str](), Counter[str]()
    for places in members.values():
        if len(places) == 2:
            kind = next(rows[i][1] for i in places if rows[i][1] != "own")
            totals[kind] += 1
            hits[kind] += places[1] in found
    false = sum(jaccard(shown[i], shown[earlier]) < THRESHOLD for i, earlier in found.items())
    second = {places[1] for places in members.values() if len(places) == 2}
    return {
        "rows": len(rows),
        "exact_planted": totals["exact"],
        "exact_found": hits["exact"],
        "near_planted": totals["near"],
        "near_found": hits["near"],
        "found": len(found),
        "found_unplanted": len(set(found) - second),
        "false": false,
        "microseconds_signature": 1e6 * (signed - begun) / len(rows),
        "microseconds_add": 1e6 * (added - signed) / len(rows),
    }


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    row = measure(planted(random.Random(SEED), ROWS, PLANTED))
    for name, value in row.items():
        print(f"{name:<24} {value:,.5g}")
    claims = [
        claim("exact_duplicate_recall", row["exact_found"] / row["exact_planted"], "share of planted exact copies"),
        claim(
            "near_duplicate_recall", row["near_found"] / row["near_planted"], "share of planted near copies (Jaccard 0.8 up)"
        ),
        claim("false_duplicate_rate", row["false"] / row["found"], "share of rows found"),
    ]
    report(options.json, *merged(options.json, claims, [{"part": "duplicates", **row}]))


if __name__ == "__main__":
    main()
