"""All stages through the real command line, on the tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import chat_row
from tests.support.calibration import calibrated
from tests.support.commands import Inside, check_readable, tunesmith, write
from tests.support.training import METHODS
from tunesmith.hardware import detect

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("methods", [("full", "lora"), pytest.param(METHODS, marks=pytest.mark.slow)], ids="+".join)
def test_methods_and_their_comparison(
    methods: Sequence[str], task: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two in the tests' process, and all three in processes of their own."""
    folder, called = task.parent, tunesmith if methods == METHODS else inside
    calibration = folder / "calibration.json"  # of all three: of a machine that is not calibrated yet
    if methods != METHODS:
        calibrated(calibration)
    monkeypatch.setenv("TUNESMITH_CALIBRATION", str(calibration))
    done = called("run", task, "--run", "out", "--methods", ",".join(methods), cwd=folder)
    assert done.returncode == 0, done.stderr
    table = json.loads((folder / "out" / "compare" / "compare.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in table["rows"]] == ["base", *methods]
    wanted = {"method", "trainable_parameters", "peak_memory_bytes", "seconds_per_step", "tokens_per_second"}
    for row in table["rows"]:
        assert wanted | {"eval_loss", "task_score", "effectiveness"} <= row.keys()
        assert (row["trainable_parameters"] is None) == (row["model"] == "base")
        assert row["eval_loss"] > 0
    for method in methods:
        run = folder / "out" / method
        ledger = json.loads((run / "data" / "ledger.json").read_text(encoding="utf-8"))
        assert (
            ledger["rows_in"]
            == ledger["rows_train"] + ledger["rows_heldout"] + ledger["rows_unused"] + ledger["rows_rejected"]
            == 33
        )
        assert ledger["reasons"] == {"duplicate": 1}
        events = [json.loads(line) for line in (run / "data" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [(event["code"], event["count"]) for event in events] == [("rows-rejected", 1), ("few-rows", 29)]
        status = json.loads((run / "run.json").read_text(encoding="utf-8"))
        assert {entry["status"] for entry in status["stages"].values()} == {"done"}
        assert len((run / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3
        promise = json.loads((run / "plan" / "plan.json").read_text(encoding="utf-8"))
        assert [entry["method"] for entry in promise["methods"]] == [method]
        assert promise["methods"][0]["time_measurements"] == 1  # the machine was calibrated first
        score = json.loads((run / "score" / "score.json").read_text(encoding="utf-8"))
        summary = json.loads((run / "train" / "summary.json").read_text(encoding="utf-8"))
        for key in ("peak_memory_bytes", "seconds_per_step"):
            assert score[key]["promised"] == promise["methods"][0][key]
            assert score[key]["measured"] == summary[key]
            assert score[key]["error_percent"] == pytest.approx(100 * (score[key]["promised"] / summary[key] - 1))
    page = (folder / "out" / "compare" / "report.html").read_text(encoding="utf-8")
    assert "What the plan promised" in page
    assert page.count("<svg") == 4
    assert "mathdefault" not in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|<script""", page)
    for line in done.stdout.splitlines():
        assert len(line) <= 80 or line.startswith("report:")

    again = called("run", task, "--run", "out", "--methods", ",".join(methods), cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "tok/s" not in again.stderr  # training did not run again
    assert "answers" not in again.stderr  # nor did evaluation
    assert "calibrate" not in again.stderr


def test_stages_one_by_one(task: Path, inside: Inside) -> None:
    folder = task.parent
    done = tunesmith("prepare", task, "--run", "out", "--set", "method=lora", cwd=folder)
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.strip())
    assert "33 rows in = 29 train + 3 held out + 1 rejected (1 duplicate)" in done.stderr.replace("\n", " ")
    samples = (folder / run / "data" / "samples.txt").read_text(encoding="utf-8")
    assert '⟦{"colour": "' in samples
    early = inside("evaluate", run, cwd=folder)
    assert early.returncode == 2
    assert "TS011" in early.stderr
    for stage in (
        ("train", run),
        ("export", run),
        ("evaluate", run),
        ("evaluate", run, "--base"),
        ("compare", run, "--out", "c"),
    ):
        done = inside(*stage, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert (folder / "c" / "report.html").is_file()


GOOD = json.dumps(chat_row("q", "a"))

#: name: (train file's name, its text, expected code, expected location)
BAD_DATA = {
    "malformed JSON": ("d.jsonl", GOOD + '\n{"messages": [}\n', "TS102", "d.jsonl:2:15"),
    "malformed array": ("d.json", '[{"a": 1},\n{"b" 2}]', "TS102", "d.json:2:6"),
    "wrong columns": ("d.jsonl", GOOD + '\n{"text": "x"}\n', "TS104", "d.jsonl:2"),
    "an empty file": ("d.jsonl", "", "TS103", "d.jsonl"),
    "an empty array": ("d.json", "[]", "TS103", "d.json"),
    "an unknown role": (
        "d.jsonl",
        GOOD + "\n" + json.dumps({"messages": [{"role": "gpt", "content": "x"}]}),
        "TS105",
        "d.jsonl:2 turn 1",
    ),
    "an empty answer": ("d.jsonl", GOOD + "\n" + json.dumps(chat_row("q", "  ")), "TS106", "d.jsonl:2 turn 3"),
    "no assistant": ("d.jsonl", json.dumps({"messages": [{"role": "user", "content": "x"}]}), "TS107", "d.jsonl:1"),
    "a missing file": ("other.jsonl", GOOD, "TS101", "d.jsonl"),
    "an unknown kind": ("d.txt", GOOD, "TS101", "d.txt"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_ends_in_one_readable_error(tmp_path: Path, tiny_model: Path, inside: Inside, name: str) -> None:
    file, text, code, where = BAD_DATA[name]
    write(tmp_path / file, text)
    given_name = "d.jsonl" if file == "other.jsonl" else file
    recipe = write(tmp_path / "r.yaml", f"model: {tiny_model}\ndata: {{train: {given_name}}}\n")
    done = (tunesmith if name == "malformed JSON" else inside)("run", recipe, "--run", "out", cwd=tmp_path)
    check_readable(done, code, where)
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left - {".lock"} == {"recipe.yaml", "run.json"}  # no data, not even partial


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ("model: ./nowhere\ndata: {train: d.jsonl}\n", "TS201", "nowhere"),
        ("model: {tiny}\ndata: {train: d.jsonl}\ntrian: {}\n", "TS002", "trian"),
        ("model: {tiny}\ndata: {train: d.jsonl}\nmethod: dora\n", "TS003", "method"),
        ("model: {tiny}\n", "TS004", "data"),
        ("model: [\n", "TS001", "r.yaml:2"),
    ],
)
def test_bad_recipe_ends_in_one_readable_error(
    tmp_path: Path, tiny_model: Path, inside: Inside, text: str, code: str, where: str
) -> None:
    write(tmp_path / "d.jsonl", GOOD)
    recipe = write(tmp_path / "r.yaml", text.replace("{tiny}", str(tiny_model)))
    check_readable(inside("prepare", recipe, "--run", "out", cwd=tmp_path), code, where)
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.parametrize(
    ("settings", "code", "told"),
    [
        (["train.use_liger_kernel=true"], "TS007", "use_liger_kernel without a GPU"),
        (["objective=reward", "method=qlora"], "TS402", "cannot be merged"),
        (["objective=grpo", "grpo.reward_funcs=[valid-json]", "train.effective_batch_size=12"], "TS006", "groups of 8"),
        (["train.early_stopping_patience=2"], "TS006", "without eval_steps"),
    ],
)
@pytest.mark.parametrize("methods", [(), ("--methods", "qlora,lora")])
def test_what_would_end_a_run_hours_later_is_told_before_it_begins(
    tmp_path: Path, tiny_model: Path, inside: Inside, settings: list[str], code: str, told: str, methods: tuple[str, ...]
) -> None:
    if detect().device != "cpu":
        pytest.skip("this machine has a GPU")
    write(tmp_path / "d.jsonl", GOOD)
    recipe = write(tmp_path / "r.yaml", f"model: {tiny_model}\ndata: {{train: d.jsonl}}\n")
    given = [part for setting in settings for part in ("--set", setting)]
    check_readable(inside("run", recipe, "--run", "out", *given, *methods, cwd=tmp_path), code, told)
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path, tiny_model: Path, inside: Inside) -> None:
    rows = [GOOD, "{", json.dumps({"text": "x"}), json.dumps(chat_row("q", "")), json.dumps(chat_row("other", "answer"))]
    write(tmp_path / "d.jsonl", "\n".join(rows))
    recipe = write(tmp_path / "r.yaml", f"model: {tiny_model}\ndata: {{train: d.jsonl, on_bad_row: reject}}\n")
    done = inside("prepare", recipe, "--run", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ledger = json.loads((tmp_path / "out" / "data" / "ledger.json").read_text(encoding="utf-8"))
    assert (ledger["rows_in"], ledger["rows_rejected"]) == (5, 3)
    assert ledger["reasons"] == {"empty-answer": 1, "malformed-json": 1, "wrong-columns": 1}


def test_many_rows_with_one_problem_are_one_error(tmp_path: Path, tiny_model: Path, inside: Inside) -> None:
    write(tmp_path / "d.jsonl", '{"question": "x"}\n' * 500 + "{\n")
    recipe = write(tmp_path / "r.yaml", f"model: {tiny_model}\ndata: {{train: d.jsonl}}\n")
    done = inside("prepare", recipe, "--run", "out", cwd=tmp_path)
    check_readable(done, "TS104", "d.jsonl:1 and 499 more rows")
    assert done.stderr.count("error TS") == 2
    assert "d.jsonl:501" in done.stderr


def test_run_folder_that_is_something_else_is_not_touched(tmp_path: Path, tiny_model: Path) -> None:
    write(tmp_path / "d.jsonl", GOOD)
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "notes.txt", "keep")
    recipe = write(tmp_path / "r.yaml", f"model: {tiny_model}\ndata: {{train: d.jsonl}}\n")
    check_readable(tunesmith("prepare", recipe, "--run", "mine", cwd=tmp_path), "TS010", "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("arguments", [(), ("--help",), ("run", "--help"), ("demo", "--help"), ("--version",)])
def test_help_starts_without_torch(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom tunesmith.cli.main import main\nsys.argv[0] = 'tunesmith'\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'sklearn', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "unesmith" in done.stdout + done.stderr


def test_package_has_the_stages_as_functions() -> None:
    import tunesmith

    for name in tunesmith.__all__:
        assert callable(getattr(tunesmith, name))
    with pytest.raises(AttributeError):
        _ = tunesmith.no_such_stage


def test_terminal_escapes_in_data_are_not_printed(tmp_path: Path, tiny_model: Path) -> None:
    write(tmp_path / "d.jsonl", json.dumps({"\x1b]0;owned\x07": 1}))
    recipe = write(tmp_path / "r.yaml", f"model: {tiny_model}\ndata: {{train: d.jsonl}}\n")
    done = tunesmith("prepare", recipe, "--run", "out", cwd=tmp_path)
    check_readable(done, "TS104", "d.jsonl:1")
    assert "\x1b]" not in done.stderr
    assert "\x07" not in done.stderr
