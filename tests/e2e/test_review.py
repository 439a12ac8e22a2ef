"""The review: shown, decided, interrupted and resumed, signed, and its effect on training and the next preparation."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.errors import DataError, RunError
from tunesmith.runs import create_run
from tunesmith.runs.decisions import Decisions, draw_sample, read_decisions, require_signoff, row_digest
from tunesmith.stages.prepare import prepare
from tunesmith.stages.review import Review
from tunesmith.stages.review.terminal import review
from tunesmith.stages.train import train


@pytest.fixture
def run(make_recipe: Callable[..., Any], tmp_path: Path) -> Any:
    made = create_run(make_recipe(data__require_review=True, data__review=str(tmp_path / "review.jsonl")), tmp_path / "run")
    prepare(made)
    return made


def typed(session: Review, keys: str, by: str = "ann") -> tuple[Any, str]:
    out = io.StringIO()
    signed = review(session, by, Console(file=out, width=100), io.StringIO(keys))
    return signed, out.getvalue()


def test_training_waits_for_the_sign_off(run: Any) -> None:
    with pytest.raises(RunError, match="nobody has signed off"):
        train(run)
    assert not (run.path / "train").exists()
    signed, shown = typed(Review(run), "a" * 36)
    assert signed == json.loads((run.path / "review" / "signoff.json").read_text(encoding="utf-8"))
    assert (signed["by"], signed["accepted"], signed["rejected"], signed["rows"]) == ("ann", 36, 0, 36)
    assert "\u27e6" in shown
    assert '"colour"' in shown.partition("\u27e6")[2].partition("\u27e7")[0]
    require_signoff(run)
    (run.path / "review" / "signoff.json").write_text(json.dumps({**signed, "data": "0" * 64}), encoding="utf-8")
    with pytest.raises(RunError, match="has changed since"):
        require_signoff(run)


def test_a_review_is_left_and_taken_up_again(run: Any) -> None:
    first = Review(run)
    assert typed(first, "arrb x a q")[0] is None
    again = Review(run)
    verdicts = [again.decisions[where]["verdict"] for where in first.places[:3]]
    assert verdicts == ["accept", "reject", "accept"]
    assert again.open_places() == first.places[3:]
    with pytest.raises(RunError, match="33 rows are undecided"):
        again.sign("ann")
    assert typed(again, "a" * 10)[0] is None, "the end of the input is no sign-off"


def test_rejections_and_edits_reach_the_review_file_and_block_training(run: Any, tmp_path: Path) -> None:
    session = Review(run)
    new = {"messages": [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "red"}]}
    signed, shown = typed(session, "r" + "e not json\n" + f"e {json.dumps(new)}\n" + "a" * 34)
    assert "nothing was changed" in shown
    assert (signed["accepted"], signed["rejected"], signed["edited"]) == (34, 1, 1)
    with pytest.raises(RunError, match="1 rejected and 1 edited"):
        require_signoff(run)
    decisions = read_decisions(tmp_path / "review.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").split("\n") if line]
    at = [int(where.rpartition(":")[2]) - 1 for where in session.places]
    assert decisions.apply(rows[at[0]]) is None
    assert decisions.apply(rows[at[1]]) == new
    assert decisions.apply(rows[at[2]]) == rows[at[2]]
    assert decisions.apply({**rows[at[0]], "more": 1}) is not None, "a changed row is another row"
    assert len(decisions.by_row) == 36
    # After another preparation, only rows without a decision are shown.
    (run.path / "review" / "session.json").unlink()
    assert Review(run).open_places() == session.places[:2]


def test_a_changed_source_is_refused(run: Any, tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as handle:
        handle.write("\n")
    with pytest.raises(RunError, match="no longer where"):
        Review(run)


def test_the_sample_is_seeded_stratified_and_stable() -> None:
    rows = {f"{source}:{i}": ["rare"] if i == 7 else ["common"] if i % 3 == 0 else [] for source in "ab" for i in range(500)}
    sample = draw_sample(rows, 200, 1)
    assert len(sample) == 200 == len(set(sample))
    assert {"a:7", "b:7"} <= set(sample)
    assert sum(where.startswith("a") for where in sample) == 100
    assert sample == draw_sample(rows, 200, 1) != draw_sample(rows, 200, 2)
    fewer = {where: rules for where, rules in rows.items() if where not in sample[:5]}
    assert len(set(draw_sample(fewer, 200, 1)) - set(sample)) == 5
    assert draw_sample(fewer, 2000, 1) == list(fewer)


def test_a_damaged_review_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "review.jsonl"
    for line in ("{", "[]", '{"row": "a"}', '{"row": "a", "verdict": "edit"}'):
        path.write_text('{"row": "b", "verdict": "reject"}\n' + line + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"review\.jsonl:2"):
            read_decisions(path)
    assert read_decisions(tmp_path / "none.jsonl") == Decisions()
    assert Decisions({"a": {"verdict": "accept"}}).digest == Decisions().digest
    assert row_digest({"a": "\ud800", "b": 1}) == row_digest({"b": 1, "a": "\ud800"})
