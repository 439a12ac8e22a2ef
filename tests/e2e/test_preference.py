"""DPO through the real command line, on the tiny model and on real rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_row
from tests.support.commands import Inside, check_readable, write
from tests.support.pairs import PAIRS
from tests.support.prepared import read_arrow
from tunesmith.runs import read_jsonl

BAD = {
    "same": {"prompt": "a?", "chosen": "x", "rejected": "x"},
    "empty": {"prompt": "c?", "chosen": "", "rejected": "x"},
    "prompts": {"chosen": chat_row("d?", "x")["messages"], "rejected": chat_row("e?", "y")["messages"]},
    "one side": {"prompt": "f?", "chosen": "x"},
    "none": chat_row("g?", "x"),
    "long": {"prompt": "h?", "chosen": "x", "rejected": "far too much " * 200},
    "again": PAIRS[0],
}


def recipe_text(model: Path, rows: str, more: str = "") -> str:
    return f"""\
model: {model}
objective: dpo
data: {{train: {rows}, heldout: 0.1, max_length: 256{more}}}
train: {{max_steps: 3, effective_batch_size: 8, compute_dtype: float32}}
evaluate: {{task: text, max_new_tokens: 4}}
"""


def test_every_stage_runs(tmp_path: Path, tiny_model: Path, inside: Inside) -> None:
    lines = [json.dumps(row) + "\n" for row in PAIRS]
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress("".join(lines[:36]).encode()))
    write(tmp_path / "test.jsonl", "".join([*lines[36:], json.dumps(chat_row("plain?", "yes")) + "\n"]))
    recipe = write(tmp_path / "r.yaml", recipe_text(tiny_model, "pairs.jsonl.gz", ", test: test.jsonl"))
    done = inside("run", recipe, "--run", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out"
    status = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert {entry["status"] for entry in status["stages"].values()} == {"done"}
    metrics = read_jsonl(run / "train" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert all(0 <= line["reward_accuracy"] <= 1 for line in metrics)
    plan = json.loads((run / "plan" / "plan.json").read_text(encoding="utf-8"))
    assert plan["data"]["sequences_per_row"] == 2
    assert plan["methods"][0]["seconds_before_first_step"] > 0
    score = json.loads((run / "score" / "score.json").read_text(encoding="utf-8"))
    summary = json.loads((run / "train" / "summary.json").read_text(encoding="utf-8"))
    assert score["hours"]["measured"] == summary["seconds"] / 3600
    (results,) = run.glob("eval/*/task/results.json")
    found = json.loads(results.read_text(encoding="utf-8"))
    assert (found["rows"], found["eval_loss"] > 0) == (5, True)
    references = [row["messages"][-1]["content"] for row in read_jsonl(run / "data" / "test.jsonl")]
    assert references == [row["chosen"] for row in PAIRS[36:]] + ["yes"]


def test_what_is_written_of_a_pair(tmp_path: Path, tiny_model: Path, tokenizer: Any, inside: Inside) -> None:
    write(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in PAIRS))
    recipe = write(tmp_path / "r.yaml", recipe_text(tiny_model, "pairs.jsonl"))
    assert inside("prepare", recipe, "--run", "out", cwd=tmp_path).returncode == 0
    train, heldout = (read_arrow(tmp_path / "out" / "data" / f"{name}.arrow") for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (36, 4)
    for row in [*train, *heldout]:
        asked = PAIRS[int(row["where"].rpartition(":")[2]) - 1]
        for prefix, answer in (("", asked["chosen"]), ("rejected_", asked["rejected"])):
            ids, flags = row[f"{prefix}input_ids"], row[f"{prefix}loss_mask"]
            assert len(ids) == len(flags) == row[f"{prefix}length"]
            marked = [token for token, flag in zip(ids, flags, strict=True) if flag]
            assert tokenizer.decode(marked) == f"{answer}<|im_end|>"
            assert asked["prompt"] in tokenizer.decode(ids[: flags.index(True)])
    ledger = json.loads((tmp_path / "out" / "data" / "ledger.json").read_text(encoding="utf-8"))
    assert ledger["tokens_train"] == sum(row["length"] + row["rejected_length"] for row in train)
    assert ledger["tokens_trained_on"] == sum(sum(row["loss_mask"]) + sum(row["rejected_loss_mask"]) for row in train)
    assert "pairs.jsonl:1 rejected" in (tmp_path / "out" / "data" / "samples.txt").read_text(encoding="utf-8")


def test_bad_pairs_are_counted(tmp_path: Path, tiny_model: Path, inside: Inside) -> None:
    rows = [*PAIRS[:10], *BAD.values()]
    write(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    recipe = write(tmp_path / "r.yaml", recipe_text(tiny_model, "pairs.jsonl", ", on_bad_row: reject"))
    done = inside("prepare", recipe, "--run", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ledger = json.loads((tmp_path / "out" / "data" / "ledger.json").read_text(encoding="utf-8"))
    assert (ledger["rows_in"], ledger["rows_train"], ledger["rows_heldout"], ledger["rows_rejected"]) == (17, 9, 1, 7)
    assert ledger["reasons"] == {
        "different-prompts": 1,
        "duplicate": 1,
        "empty-answer": 1,
        "equal-answers": 1,
        "missing-side": 1,
        "too-long": 1,
        "wrong-objective": 1,
    }


def test_answers_that_the_template_makes_equal_are_no_pair(tmp_path: Path, tiny_model: Path, inside: Inside) -> None:
    write(tmp_path / "t.jinja", "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content | trim }}<|im_end|>{% endfor %}")
    write(tmp_path / "pairs.jsonl", json.dumps({"prompt": "b?", "chosen": "x", "rejected": "x\n"}) + "\n")
    recipe = write(tmp_path / "r.yaml", recipe_text(tiny_model, "pairs.jsonl", ", chat_template: t.jinja"))
    check_readable(inside("prepare", recipe, "--run", "out", cwd=tmp_path), "TS111", "pairs.jsonl:1")


def test_all_bad_pairs_are_told_at_once(tmp_path: Path, tiny_model: Path, inside: Inside) -> None:
    write(tmp_path / "pairs.jsonl", "".join(json.dumps(BAD[name]) + "\n" for name in ("same", "one side", "none")))
    recipe = write(tmp_path / "r.yaml", recipe_text(tiny_model, "pairs.jsonl"))
    done = inside("prepare", recipe, "--run", "out", cwd=tmp_path)
    for code, line in (("TS111", 1), ("TS110", 2), ("TS113", 3)):
        check_readable(done, code, f"pairs.jsonl:{line}")


def test_preference_rows_under_sft_are_refused(tmp_path: Path, tiny_model: Path, inside: Inside) -> None:
    write(tmp_path / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in PAIRS))
    recipe = write(tmp_path / "r.yaml", f"model: {tiny_model}\ndata: {{train: pairs.jsonl}}\n")
    check_readable(inside("prepare", recipe, "--run", "out", cwd=tmp_path), "TS113", "pairs.jsonl:1 and 39 more rows")


@pytest.mark.parametrize(
    ("file", "rows"),
    [("alpaca_demo/dpo_en_demo.json", 300), pytest.param("hh_rlhf/test.jsonl.gz", 2312, marks=pytest.mark.slow)],
)
def test_real_rows_add_up(tmp_path: Path, tiny_model: Path, shared_data: Path, file: str, rows: int, inside: Inside) -> None:
    recipe = write(tmp_path / "r.yaml", recipe_text(tiny_model, str(shared_data / file), ", on_bad_row: reject"))
    done = inside("prepare", recipe, "--run", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ledger = json.loads((tmp_path / "out" / "data" / "ledger.json").read_text(encoding="utf-8"))
    assert (
        ledger["rows_in"]
        == rows
        == ledger["rows_train"] + ledger["rows_heldout"] + ledger["rows_unused"] + ledger["rows_rejected"]
    )
    assert ledger["rows_train"] > 0
