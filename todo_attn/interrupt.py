"""Ctrl-C in the command's process: one line and exit code 130, at any moment."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

MESSAGE = "todo-attn: error: interrupted"
EXIT_CODE = 130


def leave_on_interrupt() -> None:
    """End the command's process on Ctrl-C while torch is imported, which takes seconds and leaves nothing to clean up.

    Changes nothing in any other process, or if Ctrl-C has another handler.
    """
    words = list(getattr(sys, "orig_argv", ()))
    as_script = bool(sys.argv) and Path(sys.argv[0]).stem == "todo-attn"
    as_module = sys.argv[:1] == ["-m"] and ("-m", "todo_attn") in pairwise(words)
    if (as_script or as_module) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def noticing_interrupts() -> Iterator[list[int]]:
    """Inside the block, Ctrl-C raises ``KeyboardInterrupt`` and is noted in the list.

    The list tells an interrupt that a library has turned into an error of its own. A second Ctrl-C ends the process at
    once. Changes nothing outside of the main thread, or if Ctrl-C is ignored.
    """
    seen: list[int] = []

    def notice(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        if before in (signal.default_int_handler, _leave):
            signal.signal(signal.SIGINT, notice)
    except ValueError:  # not the main thread
        before = None
    try:
        yield seen
    finally:
        if before in (signal.default_int_handler, _leave):
            signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: Any) -> None:
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(EXIT_CODE)
