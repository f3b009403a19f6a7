"""Compile launch configurations into Triton's cache before they are timed, side by side.

Each is compiled in a process of its own: a compiler that crashes or does not end costs one configuration. None of them
touches the GPU.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..kernels.configs import KernelConfig, Tiles
from .cases import Case
from .harness import nothing

_PROCESSES = 8  # at most: each has torch and Triton in memory
_SECONDS = 120.0
_CHILD = "from todo_attn.bench.compiling import compile_one; compile_one()"


@dataclass(frozen=True)
class Launch:
    """A launcher at one shape: the attention or the match kernel, as the case says.

    ``config``, ``tile``: None is the launcher's own choice; there are tiles for attention only.
    """

    case: Case
    config: KernelConfig | None = None
    tile: Tiles | None = None

    def __call__(self, x: Any) -> Any:
        """Launch it on one set of inputs, of :mod:`.attention` or of :mod:`.matching`."""
        from ..kernels import launch, match

        case = self.case
        if case.benchmark == "match_tokens":
            return match.match(x.x, x.others, x.bases, self.config)
        scale = case.head_dim**-0.5
        return launch.attention(
            x.query, x.key, x.value, case.grid, case.coarse, "nearest", scale, self.config, self.tile
        )


def compile_all(
    capability: tuple[int, int], launches: Sequence[Launch], watch: Callable[[], object] = nothing
) -> list[str | None]:
    """Compile the kernels of each launch for a GPU of compute capability (major, minor).

    ``watch`` is called after each, from another thread. Returns what went wrong with each, or None. An interrupt ends
    the processes.
    """
    children: list[subprocess.Popen[bytes]] = []
    workers = min(len(launches), os.cpu_count() or 1, _PROCESSES)
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        return list(pool.map(partial(_in_a_process, capability, children, watch), launches))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            if child.poll() is None:
                child.kill()


def _in_a_process(
    capability: tuple[int, int],
    children: list[subprocess.Popen[bytes]],
    watch: Callable[[], object],
    launch: Launch,
) -> str | None:
    root = str(Path(__file__).parents[2])  # this package, wherever it lies
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the command itself
    )
    children.append(child)
    try:
        _, said = child.communicate(pickle.dumps((capability, launch)), _SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return f"its compilation did not end within {_SECONDS:.0f} s"
    finally:
        watch()
    if child.returncode == 0:
        return None
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"its compilation ended with {child.returncode}"


def compile_one() -> None:
    """The process of :func:`compile_all`: reads a pickled (capability, launch) from stdin."""
    import triton
    from triton.backends.compiler import GPUTarget

    from .launched import launched

    (major, minor), launch = pickle.load(sys.stdin.buffer)
    arch = 10 * major + minor
    inputs = _empty(launch.case)
    for each in launched(arch, lambda: launch(inputs)):
        triton.compile(each.source, target=GPUTarget("cuda", arch, 32), options=each.options)


def _empty(case: Case) -> Any:
    """Inputs that are never read, so they take no memory; laid out as those that are timed."""
    from . import attention, matching

    if case.benchmark == "match_tokens":
        x = torch.empty((case.batch, case.tokens, case.channels), dtype=case.torch_dtype)
        others, bases = (
            torch.empty((case.batch, n), dtype=torch.int64) for n in (case.tokens - case.bases, case.bases)
        )
        return matching.Inputs(0, x, x[..., 0], others, bases)
    shape = (case.batch, case.tokens, case.heads, case.head_dim)
    query = torch.empty(shape, dtype=case.torch_dtype)
    return attention.Inputs(0, query, query, query, query, query)
