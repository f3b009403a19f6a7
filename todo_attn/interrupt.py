"""Ctrl-C in the command's process: one line and exit code 130, whatever the process is doing then."""

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
    """End the process on Ctrl-C, if it is the command's: the command cannot catch it before torch is imported.

    That takes seconds, in which there is nothing to tidy up. In any other process, and where Ctrl-C has been given
    another meaning, nothing is changed.
    """
    words = list(getattr(sys, "orig_argv", ()))
    as_script = bool(sys.argv) and Path(sys.argv[0]).stem == "todo-attn"
    as_module = sys.argv[:1] == ["-m"] and ("-m", "todo_attn") in pairwise(words)
    if (as_script or as_module) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


@contextmanager
def noticing_interrupts() -> Iterator[list[int]]:
    """Within, Ctrl-C raises ``KeyboardInterrupt``, and the list is no longer empty from then on.

    Libraries may turn that into an error of their own. A second Ctrl-C ends the process at once. Outside of the main
    thread, and where Ctrl-C is ignored, nothing is changed.
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
    except ValueError:  # another thread than the main one
        before = None
    try:
        yield seen
    finally:
        if before in (signal.default_int_handler, _leave):
            signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: Any) -> None:
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(EXIT_CODE)
