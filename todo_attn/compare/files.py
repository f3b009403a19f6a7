"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_whole(file: Path, content: bytes) -> None:
    """Write ``file`` whole or not at all; missing folders are made.

    Raises:
        OSError: it cannot be written, with its name: what was there before is still there.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")  # no other process uses this name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, file)
    except BaseException as error:  # an interrupt too
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(file)) from error
        raise


def wait_for(file: Path, patience: float = 120.0) -> None:
    """Until ``file``, which another process has written, is there; at most ``patience`` seconds.

    Between the nodes of a shared file system, a new file may show late.
    """
    end = time.monotonic() + patience
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.5)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """``value`` as a file of JSON; the same value gives the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
