"""Launch kernels again without what Triton works out at every launch, which is most of a call's time on the host.

Triton derives from the arguments which compiled kernel to run: types, alignment, values that divide by 16, compile-time
arguments, options. All of that follows from the shapes, strides, dtypes and alignment of the tensors and from the
arguments of the call. :func:`planned` keeps the launches of a call by these, so that a call costs one look-up::

    plan = planned(everything that the launches depend on, make the launches)
    plan.first(tensors)
    plan.second(tensors)

A :class:`Launch` keeps only the key under which Triton has the compiled kernel. So a kernel that Triton forgets is
forgotten here, and no tensor, device or stream is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from triton import knobs
from triton.runtime import driver

_Plan = TypeVar("_Plan")

_LIMIT = 1024  # plans kept; a model at one image size needs a dozen
_plans: dict[Hashable, Any] = {}


class Launch:
    """One kernel, its grid, and its arguments after the tensors, which come first in all our kernels.

    ``constants``: compile-time arguments by name, last in all our kernels. ``options``: of the compiler.
    """

    def __init__(
        self, kernel: Any, programs: int, scalars: list[Any], constants: dict[str, Any], options: dict[str, object]
    ) -> None:
        self._kernel, self._grid = kernel, (programs, 1, 1)
        self._scalars, self._constants, self._options = scalars, constants, options
        self._key: object = None  # of Triton's cache of compiled kernels, after the first launch
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Any) -> None:
        """Launch on the current device and stream; None for a tensor that the kernel does not use."""
        if self._key is not None and not self._kernel.pre_run_hooks:
            compiled = self._cache().get(self._key)
            if compiled is not None:
                compiled[self._grid](*tensors, *self._rest)
                return
        compiled = self._kernel[self._grid](*tensors, *self._scalars, **self._constants, **self._options)
        if compiled is not None:  # None: from the interpreter, or if a hook did not let Triton compile
            self._keep(compiled, len(tensors))

    def _cache(self) -> dict[object, Any]:
        """Triton's own compiled kernels for the current device."""
        return self._kernel.device_caches[driver.active.get_current_device()][0]

    def _keep(self, compiled: Any, tensors: int) -> None:
        try:
            found = [key for key, kernel in list(self._cache().items()) if kernel is compiled]
            names = self._kernel.arg_names[tensors + len(self._scalars) :]
        except (AttributeError, KeyError, TypeError, IndexError):  # another Triton: every launch is an ordinary one
            return
        if found:
            # A compiled kernel takes all arguments by position.
            self._rest = (*self._scalars, *(self._constants[name] for name in names))
            self._key = found[0]


def planned(key: Hashable, make: Callable[[], _Plan]) -> _Plan:
    """The plan made for this ``key`` before, or else by ``make``."""
    key = key, _triton_settings()
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _LIMIT:
            _plans.clear()
        plan = _plans[key] = make()
    return plan


def _triton_settings() -> tuple[object, ...]:
    """Settings that Triton compiles another kernel for."""
    compilation = knobs.compilation
    return (
        knobs.runtime.debug,
        getattr(knobs.runtime, "add_stages_inspection_hook", None),
        getattr(compilation, "instrumentation_mode", None),
        getattr(compilation, "fpsan_homomorphic_casts", None),
    )


def layout(x: torch.Tensor) -> tuple[object, ...]:
    """What a launch depends on in a tensor: Triton compiles for the dtype, and for a pointer of 16 bytes or fewer."""
    return x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0
