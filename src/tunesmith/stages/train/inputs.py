"""What a training depends on, and whether it is done. No torch import: the pipeline asks before it starts a process."""

from __future__ import annotations

from pathlib import Path

from tunesmith.io.atomic import sha256_file
from tunesmith.models.load import locate, model_digest
from tunesmith.recipe import NAMED_REWARDS, OBJECTIVES, Recipe, SamplingSection
from tunesmith.runs import Run
from tunesmith.runs.decisions import require_signoff


def train_inputs(run: Run) -> tuple[Path, dict[str, str]]:
    """The base model's folder, and digests of all inputs.

    Raises RunError if `prepare` has not run, or if a required sign-off of its rows is missing; ModelError as `locate`.
    """
    recipe = run.recipe
    if recipe.data.require_review:
        require_signoff(run)
    model_folder = locate(recipe.model, recipe.revision)
    return model_folder, {
        "recipe": recipe.stage_digest("train"),
        "data": run.outputs_digest("prepare"),
        "model": model_digest(model_folder),
        **_reward_digests(recipe),
    }


def is_trained(run: Run) -> bool:
    """Whether `train` would do nothing; no input is read before a training has finished. Raises as `train_inputs`."""
    return run.is_done("train") and run.is_current("train", train_inputs(run)[1])


def _reward_digests(recipe: Recipe) -> dict[str, str]:
    """Digests of the files and folders that the recipe's rewards come from."""
    if not OBJECTIVES[recipe.objective].sampled:
        return {}
    digests = {}
    for name in recipe.own(SamplingSection).reward_funcs:
        if name in NAMED_REWARDS or name.startswith("length:"):
            continue
        path = Path(name.rpartition(":")[0] or name)
        digests[f"reward {name}"] = sha256_file(path) if path.is_file() else model_digest(path) if path.is_dir() else "missing"
    return digests
