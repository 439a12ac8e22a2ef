"""Stage `plan`: what a run will take in memory, time and money (plan.json), and how far off that was (score.json)."""

from tunesmith.stages.plan.stage import plan

__all__ = ["plan"]
