"""Hostile models, templates, recipes and data: refused with exit code 2, and none of their actions happens."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_row
from tests.promises.training import Promises
from tests.support.folders import HOSTILE
from tunesmith.cli.main import main

Make = Callable[[Path], str]  # writes the hostile input to a folder with `model` and `train.jsonl`, and returns a recipe

RECIPE = "model: ./model\nmethod: lora\ndata: {train: train.jsonl}\ntrain: {max_steps: 1}\n"


class Payload:
    """Writes the canary when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def canary(folder: Path) -> Path:
    return folder / "canary"


def pickled(folder: Path) -> bytes:
    return pickle.dumps(Payload(canary(folder)))


def zipped(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(folder))
    return content.getvalue()


def file_in_model(name: str, content: Callable[[Path], bytes]) -> Make:
    def make(folder: Path) -> str:
        (folder / "model" / name).write_bytes(content(folder))
        return RECIPE

    return make


def template(text: str) -> Make:
    def make(folder: Path) -> str:
        (folder / "t.jinja").write_text(text.replace("CANARY", str(canary(folder))), encoding="utf-8")
        return RECIPE.replace("train.jsonl}", "train.jsonl, chat_template: t.jinja}")

    return make


def recipe(text: str) -> Make:
    return lambda folder: text.replace("CANARY", str(canary(folder)))


def rows(name: str, content: Callable[[], bytes], more: str = "") -> Make:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content())
        return RECIPE.replace("train.jsonl}", f"{name}{more}}}")

    return make


def bomb() -> bytes:
    """A line of 200 MiB in a small file."""
    return gzip.compress(b'{"messages": "' + b"a" * (200 << 20) + b'"}\n', compresslevel=1)


BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
GLOBALS = "cycler.__init__.__globals__.os.system('touch CANARY')"
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
INPUTS: dict[str, Make] = {
    "pickle as model.safetensors": file_in_model("model.safetensors", pickled),
    "pickle as notes.txt": file_in_model("notes.txt", pickled),
    "pickle as a vocabulary": file_in_model("vocab.model", pickled),
    "archive of torch.save as weights.data": file_in_model("weights.data", zipped),
    "archive of torch.save as training_args": file_in_model("training_args", zipped),
    "a template that leaves its sandbox": template("{{ " + GLOBALS + " }}" + BODY),
    "a template that asks for all classes": template("{{ ''.__class__.__mro__[1].__subclasses__() }}" + BODY),
    "a template that leaves it by a filter": template("{{ (''|attr('__class__')|attr('__mro__')|last).mro() }}" + BODY),
    "a template that never ends": template(NESTED + BODY),
    "a template that calls itself": template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + BODY),
    "a template that is none": template("{% for m in messages %}"),
    "a column that leaves its sandbox": recipe(
        RECIPE.replace("train.jsonl}", 'train.jsonl, columns: {prompt: "{{ ' + GLOBALS + ' }}", completion: id}}')
    ),
    "a column that never ends": recipe(RECIPE.replace("train.jsonl}", 'train.jsonl, columns: {prompt: "' + NESTED + '"}}')),
    "a YAML tag that calls": recipe(RECIPE + "seed: !!python/object/apply:os.system ['touch CANARY']\n"),
    "a YAML tag that imports": recipe(RECIPE + "seed: !!python/name:os.system\n"),
    "YAML that doubles itself": recipe(
        "a: &a [x, x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(24))
    ),
    "YAML nested too deeply": recipe("seed: " + "[" * 3000),
    "an export name that climbs": recipe(RECIPE + "export: {name: ../../canary}\n"),
    "an export name that is absolute": recipe(RECIPE + "export: {name: CANARY}\n"),
    "a model name that climbs": recipe(RECIPE.replace("./model", "../../../etc")),
    "a device as data": recipe(RECIPE.replace("train.jsonl", "/dev/zero")),
    "a compressed line that fits in no memory": rows("bomb.jsonl.gz", bomb),
    "JSON nested too deeply": rows("deep.jsonl", lambda: b'{"messages": ' + b"[" * 100_000 + b"\n"),
    "terminal codes in a role": rows(
        "codes.jsonl", lambda: json.dumps({"messages": [{"role": "\x1b]0;owned\x07", "content": "x"}]}).encode()
    ),
    "terminal codes in a file's name": recipe(RECIPE.replace("train.jsonl", '"\\e[2Jtrain.jsonl"')),
}


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A new folder by name, with a sound model and sound rows."""

    def make(name: str) -> Path:
        folder = tmp_path / "".join(letter if letter.isalnum() else "-" for letter in name)
        shutil.copytree(tiny_model, folder / "model")
        lines = [json.dumps(chat_row(f"Say {number}", f"so it is {number}")) for number in range(12)]
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        monkeypatch.chdir(folder)
        return folder

    return make


def refused(folder: Path, text: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The error of `tunesmith prepare` for the recipe, which it must refuse without leaving anything behind."""
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tunesmith", "prepare", "recipe.yaml", "--run", "run"])
    with pytest.raises(SystemExit) as left:
        main()
    out = capsys.readouterr()
    assert left.value.code == 2, (name, out)
    assert not canary(folder).exists()
    assert not (folder / "run" / "data").exists()
    assert "Traceback" not in out.err + out.out
    assert "\x1b]" not in out.err + out.out
    assert "\x1b[2J" not in out.err + out.out
    return out.err


def models() -> Iterator[tuple[str, Make]]:
    """The folders of test_safe, each as the model of a recipe."""
    for name, (_, spoil) in HOSTILE.items():

        def make(folder: Path, spoil: Callable[[Path], Any] = spoil) -> str:
            spoil(folder / "model")
            return RECIPE

        yield f"model: {name}", make


ALL = INPUTS | dict(models())


@pytest.fixture(scope="module")
def told(promises: Promises) -> Iterator[dict[str, str]]:
    """The errors of the inputs that were tried, by their names; counted at the end."""
    found: dict[str, str] = {}
    yield found
    refusals = sum("error TS" in text for text in found.values())
    promises.state("hostile inputs", "count", hostile_inputs_tried=len(found), hostile_inputs_refused=refusals)


# Each hostile model is also tried by tests/unit/test_safe.py, without the command line.
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("model: ")) for name in ALL])
def test_it_is_refused_and_does_not_what_it_wants(
    name: str, place: Callable[[str], Path], told: dict[str, str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place(name)
    told[name] = ""
    told[name] = refused(folder, ALL[name](folder), name, capsys, monkeypatch)
    assert "error TS" in told[name]


def test_a_sound_recipe_is_not_refused(
    place: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place("sound")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tunesmith", "prepare", "recipe.yaml", "--run", "run"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0, capsys.readouterr()


def test_a_payload_would_work(tmp_path: Path) -> None:
    """The refused payload is really dangerous."""
    pickle.loads(pickled(tmp_path))  # noqa: S301 - our own
    assert canary(tmp_path).exists()


def test_a_hostile_model_is_refused_before_any_library_sees_it(place: Callable[[str], Path]) -> None:
    folder = place("early")
    INPUTS["pickle as notes.txt"](folder)
    code = "import sys\nfrom tunesmith.errors import ModelError\nfrom tunesmith.models.load import locate\n"
    code += "try:\n    locate('./model')\nexcept ModelError:\n    pass\nelse:\n    sys.exit('not refused')\n"
    code += "sys.exit(', '.join(name for name in ('torch', 'transformers', 'safetensors', 'peft') if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
