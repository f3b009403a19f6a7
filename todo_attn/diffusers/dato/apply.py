"""apply_dato, remove_dato and reset_dato, and the hooks of the UNet itself."""

from __future__ import annotations

import weakref
from typing import Any, TypeAlias

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from ...config.checks import ArgumentError
from ...config.dato import DaToConfig
from ...config.schedule import FULL, REUSE, SHALLOW
from ...logs import logger
from ..apply import apply_todo, remove_todo
from ..levels import transformers_by_level
from ..models import models_of, unwrap
from ..patches import has_deepcache, has_todo
from . import cache
from .pruning import TransformerPruning, grid_at
from .run import Run

_Args: TypeAlias = tuple[Any, ...]
_Kwargs: TypeAlias = dict[str, Any]

_NO_EXPORT = (
    "a UNet under DaTo cannot be exported or traced into one graph, which would hold one kind of call only: "
    "remove_dato(pipe) first (torch.compile is no export, and works)"
)

# The attribute that holds a UNet's DaToState.
ATTRIBUTE = "_todo_attn_dato"


class DaToState:
    """On a UNet under DaTo: its run and its hooks.

    ``todo`` are the models to which the configuration's ToDo was applied, a pipeline's ControlNets included.
    """

    def __init__(self, unet: UNet2DConditionModel, run: Run, todo: list[nn.Module]) -> None:
        self.run = run
        self._todo = [weakref.ref(model) for model in todo]
        transformers = transformers_by_level(unet)
        self._finest = min(level for level, _ in transformers)
        shallow = {module for part in cache.computed_in_shallow(unet) for module in part.modules()}
        self._pruning = [
            TransformerPruning(t, run, kinds=(FULL, SHALLOW) if t in shallow else (FULL,))
            for level, t in transformers
            if level == self._finest
        ]
        self._cache = [] if run.config.cache_schedule is None else cache.attach(unet, run)
        self._handles = [
            unet.register_forward_pre_hook(self._before, with_kwargs=True),
            unet.register_forward_hook(self._after),
        ]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copy.deepcopy and pickle: the hooks of the copy would run the blocks of the original."""
        raise RuntimeError(
            "a UNet under DaTo cannot be copied or pickled: remove_dato(pipe) first, and apply_dato to the copy as well"
        )

    def detach(self, unet: UNet2DConditionModel) -> None:
        if self._cache:
            cache.detach(unet)
        for handle in self._handles:
            handle.remove()
        for pruning in self._pruning:
            pruning.detach()

    @property
    def pruned(self) -> float:
        """The share of tokens that the running or last call pruned."""
        return self.run.ratio if any(self.run.kind in pruning.kinds for pruning in self._pruning) else 0.0

    @property
    def todo(self) -> list[nn.Module]:
        """The models to which ToDo was applied, as far as they still exist."""
        return [model for model in (ref() for ref in self._todo) if model is not None]

    # torch.compile leaves the hooks of the compiled UNet itself outside of its graphs. Whatever differs from call to
    # call is decided here; the graphs see the kind of call, and tensors.
    @torch.compiler.disable(reason=f"DaTo decides here how much of the UNet a call computes; {_NO_EXPORT}")
    def _before(self, unet: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise RuntimeError(_NO_EXPORT)
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        prompt = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        stream = self.run.begin(unet, sample, timestep, prompt)
        for hook, shapes in zip(self._cache, stream.shapes, strict=False):  # a new stream has no shapes
            hook.shapes = shapes
        grid = grid_at(unet, self._finest, sample.shape[-2:])
        for pruning in self._pruning:
            pruning.begin(sample, grid)
        # The UNet itself would make the tensor, but in a graph: a number would be a constant there, and a CPU tensor
        # rules CUDA graphs out.
        real = torch.float32 if sample.device.type in ("mps", "npu") else torch.float64
        dtype = real if isinstance(timestep, float) else None
        timestep = torch.as_tensor(timestep, dtype=dtype, device=sample.device)
        if len(args) > 1:
            return (args[0], timestep, *args[2:]), kwargs
        return args, {**kwargs, "timestep": timestep}

    # Copies are made here: inside a CUDA graph even a copy lies in memory that the next call overwrites.
    @torch.compiler.disable(reason="DaTo keeps the output here")
    def _after(self, unet: nn.Module, args: _Args, output: Any) -> Any:
        if self.run.kind == FULL:
            for hook in self._cache:
                hook.keep()
            self.run.stream.shapes = [hook.shapes for hook in self._cache]
        sample = self.run.end(output[0])
        if self.run.kind != REUSE:
            return None
        return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


def apply_dato(pipe_or_unet: Any, config: DaToConfig | None = None) -> None:
    """Let a UNet prune tokens and reuse its blocks (DaTo, arXiv 2501.00375).

    It changes the UNet in place; :func:`remove_dato` undoes that. An image, or a batch of images, is a *run* of calls
    of the UNet. The first call of a run is computed in full, and the others as ``config.cache_schedule`` says: in full,
    the last layers only, or not at all. Calls that are computed prune tokens in the self-attentions of the UNet's
    finest level.

    A call continues the previous call of the same stream: the same tensor of timesteps, the same tensor of prompt
    embeddings and the same shape, one step further. So it does not matter which pipeline calls the UNet, or whether
    guidance takes one call a step or two, and runs may alternate. A schedule for another number of calls is resampled
    to the calls that will come: the elements of the tensor of timesteps, or fewer if the calling pipeline says so
    (``strength``, ``denoising_end``). The values of timesteps are never read. :func:`reset_dato` starts a new run in
    any case.

    If it is not known which call a call continues, it is computed in full, and that is logged once. This concerns two
    calls at the same step with the same prompt embeddings, prompt embeddings that are computed again for every call,
    and timesteps that are not elements of a longer tensor, such as plain numbers.

    It works at every height and width, with guidance on or off, and together with LoRA, IP-Adapter, ControlNet,
    T2I-Adapter, FreeU, offloading and :func:`todo_attn.apply_todo`, in any order. Call it again to replace the
    configuration. The UNet or its repeated blocks may be compiled before or after, with ``fullgraph=True`` or without.
    A run compiles one graph of the UNet for each kind of call, at most three; twice as many if some prune ratios are 0
    and others are not.

    A UNet under DaTo cannot be copied, pickled, exported or traced; each of these is a ``RuntimeError``. Two threads
    must not call it at the same time. In a loop of your own, an even batch is taken for the two halves of guidance: set
    ``align_guidance=False`` if there is no guidance.

    Args:
        pipe_or_unet: a pipeline with a ``unet``, or a ``UNet2DConditionModel``, compiled or not.
        config: None is ``DaToConfig()``: 0.4 of the tokens pruned, nothing reused.

    Raises:
        ArgumentError: ``pipe_or_unet`` is neither of these, or has no self-attention; ``config`` is not a
            ``DaToConfig``, or has a ``todo`` although ToDo is already on the UNet or on a ControlNet of the pipeline;
            DeepCache or tomesd has patched the UNet; the UNet has group offloading and the configuration a schedule.
            Nothing has been changed then.
    """
    config = DaToConfig() if config is None else config
    if not isinstance(config, DaToConfig):
        raise ArgumentError("config", f"must be a DaToConfig or None, got {type(config).__name__}")
    unet = _unet_of(pipe_or_unet)
    _check_structure(unet)
    _check_foreign(unet)
    if config.cache_schedule is not None:
        _check_group_offloading(unet)
    previous: DaToState | None = getattr(unet, ATTRIBUTE, None)
    with_todo = [] if previous is None else previous.todo
    models = [] if config.todo is None else [model for part in models_of(pipe_or_unet) for model in part]
    for model in models:
        if model not in with_todo and has_todo(model):
            raise ArgumentError(
                "config",
                f"must not have todo= where ToDo is on the {type(model).__name__} already, which it would "
                "replace: remove_todo first, or leave todo=None to combine with what is there",
            )
    if config.todo is not None:  # before any change of DaTo's, because it may raise
        apply_todo(pipe_or_unet, config.todo)
    for model in with_todo:
        if model not in models:
            remove_todo(model)
    if previous is not None:
        _take_off(unet, previous)
    setattr(unet, ATTRIBUTE, DaToState(unet, Run(config), models))
    if config.computes_everything and config.todo is None:
        logger.warning(
            "DaTo: this will not help: prune_ratio is 0 and cache_schedule has every call computed in full. "
            "DaToConfig.preset('coco') does both."
        )


def remove_dato(pipe_or_unet: Any) -> None:
    """Take DaTo off, and the ToDo of its configuration. Removing twice is harmless.

    Raises:
        ArgumentError: ``pipe_or_unet`` is neither a pipeline with a ``unet`` nor a ``UNet2DConditionModel``.
    """
    unet = _unet_of(pipe_or_unet)
    state: DaToState | None = getattr(unet, ATTRIBUTE, None)
    if state is None:
        return
    _take_off(unet, state)
    for model in state.todo:
        remove_todo(model)


def reset_dato(pipe_or_unet: Any) -> None:
    """Start a new run at the next call of the UNet, and free what was kept for the last one. Harmless without DaTo.

    Raises:
        ArgumentError: ``pipe_or_unet`` is neither a pipeline with a ``unet`` nor a ``UNet2DConditionModel``.
    """
    unet = _unet_of(pipe_or_unet)
    state: DaToState | None = getattr(unet, ATTRIBUTE, None)
    if state is not None:
        state.run.reset()


def _take_off(unet: UNet2DConditionModel, state: DaToState) -> None:
    state.detach(unet)
    delattr(unet, ATTRIBUTE)


def _unet_of(pipe_or_unet: Any) -> UNet2DConditionModel:
    """The UNet, without any wrapper."""
    unet = unwrap(pipe_or_unet if isinstance(pipe_or_unet, nn.Module) else getattr(pipe_or_unet, "unet", None))
    if not isinstance(unet, UNet2DConditionModel):
        raise ArgumentError(
            "pipe_or_unet",
            "must be a diffusers pipeline with a UNet2DConditionModel, or such a UNet, got "
            f"{type(pipe_or_unet).__name__}",
        )
    return unet


def _check_structure(unet: UNet2DConditionModel) -> None:
    if not transformers_by_level(unet):
        raise ArgumentError(
            "pipe_or_unet",
            f"must have self-attention over an image (Transformer2DModel), got a {type(unet).__name__} that has none",
        )
    last: Any = unet.up_blocks[-1]
    layers = len(last.resnets)
    if layers < 2:
        raise ArgumentError("pipe_or_unet", f"must have at least 2 layers in its last up block, got {layers}")


def _check_foreign(unet: nn.Module) -> None:
    """Refuse patches that replace the forward of the blocks, as offloading, PEFT and layerwise casting do not."""
    # By the class of the blocks: tomesd's mark on the model stays after its remove_patch.
    if any(type(module).__module__.startswith("tomesd") for module in unet.modules()):
        raise ArgumentError("pipe_or_unet", "must not be patched by tomesd: tomesd.remove_patch(pipe) first")
    if has_deepcache(unet):
        raise ArgumentError("pipe_or_unet", "must not be patched by DeepCache: helper.disable() first")


def _check_group_offloading(unet: nn.Module) -> None:
    """Refuse group offloading: it loads the weights of several blocks when the first runs, which may be skipped."""
    for module in unet.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and any("group_offloading" in name for name in registry.hooks):
            raise ArgumentError(
                "cache_schedule",
                "must be None on a UNet with diffusers' group offloading, whose weights come block by "
                "block; use enable_model_cpu_offload",
            )
