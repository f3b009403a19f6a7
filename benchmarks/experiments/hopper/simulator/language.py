"""Stand-ins for Gluon: tensors in registers and in shared memory, the functions on them, and how a kernel is launched.

Only what ``benchmarks/experiments/hopper`` uses. Layouts are carried along and never looked at.
"""

from __future__ import annotations

import builtins
import types

import torch

from benchmarks.experiments.hopper.simulator.machine import Accumulator, Barrier, Program, must

program: Program = None  # type: ignore[assignment]  # the one that runs


class Int(int):
    """A number whose arithmetic keeps ``to``."""

    def to(self, _dtype):
        return self


def _integer_method(name):
    plain = getattr(int, name)

    def method(self, other):
        result = plain(self, other)
        return result if result is NotImplemented else Int(result)

    return method


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "and", "xor"):
    setattr(Int, f"__{_name}__", _integer_method(f"__{_name}__"))


def integers(*bounds):
    return (Int(i) for i in builtins.range(*bounds))


def bare(x):
    return x.x if isinstance(x, Tensor) else x


class Tensor:
    """A tensor in registers."""

    def __init__(self, x, layout=None):
        self.x = x
        self.type = types.SimpleNamespace(layout=layout)

    shape = property(lambda self: list(self.x.shape))
    dtype = property(lambda self: self.x.dtype)

    def __getitem__(self, at):
        return Tensor(self.x[at], getattr(self.type.layout, "parent", None))

    def to(self, dtype):
        return Tensor(self.x.to(dtype), self.type.layout)


def _tensor_method(name):
    def method(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        return Tensor(getattr(self.x, name)(bare(other)), self.type.layout)

    return method


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "lt", "eq", "and"):
    setattr(Tensor, f"__{_name}__", _tensor_method(f"__{_name}__"))


class Pointer:
    """Into a storage, and how far."""

    def __init__(self, flat, offset=0):
        self.flat, self.offset = flat, offset
        self.dtype = types.SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, more):
        return Pointer(self.flat, self.offset + bare(more))


class Layout:
    def __init__(self, *_, **__):
        pass

    @staticmethod
    def get_default_for(*_):
        return Layout()


class Slice(Layout):
    def __init__(self, _dim, parent):
        self.parent = parent


class Shared:
    """A view of shared memory."""

    def __init__(self, x):
        self.x = x

    shape = property(lambda self: list(self.x.shape))
    dtype = property(lambda self: self.x.dtype)

    def index(self, i):
        must(0 <= i < self.x.shape[0], f"index {i} of {self.x.shape[0]}")
        return Shared(self.x[i])

    def slice(self, start, length, dim=0):
        return Shared(self.x.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.x.permute(order))

    def store(self, value):
        must(self.x.dtype == value.x.dtype, "a store of another dtype")
        program.switch()
        self.x.copy_(value.x)


class Barriers:
    def __init__(self, n):
        self.all = [Barrier() for _ in builtins.range(n)]

    def index(self, i):
        return self.all[i]


def allocate(dtype, shape, layout):
    return Barriers(shape[0]) if dtype == torch.int64 else Shared(torch.full(shape, float("nan"), dtype=dtype))


def warp_specialize(functions, warps, registers):
    must(len(functions) == len(warps) + 1 == len(registers) + 1, "partitions, warps and registers do not match")
    program.run(functions)


def wait(bar, parity):
    must(bar.count is not None, "a wait for a barrier that was not initialised")
    program.switch(lambda: bar.passed(parity))


def expect(bar, size):
    bar.bytes += size
    bar.arrive()
    program.switch()


def arrive(bar, count=1):
    bar.arrive(count)
    program.switch()


def copy(descriptor, coordinates, bar, result, pred=True):
    if pred:
        row, column = coordinates
        must(descriptor.block == result.shape and 0 <= row < descriptor.tensor.shape[0], "a box out of place")
        program.copy(descriptor.tensor, row, column, result.x, bar)


def mma(a, b, acc, *, use_acc=True, is_async=False):
    must(is_async and a.dtype == b.dtype, "operands of a wgmma differ")
    layout = acc.layout if isinstance(acc, Accumulator) else acc.type.layout
    return program.multiply(Tensor(a.x.clone()) if isinstance(a, Tensor) else a, b, acc, use_acc, layout)


def mma_wait(outstanding, deps):
    program.wait_wgmmas(outstanding)
    must(not any(one is other for one in deps for other in program.mine()), "an accumulator used while in flight")
    results = [Tensor(one.result, one.layout) if isinstance(one, Accumulator) else one for one in deps]
    return results[0] if len(results) == 1 else tuple(results)


def polynomial(t):
    """``exp2.exp2_mixed``, one column in eight by polynomial."""
    x = t.x.clamp_min(-126)
    whole = x + 12582912.0
    x = x - (whole - 12582912.0)
    y = ((0.055171624 * x + 0.242611119) * x + 0.693260994) * x + 0.999928074
    rare = (y.view(torch.int32) + (whole.view(torch.int32) << 23)).view(torch.float32)
    first = torch.arange(t.x.shape[1]) % 8 == 0
    return Tensor(torch.where(first, rare, torch.exp2(t.x)), t.type.layout)


def load(pointer, mask, other):
    at = torch.where(bare(mask), pointer.offset, 0)
    return Tensor(torch.where(bare(mask), pointer.flat[at], torch.tensor(other, dtype=pointer.flat.dtype)))


def store(pointer, value, mask):
    mask = bare(mask).broadcast_to(value.x.shape)
    pointer.flat[pointer.offset.broadcast_to(mask.shape)[mask]] = value.x[mask]


class Kernel:
    """A jitted function: called inside of another, or launched on tensors, numbers and descriptors."""

    def __init__(self, function):
        self.function, self.__name__ = function, function.__name__
        self.seed = 0

    def __call__(self, *arguments, **named):
        return self.function(*arguments, **named)

    def __getitem__(self, grid):
        def run(*arguments, num_warps, enable_fp_fusion, **constants):
            global program
            prepared = [_argument(one) for one in arguments]
            for number in builtins.range(grid[0]):
                program = Program(self.seed * 1000 + number, Int(number), Int(grid[0]))
                self.function(*prepared, **constants)

        return run


def jit(function=None, **_):
    """The decorator, with options or without."""
    return Kernel if function is None else Kernel(function)


def _argument(one):
    if isinstance(one, torch.Tensor):
        size = one.untyped_storage().nbytes() // one.element_size()
        return Pointer(one.as_strided((size,), (1,), 0), one.storage_offset())
    if isinstance(one, int):
        return Int(one)
    if isinstance(one, float):
        return one
    return types.SimpleNamespace(tensor=one.base, block=list(one.block_shape), layout=one.layout, dtype=one.base.dtype)


def split(t):
    return Tensor(t.x[..., 0], t.type.layout), Tensor(t.x[..., 1], t.type.layout)


def fma(a, b, c):
    return Tensor((a.x.double() * b.x.double() + c.x.double()).float(), a.type.layout)


GL = types.SimpleNamespace(
    constexpr=lambda x: x,
    **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "int64")},
    NVMMADistributedLayout=Layout,
    NVMMASharedLayout=Layout,
    BlockedLayout=Layout,
    DotOperandLayout=Layout,
    SliceLayout=Slice,
    program_id=lambda _: program.number,
    num_programs=lambda _: program.programs,
    cdiv=lambda a, b: Int(-(-a // b)),
    static_range=builtins.range,
    allocate_shared_memory=allocate,
    warp_specialize=warp_specialize,
    arange=lambda a, b, layout: Tensor(torch.arange(a, b), layout),
    zeros=lambda shape, dtype, layout: Tensor(torch.zeros(shape, dtype=dtype), layout),
    full=lambda shape, value, dtype, layout: Tensor(torch.full(shape, value, dtype=dtype), layout),
    zeros_like=lambda t: Tensor(torch.zeros_like(t.x), t.type.layout),
    where=lambda c, a, b: Tensor(torch.where(bare(c), bare(a), bare(b)), c.type.layout),
    fma=fma,
    exp2=lambda t: Tensor(torch.exp2(t.x), t.type.layout),
    abs=lambda t: Tensor(t.x.abs(), t.type.layout),
    max=lambda t, axis: Tensor(t.x.amax(axis), Slice(axis, t.type.layout)),
    sum=lambda t, axis: Tensor(t.x.sum(axis), Slice(axis, t.type.layout)),
    maximum=lambda a, b: Tensor(torch.maximum(a.x, b.x), a.type.layout),
    reshape=lambda t, shape: Tensor(t.x.reshape(shape), t.type.layout),
    permute=lambda t, order: Tensor(t.x.permute(order), t.type.layout),
    split=split,
    convert_layout=lambda t, layout, assert_trivial: Tensor(t.x, layout),
    load=load,
    store=store,
)
# By the name they are imported from.
MODULES = {
    "triton.experimental": types.SimpleNamespace(gluon=types.SimpleNamespace(jit=jit)),
    "triton.experimental.gluon": types.SimpleNamespace(language=GL),
    "triton.experimental.gluon.language.nvidia.hopper": types.SimpleNamespace(
        fence_async_shared=lambda: None,
        mbarrier=types.SimpleNamespace(
            init=lambda bar, count: bar.init(count), wait=wait, expect=expect, arrive=arrive, MBarrierLayout=Layout
        ),
        tma=types.SimpleNamespace(async_load=copy),
        warpgroup_mma=mma,
        warpgroup_mma_wait=mma_wait,
    ),
    "todo_attn.kernels.exp2": types.SimpleNamespace(exp2_mixed=polynomial),
}
