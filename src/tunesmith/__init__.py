"""tunesmith: plan, train, verify and compare full fine-tuning, LoRA and QLoRA on your data.

Each stage is a function here and a command of the same name. Importing the package does not import torch.

Layers; each imports only from those below it (enforced by import-linter):

    cli > pipeline > demo, stages (augment, plan, prepare, review, train, export, evaluate, compare) > planner > methods >
    inference, evaluation > engine > chat, quality, models, hardware, plotting > kernels > runs > recipe > io > errors
"""

# Nothing is imported here: under `python -m tunesmith` the working folder is still first on the module path.
__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tunesmith.pipeline import run, run_methods
    from tunesmith.recipe import load_recipe
    from tunesmith.runs import create_run, open_run
    from tunesmith.stages.compare import compare
    from tunesmith.stages.evaluate import evaluate
    from tunesmith.stages.export import export
    from tunesmith.stages.plan import plan
    from tunesmith.stages.prepare import prepare
    from tunesmith.stages.train import train

__all__ = [
    "compare",
    "create_run",
    "evaluate",
    "export",
    "load_recipe",
    "open_run",
    "plan",
    "prepare",
    "run",
    "run_methods",
    "train",
]

_HOMES = {
    "load_recipe": "tunesmith.recipe",
    "create_run": "tunesmith.runs",
    "open_run": "tunesmith.runs",
    "run": "tunesmith.pipeline",
    "run_methods": "tunesmith.pipeline",
}


def __getattr__(name: str) -> object:
    """The functions of `__all__`, imported on first use."""
    from importlib import import_module

    if name in __all__:
        return getattr(import_module(_HOMES.get(name, f"tunesmith.stages.{name}")), name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
