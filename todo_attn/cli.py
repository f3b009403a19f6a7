"""The console script: runs the commands and turns whatever went wrong into one line and an exit code."""

from __future__ import annotations

import sys
from typing import NoReturn

# The packages of the extra "cli" that a command may find missing.
_EXTRA = {"typer", "rich", "tabulate", "tqdm", "PIL", "skimage", "diffusers", "transformers", "accelerate"}


def main(arguments: list[str] | None = None) -> None:
    """Run ``todo-attn`` with ``arguments`` (None: the process's) and exit.

    Exit codes: 0 done; 1 it failed, or ``doctor`` found something broken; 2 the arguments cannot be used; 130
    interrupted. Whatever goes wrong with them is one line on stderr.
    """
    try:
        sys.exit(_run(arguments))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        _fail(f"{package} is not installed: pip install 'todo_attn[cli]'", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _run(arguments: list[str] | None) -> int:
    import typer

    from .commands import UserError, app

    try:
        return app(arguments, prog_name="todo-attn", standalone_mode=False) or 0
    except UserError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        _fail("interrupted", 130)
    except Exception as error:
        # The parser's complaints: click's exceptions, which typer takes from click or carries itself, by version.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        if error.format_message():
            _fail(error.format_message(), error.exit_code)
        return error.exit_code  # no arguments at all: the help has been printed


def _fail(message: str, code: int) -> NoReturn:
    print(f"todo-attn: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
