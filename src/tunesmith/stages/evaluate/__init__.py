"""Stage `evaluate`: a model folder and the run's test rows in, `eval/<model-digest>/<suite>/` out."""

from tunesmith.stages.evaluate.stage import evaluate, evaluate_base

__all__ = ["evaluate", "evaluate_base"]
