"""Prompts from a file."""

from __future__ import annotations

from pathlib import Path

from ..config.checks import ArgumentError


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a UTF-8 file; empty ones are left out.

    Raises:
        ArgumentError: it cannot be read, is not UTF-8, or has no prompt.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ArgumentError(
            "prompts", f"must be a file that can be read, got {str(path)!r}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise ArgumentError("prompts", f"must be a UTF-8 file, and {str(path)!r} is not: {error.reason}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ArgumentError("prompts", f"must be a file with a prompt a line, and {str(path)!r} has none")
    return prompts
