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
from ..grid import adopt_from_call_stack
from ..patches import keeps_maps
from ..processor import ToDoProcessor
from ..state import ATTRIBUTE, AttentionState, Plan
from .run import Run

_Args: TypeAlias = tuple[Any, ...]
_Kwargs: TypeAlias = dict[str, Any]


class Pruned(NamedTuple):
    """One block's choice in one call: ``kept`` (B, K) token indices, ``source`` (B, N) positions into them."""

    kept: torch.Tensor
    source: torch.Tensor


def grid_at(unet: Any, level: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of tokens at ``level`` (latent pixels a side of a token) for latents of ``size``, (height, width)."""
    height, width = size
    reached = 1
    for block in unet.down_blocks:
        if reached == level:
            break
        for downsampler in getattr(block, "downsamplers", None) or ():
            # A convolution padded on both sides rounds up; one padded on one side, and pooling, round down.
            up = isinstance(downsampler, Downsample2D) and downsampler.use_conv and downsampler.padding > 0
            height, width = (height + up) // 2, (width + up) // 2
            reached *= 2
    return height, width


class TransformerPruning:
    """On a Transformer2DModel: each of its blocks chooses its tokens from its own input.

    Hooks are torch's, which change what goes into an attention and what comes out of it: whatever processor, adapter or
    offloading is on it stays as it is, and sees fewer tokens.
    """

    def __init__(self, transformer: Transformer2DModel, run: Run, kinds: tuple[str, ...]) -> None:
        """``kinds`` are those of the calls that compute ``transformer``."""
        self.run = run
        self.grid = (0, 0)
        self._kinds = kinds
        self._blocks: list[BlockPruning] = []
        self._handles: list[RemovableHandle] = [
            transformer.register_forward_pre_hook(self._measure, with_kwargs=True),
        ]
        blocks: Any = transformer.transformer_blocks
        for block in blocks:
            self._attach(block)

    @torch.no_grad()
    def begin(self, sample: torch.Tensor, grid: tuple[int, int]) -> None:
        """Before a call of the UNet on ``sample``: the scores of each block's tokens, an image's ``grid`` of them.

        A score follows from noise and from the outputs before, not from what the block is given. So it is made here,
        outside of any graph: a graph draws nothing from a generator of ours, and would be another one where there is
        no difference of outputs to take.
        """
        pruned = self._count(grid) if self.run.kind in self._kinds else 0
        if pruned and self.run.config.prune_feed_forward and any(block.chunks for block in self._blocks):
            self.run.say(
                "chunks", "prune_feed_forward does nothing while feed-forward layers run in chunks of the tokens"
            )
        # A number would be a constant of a graph. The size of a tensor can be marked, before the first graph is made,
        # as one that changes; one element in memory.
        like = torch.empty((), device=sample.device).expand(pruned)
        if isinstance(self.run.config.prune_ratio, tuple):
            torch._dynamo.maybe_mark_dynamic(like, 0)
        for block in self._blocks:
            block.score = self._score(sample, grid) if pruned else None
            block.like_pruned = like

    def _count(self, grid: tuple[int, int]) -> int:
        """How many tokens of ``grid`` the running call prunes."""
        height, width = self.run.config.patch
        bases = (grid[0] // height) * (grid[1] // width)
        # A grid without a whole patch has no base token to prune towards.
        return check_ratio(self.run.ratio, grid[0] * grid[1], bases) if bases else 0

    def _score(self, sample: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N) fp32."""
        paired, batch = self.run.stream.paired, sample.shape[0]
        score = self.run.score(batch // 2 if paired else batch, grid, sample.device)
        return torch.cat((score, score)) if paired else score

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
        self.score: torch.Tensor | None = None  # (B, N), of the running call; None where nothing is pruned
        self.like_pruned: torch.Tensor | None = None  # has as many elements as tokens are pruned in it
        self.pruned: Pruned | None = None
        self._entered = False

    @property
    def chunks(self) -> bool:
        """Whether the block's feed-forward is called for some of the tokens at a time (``set_chunk_feed_forward``)."""
        block = self._block()
        return block is not None and block._chunk_size is not None and block._chunk_dim == 1

    @torch.no_grad()
    def choose(self, block: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        """Before the block: similarity is of its input, before the first norm."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        run, grid, score, like = self.transformer.run, self.transformer.grid, self.score, self.like_pruned
        self.pruned, self._entered = None, False
        if score is None or like is None:
            return
        if hidden_states.shape[:2] != score.shape:  # other tokens than the UNet's are left alone
            return
        # Offloading may bring the block to another device than the UNet was called on.
        bases = ops.select_base_tokens(score.to(hidden_states.device), grid, run.config.patch)
        self.pruned = Pruned(*plan_from_bases(hidden_states, bases, like.shape[0]))

    def forget(self, block: nn.Module, args: _Args, output: Any) -> None:
        self.pruned = None

    def enter(self, module: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
        """Only the kept tokens go in; all of them where the module is given something other than the block's tokens."""
        self._entered = False
        x = args[0] if args else kwargs["hidden_states"]
        if self.pruned is None or x.ndim != 3 or x.shape[:2] != self.pruned.source.shape:
            return None
        self._entered = True
        x = ops.gather_tokens(x, self.pruned.kept)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def enter_self_attention(self, attn: Any, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
        """A mask has a column for every token, and is left alone. Under ToDo queries are kept, keys are the grid's."""
        self._entered = False
        if self.pruned is None or kwargs.get("attention_mask") is not None:
            return None
        if keeps_maps(attn.processor):  # of all tokens
            return None
        if kwargs.get("encoder_hidden_states") is not None:
            return None
        todo = self._todo_on(attn)
        # ToDo's plan is among the arguments until ToDo's own hook takes it, and then on the transformer's state.
        plan: Plan | None = kwargs.get(ATTRIBUTE, None if todo is None else todo.transformer.plan)
        if todo is None or plan is None or plan.factor == (1, 1):
            return self.enter(attn, args, kwargs)
        self._entered = True
        plan = plan._replace(queries=self.pruned.kept)
        if ATTRIBUTE in kwargs:
            return args, {**kwargs, ATTRIBUTE: plan}
        todo.transformer.plan = plan
        return None

    def _todo_on(self, attn: Any) -> AttentionState | None:
        """ToDo's state of ``attn``. None where another processor was set since, which would not follow it."""
        if not isinstance(attn.processor, ToDoProcessor):
            return None
        state: AttentionState | None = getattr(attn, ATTRIBUTE, None)
        if state is None and not torch.compiler.is_compiling():
            # One that was set by hand looks for its grid at its first call, and would not find it with fewer tokens.
            height, width = self.transformer.grid
            state = adopt_from_call_stack(attn, height * width)
        return state

    def enter_cross_attention(self, attn: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
        """An IP-Adapter's masks are laid over all the tokens, so those go in."""
        self._entered = False
        return None if kwargs.get("ip_adapter_masks") is not None else self.enter(attn, args, kwargs)

    def leave(self, module: nn.Module, args: _Args, output: torch.Tensor) -> torch.Tensor:
        """Each pruned token gets what its most similar kept token got."""
        if not self._entered or self.pruned is None:
            return output
        self._entered = False
        return ops.recover_tokens(output, self.pruned.source)
