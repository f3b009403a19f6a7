"""The nodes. They need ComfyUI's model patcher, which they are given, and import nothing of ComfyUI."""

from __future__ import annotations

from typing import Any

from todo_attn.config import ArgumentError, DaToConfig, ToDoConfig
from todo_attn.config.modes import MODES

from .dato import DaToPatch
from .levels import levels_of
from .steps import Steps
from .todo import ToDoPatch

CATEGORY = "todo_attn"
_MODEL = ("MODEL", {"tooltip": "A UNet: Stable Diffusion 1.x, 2.x, SDXL, or a fine-tune of one. It is not changed."})
_PERCENT = {"min": 0.0, "max": 1.0, "step": 0.001, "round": 0.001}
_STEPS = {
    "start_percent": ("FLOAT", {"default": 0.0, **_PERCENT, "tooltip": "Act from this share of the sampling on."}),
    "end_percent": (
        "FLOAT",
        {"default": 1.0, **_PERCENT, "tooltip": "Act up to this share. Below 1, the last steps stay exact."},
    ),
}


def read_factor(text: str) -> Any:
    """``text`` as a factor of :class:`ToDoConfig`: "auto", "2", or "1: 4, 2: 2" by level, with "finest" as a level.

    Raises:
        ArgumentError: ``text`` is none of these. ToDoConfig checks the numbers.
    """
    text = text.strip()
    if ":" not in text:
        return _number(text)
    factors: dict[Any, Any] = {}
    for part in text.split(","):
        level, colon, factor = (word.strip() for word in part.partition(":"))
        if not (level and colon and factor):
            raise ArgumentError("factor", f"must be like '1: 4, 2: 2', level: factor, got {part.strip()!r} in {text!r}")
        key = _number(level)
        if key in factors:
            raise ArgumentError("factor", f"must name a level once, got {level} twice in {text!r}")
        factors[key] = _number(factor)
    return factors


def _number(text: str) -> int | float | str:
    """The number that ``text`` is, or else ``text`` itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


class ToDoNode:
    """ToDo: self-attention with keys and values on a coarser grid."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Token downsampling (ToDo): makes a UNet faster at high resolution. Every pixel still asks; keys and values "
        "are taken on a coarser grid. By default each level keeps at most 4096 keys, so nothing changes at 512 "
        "(SD 1.x) or 1024 (SDXL) and below. The console says what it does at your size."
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    SEARCH_ALIASES = ("todo", "token downsampling", "token merging", "speed up attention")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "model": _MODEL,
                "factor": (
                    "STRING",
                    {
                        "default": "auto",
                        "tooltip": "auto: the smallest factor that leaves at most max_keys keys, at every level. "
                        "2 or 1.5: that factor at every level. 1: 4, 2: 2: by level, the others exact. A level is 1, "
                        "2, 4, 8 (SD 1.x) or 2, 4 (SDXL), or finest.",
                    },
                ),
                "max_keys": (
                    "INT",
                    {
                        "default": 4096,
                        "min": 1,
                        "max": 1 << 20,
                        "tooltip": "For factor auto: the most keys. 1024 is faster and a little less faithful.",
                    },
                ),
                "mode": (
                    list(MODES),
                    {"tooltip": "How coarse tokens are taken. nearest keeps more of fine detail than mean."},
                ),
                **_STEPS,
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, factor: str | None = None) -> bool | str:  # noqa: N802
        """What is wrong with ``factor``, before a model is loaded; an input that is linked is not known yet."""
        try:
            if factor is not None:
                ToDoConfig(read_factor(factor))
        except ValueError as error:
            return str(error)
        return True

    def patch(
        self, model: Any, factor: str, max_keys: int, mode: Any, start_percent: float, end_percent: float
    ) -> tuple[Any]:
        """A clone of ``model`` under ToDo.

        Raises:
            ArgumentError: the model has no self-attention over an image, or lacks a level of ``factor``; or another
                argument does not fit.
        """
        config = ToDoConfig(read_factor(factor), max_kv_tokens=max_keys, mode=mode)
        patch = ToDoPatch(config, levels_of(model), Steps(model, start_percent, end_percent))
        patched = model.clone()
        patched.set_model_attn1_patch(patch)
        return (patched,)


class DaToNode:
    """DaTo's token pruning, without its caching."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "DaTo's token pruning: the most redundant tokens stay out of the finest self-attentions, and take the output "
        "of the most similar token that is left. This node does not cache: DaTo's large speed-ups come from reusing "
        "features between steps, which a patch of attention cannot do. It combines with the ToDo node, in any order, "
        "and not with other nodes that merge or tile queries (TomePatchModel, HyperTile)."
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    SEARCH_ALIASES = ("dato", "token pruning", "token merging")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {
            "required": {
                "model": _MODEL,
                "prune_ratio": (
                    "FLOAT",
                    {
                        "default": 0.4,
                        "min": 0.0,
                        "max": 0.75,
                        "step": 0.05,
                        "round": 0.001,
                        "tooltip": "The share of tokens that stays out.",
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2**63 - 1,
                        "control_after_generate": False,
                        "tooltip": "Of the noise that chooses one token of each 2 x 2 to keep.",
                    },
                ),
                **_STEPS,
            }
        }

    def patch(self, model: Any, prune_ratio: float, seed: int, start_percent: float, end_percent: float) -> tuple[Any]:
        """A clone of ``model`` under DaTo's pruning.

        Raises:
            ArgumentError: the model has no self-attention over an image, or an argument does not fit.
        """
        config = DaToConfig(prune_ratio, dynamics_weight=0.0, seed=seed)
        patch = DaToPatch(config, levels_of(model), Steps(model, start_percent, end_percent))
        patched = model.clone()
        patched.set_model_attn1_patch(patch.enter)
        patched.set_model_attn1_output_patch(patch.leave)
        return (patched,)


NODE_CLASS_MAPPINGS = {"TodoAttnToDo": ToDoNode, "TodoAttnDaTo": DaToNode}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TodoAttnToDo": "ToDo (token downsampling)",
    "TodoAttnDaTo": "DaTo (token pruning, no cache)",
}
