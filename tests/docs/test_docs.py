"""The documentation matches the code."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import yaml

from tunesmith.recipe import parse_recipe

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text(encoding="utf-8")


def test_generated_pages_are_current(generator: ModuleType) -> None:
    stale = [page for page, made in generator.PAGES.items() if (REPO / "docs" / page).read_text(encoding="utf-8") != made()]
    assert not stale, "run `make docs`"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_every_row_of_a_table_is_one_line() -> None:
    """A table row that spans two lines would render its rest as plain text, so each line must have all cells."""
    for page in (REPO / "docs").glob("*.md"):
        lines = page.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            assert not line.startswith("| ") or line.rstrip().endswith("|"), f"{page.name}:{number}"


def test_readme_recipes_are_valid() -> None:
    texts = blocks("yaml")
    assert len(texts) == 2
    for text in texts:
        assert len(text.splitlines()) <= 10
        assert parse_recipe(text, "README.md", Path("/")).recipe.method == yaml.safe_load(text)["method"]


def test_readme_commands_exist() -> None:
    from typer.testing import CliRunner

    from tunesmith.cli.commands import app

    commands = re.findall(r"^\.venv/bin/tunesmith (\w+) (.*?)(?:#.*)?$", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert commands
    for command, rest in commands:
        helped = CliRunner().invoke(app, [command, "--help"])
        assert helped.exit_code == 0
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in helped.output
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_readme_plan_is_what_the_command_prints(tmp_path: Path) -> None:
    """Byte for byte. `make docs` does not write it: copy the command's output."""
    (shown,) = blocks("text")
    command = [sys.executable, "-m", "tunesmith", "plan", "Qwen/Qwen2-7B", "--gpu", "RTX 4090"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    lines = [line.rstrip() for line in printed.strip("\n").split("\n")]
    assert "\n".join(lines).startswith(shown.rstrip())


def test_ci_calls_the_readme_test_command() -> None:
    assert (REPO / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test")


def test_links_lead_somewhere() -> None:
    for document in (
        *REPO.glob("*.md"),
        *(REPO / "docs").glob("*.md"),
    ):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


#: The exact Triton version that torch's GPU builds require (their wheels' metadata). CPU builds require none: a
#: pin that cannot be resolved on a GPU machine would show nowhere else.
TRITON_OF_TORCH = {"2.13.0": "3.7.1"}


def test_pins_have_a_solution_with_torch_for_gpus() -> None:
    pins = dict(re.findall(r"^(torch|triton)==(\S+)$", (REPO / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert f"torch=={pins['torch']}\n" in (REPO / "Makefile").read_text(encoding="utf-8")
    assert pins["triton"] == TRITON_OF_TORCH[pins["torch"]]


def test_the_layers_are_those_that_are_enforced() -> None:
    """docs/architecture.md draws the layers that pyproject.toml enforces on imports."""
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    enforced = [layer.replace("tunesmith.", "") for layer in contracts[0]["layers"]]
    drawn = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Layers\n")[2].partition("\n##")[0]
    assert [line.strip().split("  ")[0] for line in drawn.splitlines() if line.startswith("    ")] == enforced
