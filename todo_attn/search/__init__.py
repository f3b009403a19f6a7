"""Searches DaTo's schedules for one's own model: quality against cost, by NSGA-II."""

from .found import Found, Point
from .plan import Plan
from .run import Progress, search

__all__ = ["Found", "Plan", "Point", "Progress", "search"]
