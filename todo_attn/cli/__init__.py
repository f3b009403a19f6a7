"""The console script: runs a command and turns any failure into one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn

from ..interrupt import EXIT_CODE, MESSAGE, noticing_interrupts
from ..peak_memory import MAY_FIT, OUT_OF_MEMORY, is_out_of_memory

# Packages that may be missing.
_EXTRA = {"typer", "rich", "tabulate", "tqdm", "PIL", "skimage", "jinja2", "diffusers", "transformers", "accelerate"}
_EXTRA |= {"platformdirs"}  # of every install, but the ops work without it
# What the system says of a file or terminal that cannot take more.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run ``todo-attn`` with ``arguments`` (None: the process's) and exit.

    Exit codes: 0 done; 1 it failed, or ``doctor`` found something broken; 2 the arguments cannot be used; 130
    interrupted. A failure is one line on stderr; a closed pipe is none.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None if it is closed
            stream.reconfigure(errors="replace")  # a question mark is better than no output
    with noticing_interrupts() as interrupts:
        code, complaint = _run(arguments, interrupts)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError as error:
            # Otherwise Python would flush again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code, complaint = _unwritten(error)
        if complaint:
            _complain(complaint)
    sys.exit(code)


def _run(arguments: list[str] | None, interrupts: list[int]) -> tuple[int, str]:
    """The exit code, and a line for stderr."""
    try:
        import typer

        from .commands import app

        try:
            code = app(arguments, prog_name="todo-attn", standalone_mode=False) or 0
        except typer.Abort:
            code = EXIT_CODE
        return code, MESSAGE if code == EXIT_CODE else ""
    except KeyboardInterrupt:
        return EXIT_CODE, MESSAGE
    except SystemExit as exit:  # by rich on a closed pipe, or by shell completion
        return exit.code if isinstance(exit.code, int) else 0, ""
    except Exception as error:
        # The parser's errors are click's exceptions (from click or from typer's own copy, by version);
        # ours, UserError, has the same method.
        said = error.format_message() if hasattr(error, "format_message") else None
        code = getattr(error, "exit_code", 1)
        if interrupts and code != EXIT_CODE:  # a library has turned it into an error of its own
            return EXIT_CODE, MESSAGE
        if is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__)):
            return 1, _error(f"{OUT_OF_MEMORY}: {MAY_FIT}")
        if said is not None:
            return code, said and _error(said)  # empty without arguments: the help has been printed
        if isinstance(error, OSError) and error.errno in {errno.EPIPE, *_FULL}:
            return _unwritten(error)
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package in _EXTRA:
            return 1, _error(f"{package} is not installed: pip install 'todo_attn[cli]'")
        raise


def _unwritten(error: OSError) -> tuple[int, str]:
    """Output that found no space, or no reader."""
    if error.errno == errno.EPIPE:
        return 1, ""
    name = error.filename or "output"
    return 1, _error(f"{name} cannot be written: {error.strerror}")


def _error(message: str) -> str:
    return f"todo-attn: error: {' '.join(message.split())}"


def _complain(message: str) -> None:
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:  # stderr is gone too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
