"""`tunesmith plan` and `method: auto` through the real command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Inside


def test_plan_of_a_catalogued_model(tmp_path: Path, inside: Inside) -> None:
    done = inside("plan", "Qwen/Qwen2-7B", "--gpu", "24GB", "--rows", "20000", "--out", "plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recommended: lora" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    folder = tmp_path / "plan"
    assert {path.name for path in folder.iterdir()} == {".tunesmith", "plan.json", "frontier.svg", "recipe.yaml"}
    assert "method: lora  # plan" in (folder / "recipe.yaml").read_text(encoding="utf-8")
    # The written recipe can be planned again once there are rows.
    (folder / "train.jsonl").write_text(json.dumps({"instruction": "Say yes.", "output": "yes"}) + "\n", encoding="utf-8")
    again = inside("plan", folder / "recipe.yaml", "--gpu", "24GB", "--data", folder / "train.jsonl", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_json_is_all_that_is_printed(tmp_path: Path, inside: Inside) -> None:
    done = inside("plan", "qwen2-7b", "--gpu", "H100", "--json", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "here" / "plan.json").read_text(encoding="utf-8"))


def test_no_torch_and_not_long_for_405_b(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['tunesmith', 'plan', 'meta-llama/Llama-3.1-405B', '--gpu', '8xH100']\n"
        "from tunesmith.cli import main\n"
        "try: main.main()\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    took = time.perf_counter() - begun
    assert done.stdout.splitlines()[-2:] == ["code 2", "False False"]
    assert "TS704" in done.stderr
    assert "8 of the 8 H100 together" in done.stderr
    assert took < 8  # about 1.3 s on an idle machine


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("Qwen/Qwen2-7B", "--gpu", "RTX 9090"), "TS701"),
        (("Qwen/Qwen2-7B", "--gpu", "-24GB"), "TS701"),
        (("no-such-model", "--gpu", "24GB"), "TS206"),
        (("./nowhere", "--gpu", "24GB"), "TS201"),
        (("Qwen/Qwen2-7B", "--gpu", "24GB", "--budget", "cheap"), "TS703"),
        (("Qwen/Qwen2-7B", "--gpu", "24GB", "--deadline", "soon"), "TS703"),
        (("Qwen/Qwen2-7B", "--gpu", "24GB", "--rows", "-1"), "TS703"),
        (("Qwen/Qwen2-7B", "--gpu", "24GB", "--data", "none.jsonl"), "TS101"),
        (("Qwen/Qwen2-7B", "--gpu", "24GB", "--methods", "lora,best"), "TS020"),
        (("Qwen/Qwen2-7B", "--gpu", "24GB", "--gpus", "none.toml"), "TS702"),
        (("Qwen/Qwen2-7B", "--gpu", "24GB", "--calibrate"), "TS703"),
    ],
)
def test_bad_input_is_one_readable_error(tmp_path: Path, arguments: tuple[str, ...], code: str, inside: Inside) -> None:
    done = inside("plan", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert f"error {code}" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_trace_agrees_with_the_closed_form(tmp_path: Path, tiny_model: Path, inside: Inside) -> None:
    done = inside("plan", tiny_model, "--gpu", "24GB", "--length", "16", "--trace", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "closed form" in line)
    error = float(line.rpartition("(")[2].rpartition(" %")[0])
    assert 0 <= error < 3  # rounding to blocks is visible for a 1 MB model
    assert "TFLOP per step: mm" in done.stdout


def test_auto_takes_what_the_plan_recommends_and_calibration_is_used(
    task: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = task.parent
    monkeypatch.setenv("TUNESMITH_CALIBRATION", str(folder / "calibration.json"))
    text = task.read_text(encoding="utf-8")
    task.write_text(text.replace("data: {", "method: auto\ndata: {"), encoding="utf-8")
    done = inside("plan", task, "--calibrate", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    planned: dict[str, Any] = json.loads(done.stdout)
    assert [entry["time_measurements"] > 0 for entry in planned["methods"]] == [True] * 3
    assert planned["recommended"] == "lora"
    done = inside("run", task, "--run", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "method lora: LoRA is expected to reach" in done.stderr
    recipe = (folder / "out" / "recipe.yaml").read_text(encoding="utf-8")
    assert "method: lora  # plan" in recipe
    assert "the plan was off by" in " ".join(done.stderr.split())
    assert (folder / "out" / "score" / "score.json").is_file()
