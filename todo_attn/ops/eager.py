"""Whether a call may skip torch's dispatcher, which takes longer on the host than the launch of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

_C: Any = torch._C


def _keys(*names: str) -> Any:
    """A set of dispatch keys."""
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | _C.DispatchKeySet(getattr(_C.DispatchKey, name))
    return keys


# The dispatcher goes by a set of keys: those of the tensors and those that the thread includes, without those that it
# excludes. Autocast, a mode, a transform, a tracer, a subclass, a lazy negation: each has a key.
try:
    _of, _included, _excluded = (
        _C._dispatch_keys,
        _C._dispatch_tls_local_include_set,
        _C._dispatch_tls_local_exclude_set,
    )
    below_autograd = _C._AutoDispatchBelowAutograd
    _function_modes, _profiling = _C._len_torch_function_stack, _C._autograd._profiler_enabled
    # Without gradients these change nothing.
    _HARMLESS = _keys("BackendSelect", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA")
    _BACKENDS = {(_keys(name) - _HARMLESS).raw_repr() for name in ("CPU", "CUDA")}
    _known = True
except (AttributeError, TypeError):  # a torch that has other names for these: no call skips anything
    _known = False


def plain(*tensors: object) -> bool:
    """Whether nothing but the op's own kernel would see a call of an op on ``tensors``.

    False while anything compiles, traces, transforms, differentiates, casts, profiles or intercepts, and for any tensor
    that is more than its values: a subclass, a fake one, a lazy negation.
    """
    # torch.compile cannot trace what follows the first.
    if torch.compiler.is_compiling() or not _known or _function_modes() or _profiling():
        return False
    if getattr(forward_ad, "_current_level", 0) >= 0:
        return False
    differentiates = torch.is_grad_enabled()
    keys = _included()
    for x in tensors:
        if type(x) is not torch.Tensor or (differentiates and x.requires_grad):
            return False
        keys = keys | _of(x)
    return (keys - _excluded() - _HARMLESS).raw_repr() in _BACKENDS
