"""What the launchers ask Triton to compile, for any GPU and without one.

The launchers run as they are, on tensors of the CPU, up to the compiler. So every argument is specialised by its real
value (a stride of 40 is no multiple of 16), and nothing about the kernels' arguments is written down twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from todo_attn.kernels import configs


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel's name without "_kernel", what is compiled for it, and the options of the compiler."""

    kernel: str
    source: ASTSource
    options: dict[str, Any]

    def constant(self, name: str) -> Any:
        """The value of a compile-time argument."""
        return self.source.constants[(self.source.fn.arg_names.index(name),)]


@dataclass(frozen=True)
class _Driver:
    """What Triton asks its driver before it compiles. The device is the architecture: Triton caches by device."""

    arch: int

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def launched(arch: int, call: Callable[[], object]) -> list[Launched]:
    """The launches of ``call`` on a GPU of compute capability ``arch`` (as 90). Nothing is compiled or computed."""
    found = []

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        found.append(Launched(fn.name.removesuffix("_kernel"), source, options))
        return True  # do not compile it

    driver.set_active(_Driver(arch))
    with (
        mock.patch.object(configs, "CPU_CAPABILITY", divmod(arch, 10)),
        mock.patch.object(knobs.runtime, "jit_cache_hook", record),
        torch.no_grad(),
    ):
        call()
    return found
