"""Searches DaTo's schedules for one's own model: quality against cost, by NSGA-II."""

from .found import Found, Point
from .plan import Plan
from .recommend import code_of, comparison_of, recommended, short_plan
from .run import Progress, search

__all__ = ["Found", "Plan", "Point", "Progress", "code_of", "comparison_of", "recommended", "search", "short_plan"]
