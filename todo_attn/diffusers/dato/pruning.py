"""Token pruning in the blocks of the finest self-attentions (DaTo, section 3.2)."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from ... import ops
from ...ops.pruning import check_ratio, plan_from_bases
from ...ops.tracing import constant_in_graphs
from ..grid import adopt_from_call_stack
from ..patches import keeps_maps
from ..processor import ToDoProcessor
from ..state import ATTRIBUTE, AttentionState, Plan
from .run import Run

_Args: TypeAlias = tuple[Any, ...]
_Kwargs: TypeAlias = dict[str, Any]


class Pruned(NamedTuple):
    """The choice of one block in one call: ``kept`` (B, K) token indices, ``source`` (B, N) positions in ``kept``."""

    kept: torch.Tensor
    source: torch.Tensor


def grid_at(unet: Any, level: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of tokens, (height, width), at ``level`` for latents of ``size``, (height, width)."""
    height, width = size
    reached = 1
    for block in unet.down_blocks:
        if reached == level:
            break
        for downsampler in getattr(block, "downsamplers", None) or ():
            # A convolution with padding on both sides rounds up. One with padding on one side, and pooling, round down.
            up = isinstance(downsampler, Downsample2D) and downsampler.use_conv and downsampler.padding > 0
            height, width = (height + up) // 2, (width + up) // 2
            reached *= 2
    return height, width


class TransformerPruning:
    """On a Transformer2DModel, each of whose blocks chooses its tokens from its own input.

    torch's hooks change the inputs and outputs of an attention. Its processor, adapters and offloading stay as they
    are, and see fewer tokens.
    """

    def __init__(self, transformer: Transformer2DModel, run: Run, kinds: tuple[str, ...]) -> None:
        """``kinds``: the kinds of calls that compute ``transformer``."""
        self.run = run
        self.grid = (0, 0)
        self.kinds = kinds
        self._blocks: list[BlockPruning] = []
        self._handles: list[RemovableHandle] = [
            transformer.register_forward_pre_hook(self._measure, with_kwargs=True),
        ]
        blocks: Any = transformer.transformer_blocks
        for block in blocks:
            self._attach(block)

    @torch.no_grad()
    def begin(self, sample: torch.Tensor, grid: tuple[int, int]) -> None:
        """Before a call of the UNet on ``sample``: score the tokens, a ``grid`` of them, for each block.

        A score depends on noise and on earlier outputs, not on the block's input. So it is computed here, outside of
        any graph: a graph cannot use a generator of ours, and calls without earlier outputs would need another graph.
        """
        pruned = self._count(grid) if self.run.kind in self.kinds else 0
        if pruned and self.run.config.prune_feed_forward and any(block.chunks for block in self._blocks):
            self.run.say(
                "chunks", "prune_feed_forward does nothing while feed-forward layers run in chunks of the tokens"
            )
        # In a graph a number would be a constant. The size of a tensor (here of one element, expanded) can be marked as
        # dynamic before the first graph is compiled.
        like = torch.empty((), device=sample.device).expand(pruned)
        if isinstance(self.run.config.prune_ratio, tuple):
            torch._dynamo.maybe_mark_dynamic(like, 0)
        for block in self._blocks:
            block.score = self.run.score(sample.shape[0], grid, sample.device) if pruned else None
            block.like_pruned = like

    def _count(self, grid: tuple[int, int]) -> int:
        """How many tokens of ``grid`` the running call prunes."""
        height, width = self.run.config.patch
        bases = (grid[0] // height) * (grid[1] // width)
        # A grid without a whole patch has no base tokens, so nothing can be pruned.
        return check_ratio(self.run.ratio, grid[0] * grid[1], bases) if bases else 0

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _attach(self, block: Any) -> None:
        state = BlockPruning(self, block)
        self._blocks.append(state)
        self._handles += [
            block.register_forward_pre_hook(state.choose, with_kwargs=True),
            block.register_forward_hook(state.forget, always_call=True),
        ]
        parts: list[tuple[Any, Any]] = [] if block.only_cross_attention else [(block.attn1, state.enter_self_attention)]
        if self.run.config.prune_cross_attention and block.attn2 is not None:
            parts.append((block.attn2, state.enter_cross_attention))
        if self.run.config.prune_feed_forward:
            parts.append((block.ff, state.enter))
        for module, enter in parts:
            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(state.leave),
            ]

    def _measure(self, transformer: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        image = args[0] if args else kwargs["hidden_states"]
        self.grid = (image.shape[-2], image.shape[-1])


class BlockPruning:
    """On one transformer block: the tokens that its running call keeps."""

    def __init__(self, transformer: TransformerPruning, block: Any) -> None:
        self.transformer = transformer
        self._block = weakref.ref(block)
        self.score: torch.Tensor | None = None  # (B, N), of the running call; None if nothing is pruned
        self.like_pruned: torch.Tensor | None = None  # its size is the number of tokens to prune
        self.pruned: Pruned | None = None
        self._entered = False

    @property
    def chunks(self) -> bool:
        """Whether the feed-forward runs in chunks of the tokens (``set_chunk_feed_forward``)."""
        block = self._block()
        return block is not None and block._chunk_size is not None and block._chunk_dim == 1

    @torch.no_grad()
    def choose(self, block: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        """Before the block: choose by the similarity of its input, before the first norm."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        run, grid, score, like = self.transformer.run, self.transformer.grid, self.score, self.like_pruned
        self.pruned, self._entered = None, False
        if score is None or like is None:
            return
        if hidden_states.shape[:2] != score.shape:  # not the image's tokens
            return
        # With offloading, the block may run on another device than the UNet was called on.
        bases = ops.select_base_tokens(score.to(hidden_states.device), grid, run.config.patch)
        self.pruned = Pruned(*plan_from_bases(hidden_states, bases, like.shape[0]))

    def forget(self, block: nn.Module, args: _Args, output: Any) -> None:
        self.pruned = None

    def enter(self, module: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
        """Pass only the kept tokens; anything but the block's tokens passes unchanged."""
        self._entered = False
        x = args[0] if args else kwargs["hidden_states"]
        if not self._chose_for(x):
            return None
        assert self.pruned is not None
        self._entered = True
        x = ops.gather_tokens(x, self.pruned.kept)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def enter_self_attention(self, attn: Any, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
        """As :meth:`enter`, but under ToDo only queries are pruned: keys are taken on the coarse grid of all tokens.

        A self-attention with a mask, which has a column for every token, is left alone, and so is one that gets other
        tokens than its block (HiDiffusion's windows).
        """
        self._entered = False
        if self.pruned is None or kwargs.get("attention_mask") is not None:
            return None
        if keeps_maps(attn.processor):  # its maps are of all tokens
            return None
        if kwargs.get("encoder_hidden_states") is not None:
            return None
        if not self._chose_for(args[0] if args else kwargs["hidden_states"]):
            self._say_other_tokens()
            return None
        todo = self._todo_on(attn)
        # The plan is an argument, or on the transformer's state if the processor was set up in this very call.
        plan: Plan | None = kwargs.get(ATTRIBUTE, None if todo is None else todo.transformer.plan)
        if todo is None or plan is None or plan.coarse == plan.grid:
            return self.enter(attn, args, kwargs)
        self._entered = True
        plan = plan._replace(queries=self.pruned.kept)
        if ATTRIBUTE in kwargs:
            return args, {**kwargs, ATTRIBUTE: plan}
        todo.transformer.plan = plan
        return None

    def _chose_for(self, x: torch.Tensor) -> bool:
        """Whether ``x`` (B, N, C) has the tokens that the block has chosen from."""
        return self.pruned is not None and x.ndim == 3 and x.shape[:2] == self.pruned.source.shape

    @constant_in_graphs
    def _say_other_tokens(self) -> None:
        self.transformer.run.say(
            "tokens",
            "a self-attention gets other tokens than its block (windows, as HiDiffusion's), so none are pruned there",
        )

    def _todo_on(self, attn: Any) -> AttentionState | None:
        """ToDo's state of ``attn``; None if its processor is not ToDo's."""
        if not isinstance(attn.processor, ToDoProcessor):
            return None
        state: AttentionState | None = getattr(attn, ATTRIBUTE, None)
        if state is None and not torch.compiler.is_compiling():
            # A processor set by hand would look for its grid at its first call, and not find it with fewer tokens.
            height, width = self.transformer.grid
            state = adopt_from_call_stack(attn, height * width)
        return state

    def enter_cross_attention(self, attn: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
        """As :meth:`enter`, except with an IP-Adapter's masks, which need all tokens."""
        self._entered = False
        return None if kwargs.get("ip_adapter_masks") is not None else self.enter(attn, args, kwargs)

    def leave(self, module: nn.Module, args: _Args, output: torch.Tensor) -> torch.Tensor:
        """Give each pruned token the output of its most similar kept token."""
        if not self._entered or self.pruned is None:
            return output
        self._entered = False
        return ops.recover_tokens(output, self.pruned.source)
