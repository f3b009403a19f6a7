"""UNets by their configurations alone, without weights: enough to count their operations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from diffusers.models import UNet2DConditionModel

from ..options.methods import SettingError, UnreachableError
from ..options.settings import ARCHITECTURES, SIZE_MULTIPLE, check_area, check_size
from .loading import UNET_KEYS, is_single_file, kind_of, load_config, loading, published_source, read_single_file
from .unets import on_meta

_SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # of UNet2DConditionModel, and here the number of heads
}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Arguments of UNet2DConditionModel by a short name: Stable Diffusion 1.5 and SDXL.
CONFIGS: dict[str, dict[str, Any]] = {"sd15": _SD15, "sdxl": _SDXL}
PIXELS_PER_LATENT = 8  # of their VAEs


@dataclass(frozen=True)
class Architecture:
    """A UNet without its weights.

    Args:
        name: as it was asked for.
        config: arguments of ``UNet2DConditionModel``.
        pixels_per_latent: pixels of the image per latent, along each axis.
    """

    name: str
    config: Mapping[str, Any]
    pixels_per_latent: int = PIXELS_PER_LATENT

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width, in pixels, that it was trained for; None if its configuration does not say."""
        sample = self.config.get("sample_size")
        if sample is None:
            return None
        height, width = (sample, sample) if isinstance(sample, int) else sample
        return height * self.pixels_per_latent, width * self.pixels_per_latent


def read_architecture(source: str) -> Architecture:
    """The UNet of a pipeline. Only configurations are read; of a single file, names and shapes of the weights.

    Args:
        source: "sd15", "sdxl", a folder saved by diffusers, a .safetensors or .ckpt file, or a Hub id.

    Raises:
        SettingError: it is none of these, or its UNet's configuration cannot be read;
            :class:`~todo_attn.options.methods.UnreachableError` if that is for lack of a network.
    """
    if source in CONFIGS:
        return Architecture(source, CONFIGS[source])
    if is_single_file(source):
        return Architecture(source, _config_of_single_file(source))
    try:
        config = load_config(UNet2DConditionModel, source, "unet")
    except UnreachableError:
        raise
    except SettingError as error:
        reason = " ".join(str(error.__cause__ or error.problem).split())
        known = ", ".join(CONFIGS)
        raise SettingError(
            "model", f"must be {known}, or a folder or Hub id of a pipeline with a UNet, got {source!r}: {reason}"
        ) from error
    made_by = config.get("_class_name", "UNet2DConditionModel")
    if "_class_name" not in config and _own_folder(source):  # a text encoder's has a config.json too
        made_by = "model of another library"
    if made_by != "UNet2DConditionModel":
        raise SettingError("model", f"must have a UNet2DConditionModel, and {source!r} has a {made_by}")
    return Architecture(source, config, _pixels_per_latent(source))


def _config_of_single_file(source: str) -> dict[str, Any]:
    """The configuration of the published model of its kind, if the file's UNet is as large."""
    tensors = read_single_file(source)
    kind = kind_of(source, tensors)
    hub_id = published_source(kind)
    known = {hub_id: name for name, hub_id in ARCHITECTURES.items()}
    if hub_id in known:
        config = CONFIGS[known[hub_id]]
    else:
        with loading(source):
            config = dict(UNet2DConditionModel.load_config(hub_id, subfolder="unet"))
    here = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(UNET_KEYS))
    published = sum(parameter.numel() for parameter in on_meta(config).parameters())
    if here != published:
        raise SettingError(
            "model",
            f"must have the UNet of {hub_id}, with {published} weights, if it is a single file, and {source!r} has "
            f"{here}: make a folder of it with save_pretrained",
        )
    return config


def _own_folder(source: str) -> bool:
    """Whether it is the folder of a UNet itself, not of a pipeline; diffusers reads either."""
    folder = Path(source).expanduser()
    return folder.is_dir() and not (folder / "unet" / "config.json").is_file()


def _pixels_per_latent(source: str) -> int:
    """As pipelines count it: by the VAE's downsamplings; without a VAE, the usual number."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if _own_folder(source):
            folder = folder.parent
        if not (folder / "vae" / "config.json").is_file():  # diffusers would take one in the folder itself
            return PIXELS_PER_LATENT
    try:
        config = AutoencoderKL.load_config(folder if folder.is_dir() else source, subfolder="vae")
        return 2 ** (len(config["block_out_channels"]) - 1)
    except (OSError, KeyError, ValueError):
        return PIXELS_PER_LATENT


def chosen_size(architecture: Architecture, height: int | None, width: int | None, times: int = 1) -> tuple[int, int]:
    """Height and width in pixels; None is ``times`` the side that the UNet was trained for.

    Raises:
        SettingError: a size that does not fit, or None if the UNet does not say its own.
    """
    sides = architecture.size or (None, None)
    sizes = []
    for name, given, trained in zip(("height", "width"), (height, width), sides, strict=True):
        normal = None if trained is None else times * trained
        size = normal if given is None else given
        if size is None:
            raise SettingError(name, "must be given: the model does not say its normal size")
        check_size(name, size, math.lcm(SIZE_MULTIPLE, architecture.pixels_per_latent))
        sizes.append(size)
    height, width = sizes
    check_area(height, width)
    return height, width
