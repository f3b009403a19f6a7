"""The settings of a comparison, as validated plain data: all that can be checked before a model is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.dtypes import DTYPES
from ..example import example_pipeline
from .methods import MethodOptions, SettingError

SIZE_MULTIPLE = 8  # required by diffusers' own pipelines, whatever their VAE
MOST_STEPS = 1000  # the timesteps that models are trained on
MIN_SIZE = 16  # SSIM's window is 11 pixels wide
MAX_SIDE = 16384  # of a square: no machine has the memory for more, and the model of time does not hold there
# Short name: diffusers' class, and what is added to the pipeline's own scheduler configuration.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
SINGLE_FILES = (".safetensors", ".ckpt")
# Architectures by a short name, which other commands take, and a Hub id with weights of each.
ARCHITECTURES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
CANNOT_USE_DITS = "DiTs (SD 3, Flux), which have a transformer instead of a UNet, are not supported"
_HUB_ID = re.compile(r"^\w[\w.-]*/[\w.-]+$")  # owner/name

SHIPPED_PROMPTS = (
    "snowy mountains at sunset with a lake, a clear sky, the sun on the left",
    "green hills by day with a flower meadow, white clouds, the sun in the center",
)
OTHER_PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "an old lighthouse on a rocky coast, oil painting",
)
SHIPPED_STEPS, OTHER_STEPS = 10, 30
SHIPPED_GUIDANCE = 3.0
RECOMMEND_MINUTES = 6.0  # of its search


@dataclass(frozen=True, kw_only=True)
class CompareSettings(MethodOptions):
    """The settings of one comparison; each argument is the option of ``todo-attn compare`` with the same name.

    Those of :class:`~todo_attn.options.methods.MethodOptions` and:

    Args:
        model: a folder in diffusers' format, a .safetensors or .ckpt file, or a Hub id; None is the shipped pipeline.
        prompts: the captions; if empty, two that suit the model.
        seeds: one image per prompt and seed, the starting noise drawn on the CPU.
        height, width: in pixels; None is twice the model's normal size.
        steps: of the scheduler; None is 10 for the shipped pipeline and 30 for others.
        guidance: the guidance scale; None is 3 for the shipped pipeline and the pipeline's own for others.
        scheduler: a name in ``SCHEDULERS``; None is the pipeline's own.
        device: "auto" (CUDA if there is one, else the CPU) or a torch device.
        dtype: "auto" (float16 on CUDA, else float32), or torch's name or a short one in ``DTYPES``.
        warmup_steps: steps of each method's warm-up, which is not counted.
        variant: of the weight files, such as "fp16"; None takes the only one in the folder.
        config: for a single file, the folder or Hub id of a model of the same kind, whose configuration it gets; None
            is the published model's.

    Raises:
        SettingError: the first argument that does not fit.
    """

    model: str | None = None
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    warmup_steps: int = 2
    variant: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        def fill(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        _check_model(self.source)
        if self.config is not None:
            _check_config(self.config, self.source)
        for name in ("height", "width"):
            check_size(name, getattr(self, name), SIZE_MULTIPLE)
        fill("prompts", tuple(self.prompts) or (OTHER_PROMPTS if self.model else SHIPPED_PROMPTS))
        if not all(isinstance(p, str) and p.strip() for p in self.prompts):
            raise SettingError("prompts", "must not be empty")
        if not self.seeds or not all(0 <= s < 2**63 for s in self.seeds):
            raise SettingError("seeds", f"must be integers from 0 to 2^63 - 1, got {list(self.seeds)}")
        fill("steps", (OTHER_STEPS if self.model else SHIPPED_STEPS) if self.steps is None else self.steps)
        for name in ("steps", "warmup_steps"):
            check_steps(name, getattr(self, name))
        if self.guidance is None and not self.model:
            fill("guidance", SHIPPED_GUIDANCE)
        if self.guidance is not None and not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise SettingError("guidance", f"must be a number of at least 0, got {self.guidance}")
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise SettingError("scheduler", f"must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}")
        fill("device", resolved_device(self.device))
        fill("dtype", _resolved_dtype(self.dtype, self.device))
        super().__post_init__()

    @property
    def source(self) -> str:
        """The folder or Hub id to load."""
        return str(example_pipeline()) if self.model is None else self.model

    @property
    def images(self) -> list[tuple[str, int]]:
        """Prompt and seed of each image, in order."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self) | {"prompts": list(self.prompts), "seeds": list(self.seeds)}


def check_steps(name: str, steps: int) -> None:
    """Refuse a number of steps that no scheduler has, before a schedule of that length is made."""
    if not 1 <= steps <= MOST_STEPS:
        raise SettingError(name, f"must be from 1 to {MOST_STEPS}, got {steps}")


def _check_model(source: str) -> None:
    """Refuse anything but a pipeline with a UNet; what may be a Hub id is left to the loader."""
    shipped = source == str(example_pipeline())
    path = Path(source).expanduser()
    if source in ARCHITECTURES and not path.exists():
        problem = (
            f"must have weights, and {source!r} names a UNet's shapes alone: give a folder saved by diffusers, a "
            f"single file, or a Hub id such as {ARCHITECTURES[source]}"
        )
        raise SettingError("model", problem)
    if not path.exists():
        if shipped:
            raise SettingError("model", f"must be given: the shipped pipeline is not in {source}")
        if not _may_be_hub_id(source):
            raise SettingError("model", f"must be a folder or a Hub id, owner/name, and there is no folder {source!r}")
        return
    if path.is_file():
        if path.suffix not in SINGLE_FILES:
            kinds = " or ".join(SINGLE_FILES)
            raise SettingError(
                "model", f"must be a folder saved by diffusers, a {kinds} file, or a Hub id, got {source!r}"
            )
        return
    index = path / "model_index.json"
    if not index.is_file():
        what = "the shipped pipeline's folder" if shipped else repr(source)
        raise SettingError("model", f"must be a folder saved by diffusers, and {what} has no model_index.json")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError("model", f"must be a readable folder saved by diffusers: {index}: {error}") from None
    check_parts(source, parts if isinstance(parts, dict) else ())


def _may_be_hub_id(source: str) -> bool:
    """Whether it has the form owner/name. "examples/x" is taken for a path if there is a folder "examples"."""
    return _HUB_ID.match(source) is not None and not Path(source).expanduser().parent.is_dir()


def check_parts(source: str, parts: Collection[str]) -> None:
    """Refuse the model ``source`` if a UNet is not among its parts."""
    if "unet" not in parts:
        why = f" but a transformer: {CANNOT_USE_DITS}" if "transformer" in parts else ""
        raise SettingError("model", f"must be a pipeline with a UNet, and {source!r} has none{why}")


def _check_config(config: str, source: str) -> None:
    """Refuse ``config`` if the model is not a single file, or if ``config`` is not a pipeline."""
    if not Path(source).expanduser().is_file():
        raise SettingError("config", f"is for a model in a single file, and {source!r} is none")
    folder = Path(config).expanduser()
    if not (folder / "model_index.json").is_file() and (folder.exists() or not _may_be_hub_id(config)):
        raise SettingError("config", f"must be a folder saved by diffusers or a Hub id, got {config!r}")


def check_size(name: str, size: int | None, multiple: int) -> None:
    """Refuse a given height or width, in pixels, that does not fit."""
    if size is not None and (size < MIN_SIZE or size % multiple):
        raise SettingError(name, f"must be a multiple of {multiple} and at least {MIN_SIZE}, got {size}")


def check_area(height: int, width: int) -> None:
    """Refuse an image with more pixels than a square of ``MAX_SIDE``, whatever its proportions."""
    if height * width > MAX_SIDE**2:
        most = f"as many pixels as {MAX_SIDE} x {MAX_SIDE}"
        raise SettingError("height", f"times the width must be at most {most}, got {height} x {width}")


def resolved_device(device: str, mps: bool = True) -> str:
    """The torch device that ``device`` names: "auto" is CUDA if there is one, else the CPU.

    Raises:
        SettingError: there is no such device here, or it is mps and ``mps`` is false.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = "auto, cpu, cuda, cuda:N or mps" if mps else "auto, cpu, cuda or cuda:N"
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise SettingError("device", f"must be {known}, got {device!r}") from None
    if parsed.type == "cpu":
        return "cpu"
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (parsed.index or 0) < count:
            return device
        raise SettingError("device", f"must be one that torch sees, which has {count} CUDA devices, got {device!r}")
    if mps and parsed.type == "mps" and torch.backends.mps.is_available():
        return device
    raise SettingError("device", f"must be {known}, and present, got {device!r}")


def _resolved_dtype(dtype: str, device: str) -> str:
    if dtype == "auto":
        return "float16" if device.startswith("cuda") else "float32"
    name = DTYPES.get(dtype, dtype)
    if name not in DTYPES.values():
        known = ", ".join(("auto", *DTYPES.values(), *DTYPES))
        raise SettingError("dtype", f"must be one of {known}, got {dtype!r}")
    return name
