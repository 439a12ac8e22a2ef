"""10,000 hostile rows from Hypothesis through every named template: no row may be lost, and none may forge a turn.

Random bytes, halves of surrogate pairs, deep and wrong JSON, huge texts, spelled-out control tokens. A lost row is neither
encoded nor rejected with a reason. A forged turn is a row whose number of control ids differs from that of the same turns
with harmless texts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' strategies

from common import claim, merged, parser, report
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tests.hostile import HOSTILE, forged_turns

from tunesmith.chat.named import named_template
from tunesmith.io.rows import Row
from tunesmith.models.load import locate
from tunesmith.recipe import NAMED_TEMPLATES, DataSection
from tunesmith.runs.decisions import Decisions
from tunesmith.stages.prepare.work import Settings, Worker

ROWS = 10  # per example


def main() -> None:
    asked = parser(__doc__ or "")
    asked.add_argument("--rows", type=int, default=10_000, help="rows to try")
    options = asked.parse_args()
    data, folder = DataSection(train="rows.jsonl"), locate("smollm2-135m-instruct")
    workers = [
        Worker(Settings(data, "conversation", folder, named_template(name), frozenset(), Decisions()))
        for name in NAMED_TEMPLATES
    ]
    counts = dict.fromkeys(("tried", "encoded", "rejected", "lost", "forged"), 0)

    @seed(42)
    @settings(
        max_examples=options.rows // ROWS,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(HOSTILE, min_size=ROWS, max_size=ROWS), st.sampled_from(workers))
    def attempt(rows: list[dict[str, object]], worker: Worker) -> None:
        chunk = worker([(0, Row(f"row:{number}", row)) for number, row in enumerate(rows, start=1)])
        rejected = len(chunk.problems) + len(chunk.rejections)
        counts["tried"] += len(rows)
        counts["encoded"] += len(chunk.made)
        counts["rejected"] += rejected
        counts["lost"] += len(rows) + chunk.rows_added - len(chunk.made) - rejected
        counts["forged"] += forged_turns(worker, chunk)

    attempt()
    claims = [
        claim("hostile_rows_tried", counts["tried"], "rows"),
        claim("hostile_rows_lost", counts["lost"], "rows"),
        claim("forged_turns", counts["forged"], "rows"),
    ]
    row = {"part": "hostile", "templates": list(NAMED_TEMPLATES), **counts}
    report(options.json, *merged(options.json, claims, [row]))


if __name__ == "__main__":
    main()
