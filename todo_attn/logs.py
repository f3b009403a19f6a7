"""The package's logger, and how to keep it still where its advice is not asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("todo_attn")


@contextmanager
def silent() -> Iterator[None]:
    """Without the package's log, as where a model is only tried or counted."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
