"""Every error that a user can cause or fix, as one tree.

A `Problem` says what is wrong, where, why it matters and how to fix it. A `TunesmithError` carries one or more of
them: checks collect all problems and raise once. The command line turns a `TunesmithError` into readable text and
exit code 2; any other exception that escapes is a bug in tunesmith and keeps its traceback.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Stable codes. A code is never reused with another meaning.
CODES: dict[str, str] = {
    "TS001": "recipe-unreadable",
    "TS002": "recipe-unknown-key",
    "TS003": "recipe-bad-value",
    "TS004": "recipe-missing-key",
    "TS005": "recipe-key-without-effect",
    "TS006": "recipe-keys-disagree",
    "TS007": "recipe-needs-gpu",
    "TS008": "recipe-not-for-this-data",
    "TS009": "recipe-not-in-several-processes",
    "TS010": "run-not-found",
    "TS011": "stage-missing",
    "TS012": "stage-out-of-date",
    "TS013": "folder-not-writable",
    "TS014": "run-in-use",
    "TS015": "not-ours-to-replace",
    "TS020": "command-line-bad-value",
    "TS101": "data-file-missing",
    "TS102": "data-malformed-json",
    "TS103": "data-empty-file",
    "TS104": "data-wrong-columns",
    "TS105": "data-unknown-role",
    "TS106": "data-empty-answer",
    "TS107": "data-no-assistant-turn",
    "TS108": "data-bad-value",
    "TS109": "data-nothing-left",
    "TS110": "data-missing-side",
    "TS111": "data-equal-answers",
    "TS112": "data-different-prompts",
    "TS113": "data-wrong-objective",
    "TS114": "data-damaged-file",
    "TS115": "data-empty-document",
    "TS116": "data-malformed-table",
    "TS117": "data-worker-died",
    "TS120": "template-missing",
    "TS121": "template-refused-row",
    "TS122": "template-rewrites-answer",
    "TS123": "template-invalid",
    "TS124": "template-endless",
    "TS130": "review-missing",
    "TS131": "review-rows-changed",
    "TS132": "review-unreadable",
    "TS140": "augment-not-asked",
    "TS141": "augment-not-installed",
    "TS142": "augment-endpoint-failed",
    "TS201": "model-folder-missing",
    "TS202": "model-folder-incomplete",
    "TS203": "model-unsafe-file",
    "TS204": "model-runs-code",
    "TS205": "model-index-escapes",
    "TS206": "model-unavailable",
    "TS207": "model-download-corrupt",
    "TS208": "model-config-incomplete",
    "TS209": "model-architecture-unknown",
    "TS210": "model-positions-not-scalable",
    "TS211": "model-damaged",
    "TS212": "model-already-quantised",
    "TS213": "model-is-adapter",
    "TS214": "model-not-loadable",
    "TS215": "model-weights-not-its-config",
    "TS216": "tokenizer-not-usable",
    "TS301": "train-not-finite",
    "TS302": "train-extra-missing",
    "TS303": "train-bad-reward",
    "TS304": "train-refused-by-trl",
    "TS310": "train-no-room",
    "TS311": "train-changed-since",
    "TS312": "train-out-of-memory",
    "TS313": "train-keeps-spiking",
    "TS401": "export-not-equal",
    "TS402": "export-not-mergeable",
    "TS501": "evaluate-schema-invalid",
    "TS502": "evaluate-no-test-rows",
    "TS503": "evaluate-bad-reference",
    "TS511": "mmlu-file-missing",
    "TS512": "mmlu-unknown-subject",
    "TS513": "mmlu-malformed",
    "TS601": "compare-different-tests",
    "TS602": "compare-run-twice",
    "TS701": "hardware-unknown",
    "TS702": "hardware-bad-catalogue",
    "TS703": "plan-bad-value",
    "TS704": "plan-nothing-fits",
    "TS705": "plan-objective-not-covered",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a stable `code`, and `what`, `where`, `why` it matters, how to `fix` it."""

    code: str
    what: str
    where: str
    why: str
    fix: str

    @property
    def name(self) -> str:
        """The code's readable name, such as `recipe-unknown-key`."""
        return CODES[self.code]

    def __str__(self) -> str:
        return f"{self.code} {self.name}: {self.where}: {self.what}\n  why: {self.why}\n  fix: {self.fix}"


class TunesmithError(Exception):
    """Base of all errors that tunesmith raises on purpose; holds all problems found by one check."""

    def __init__(self, problems: Sequence[Problem] | Problem) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[TunesmithError], Any]:
        """Pickle the problems, not their text, so that they survive a process boundary."""
        return type(self), (self.problems,)


class RecipeError(TunesmithError):
    """The recipe cannot be read, or has unknown keys or values out of range."""


class DataError(TunesmithError):
    """Rows cannot be read, or cannot be turned into conversations."""


class AugmentError(TunesmithError):
    """More rows cannot be generated: no endpoint is named, or it does not answer."""


class ModelError(TunesmithError):
    """A model, tokenizer or template cannot be found, or is not safe to open."""


class HardwareError(TunesmithError):
    """The hardware of a plan is unknown, or its description is wrong."""


class PlanError(TunesmithError):
    """A plan cannot be made from the input, or nothing fits."""


class TrainError(TunesmithError):
    """Training was stopped on purpose, for example because the loss is non-finite."""


class RunError(TunesmithError):
    """A run folder is missing, incomplete, or belongs to something else."""


class ExportError(TunesmithError):
    """An exported model differs from the trained model."""


class EvaluateError(TunesmithError):
    """A task cannot be scored as the recipe specifies."""


#: Names the file that a stage's process writes an error to, so that its parent can raise it again.
ERRORS_TO = "TUNESMITH_ERRORS_TO"


class EndedError(TunesmithError):
    """A stage ended early for a reason other than a user error; `exit_code` is the exit code of its process."""

    def __init__(self, exit_code: int) -> None:
        super().__init__([])
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[TunesmithError], Any]:
        return type(self), (self.exit_code,)


class StageFailedError(EndedError):
    """A stage in its own process died, or hit a bug and printed it itself."""

    def __str__(self) -> str:
        return f"the stage's process ended with exit code {self.exit_code}; see its output for the reason"


class StoppedError(EndedError):
    """A signal stopped the stage; it resumes when it is called again."""

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.exit_code - 128).name}"


def error_as_json(error: TunesmithError) -> dict[str, Any]:
    """The error as JSON, so that another process can raise it again."""
    kind = next(each for each in type(error).__mro__ if each.__module__ == __name__)
    return {"error": kind.__name__, "problems": [asdict(problem) for problem in error.problems]}


def error_of_json(values: Mapping[str, Any]) -> TunesmithError:
    """The error that `error_as_json` wrote."""
    kinds = {kind.__name__: kind for kind in TunesmithError.__subclasses__()}
    return kinds[values["error"]]([Problem(**problem) for problem in values["problems"]])


def first_line(error: BaseException) -> str:
    """The first line of a library error's message, without its long advice; its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
