"""Stage `plan`: the memory, time and money a run will take (plan.json), and how far off that was (score.json)."""

from tunesmith.stages.plan.stage import PLAN, plan, score, write_plan

__all__ = ["PLAN", "plan", "score", "write_plan"]
