"""softgrpo-train --plan: what a run needs, found by running it on GPUs that have no numbers."""

from softgrpo.tools.plan.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
