"""The package's logger, how to silence it, and an error on one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("todo_attn")


@contextmanager
def silent() -> Iterator[None]:
    """Silence the package's log while a model is only tried or counted."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def one_line(error: BaseException) -> str:
    """The type and message of ``error``, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
