"""Numbers as text, for the table and the contact sheet."""

from __future__ import annotations


def seconds_text(seconds: float) -> str:
    """With three digits: "0.123 s", "4.56 s", "78.9 s", "123 s"."""
    digits = 3 if seconds < 1 else 2 if seconds < 10 else 1 if seconds < 100 else 0
    return f"{seconds:.{digits}f} s"


def steps_text(steps: int) -> str:
    """ "1 step", "2 steps"."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def bytes_text(size: int) -> str:
    """In MiB below one GiB, else in GiB: "812 MiB", "1.25 GiB"."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"
