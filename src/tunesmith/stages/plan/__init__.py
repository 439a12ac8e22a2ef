"""Stage `plan`: what a run will take in memory, time and money (plan.json), and how far off that was (score.json)."""

from tunesmith.stages.plan.stage import PLAN, plan, score, write_plan

__all__ = ["PLAN", "plan", "score", "write_plan"]
