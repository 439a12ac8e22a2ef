"""What the source must not contain: anything that runs foreign input as code, except at the guarded borders."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith

ROOT = Path(tunesmith.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "np.load",
    "numpy.load",
    "pd.read_pickle",
}
#: Names that start a process, and the modules that may use them, with arguments they build themselves and no shell.
PROCESSES = {"subprocess.run", "subprocess.Popen", "subprocess.check_output", "subprocess.call", "os.execv", "os.execvp"}
MAY_START = {
    "pipeline.py",
    "kernels/cpu/library.py",
    "models/builtin.py",
    "models/trial.py",
    "hardware/catalogue.py",
    "stages/review/terminal.py",
}
#: Arguments that only the border with foreign models may pass, and their required values there.
BORDER = {"trust_remote_code": False, "use_safetensors": True}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression, or nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def findings(tree: ast.AST, name: str) -> Iterator[str]:
    """A module's forbidden actions, with line numbers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{name}:{node.lineno} imports {each}" for each in names if each.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in CALLS:
                yield f"{name}:{node.lineno} calls {called}"
            if called in PROCESSES and name not in MAY_START:
                yield f"{name}:{node.lineno} starts a process"
            for keyword in node.keywords:
                yield from _keyword(keyword, name)


def _keyword(keyword: ast.keyword, name: str) -> Iterator[str]:
    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
    if keyword.arg == "shell" and value is not False:
        yield f"{name}:{keyword.value.lineno} names shell"
    if keyword.arg in BORDER and (name != "models/load.py" or value is not BORDER[keyword.arg]):
        yield f"{name}:{keyword.value.lineno} gives {keyword.arg}"
    if keyword.arg == "weights_only":
        yield f"{name}:{keyword.value.lineno} reads a pickle"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_foreign_input(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert list(findings(ast.parse(path.read_text(encoding="utf-8")), name)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load('x')",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "yaml.load(text)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_each_kind_is_found(line: str) -> None:
    assert list(findings(ast.parse(line), "some.py"))


def test_every_call_of_from_pretrained_stands_at_the_border() -> None:
    """With the arguments that keep foreign code out."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
                name = path.relative_to(ROOT).as_posix()
                assert name in {"models/load.py", "models/builtin.py"} or dotted(node.func).startswith("PeftModel"), name
