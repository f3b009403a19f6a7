"""Loads a model or its configuration from a folder, a single file or the Hub, and explains failures."""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import single_file_utils
from huggingface_hub import model_info
from huggingface_hub.errors import LocalEntryNotFoundError

from ..logs import logger, one_line
from ..options.methods import SettingError, UnreachableError
from ..options.settings import CANNOT_USE_DITS, SINGLE_FILES, check_parts
from ..peak_memory import is_out_of_memory

# Kinds of single-file checkpoint, as diffusers tells them apart by their keys, and the pipeline for each.
_PIPELINES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
}
UNET_KEYS = "model.diffusion_model."  # prefix of a UNet's weights in a single file
_A_PIPELINE_HAS = UNET_KEYS + "input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"


def local_path(source: str) -> str:
    """``source`` with ~ expanded if there is such a file or folder; else unchanged, as it may be a Hub id."""
    path = Path(source).expanduser()
    return str(path) if path.exists() else source


def is_single_file(source: str) -> bool:
    """Whether ``source`` is a checkpoint in one file."""
    return Path(source).suffix in SINGLE_FILES and Path(source).expanduser().is_file()


def load_weights(
    kind: type[Any], source: str, dtype: torch.dtype, *, variant: str | None = None, config: str | None = None
) -> Any:
    """A pipeline, or the UNet of one, with its weights on the CPU.

    Args:
        kind: ``DiffusionPipeline`` or ``UNet2DConditionModel``.
        source: a folder, or a Hub id; for a pipeline also a single file.
        variant: of the weight files. None takes the only one in the folder, with a warning.
        config: for a single file, the folder or Hub id of its configuration; None is the published model of its
            kind, from the Hub.

    Raises:
        SettingError: the model cannot be loaded, and why; :class:`UnreachableError` if that is for lack of a network.
        torch.OutOfMemoryError: it does not fit in memory.
    """
    path = local_path(source)
    with loading(source):
        if is_single_file(path):
            pipeline = getattr(diffusers, _PIPELINES[_single_file_kind(source)])
            return pipeline.from_single_file(path, config=config, torch_dtype=dtype)
        if variant is None and (variant := _only_variant(Path(path))) is not None:
            logger.warning("%s has weights of the variant %s only: they are loaded", source, variant)
        inside = {} if issubclass(kind, diffusers.DiffusionPipeline) else {"subfolder": "unet"}
        loaded = kind.from_pretrained(path, dtype=dtype, variant=variant, local_files_only=_is_offline(path), **inside)
        # Older versions of diffusers call the argument torch_dtype, ignore dtype and load float32.
        return loaded if loaded.dtype == dtype else loaded.to(dtype)


def load_config(kind: type[Any], source: str, subfolder: str) -> dict[str, Any]:
    """The configuration of one part of a pipeline, of a folder or a Hub id.

    Raises:
        SettingError: there is none, and why; :class:`UnreachableError` if that is for lack of a network.
    """
    path = local_path(source)
    with loading(source), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # diffusers uses deprecated arguments of the Hub's client
        return dict(kind.load_config(path, subfolder=subfolder, local_files_only=_is_offline(path)))


def _is_offline(path: str) -> bool:
    """Whether the Hub cannot be reached. One request tells; diffusers would retry its own for half a minute.

    Raises:
        SettingError: it is a pipeline without a UNet, which is better found before gigabytes are downloaded.
    """
    index = Path(path) / "model_index.json"
    if os.path.exists(path):
        if index.is_file():
            check_parts(path, json.loads(index.read_text(encoding="utf-8")))
        return False
    try:
        files = [file.rfilename for file in model_info(path, timeout=10).siblings or ()]
    except Exception as error:  # of any kind: loading the model says what is wrong
        return _is_unreachable(error)
    if index.name in files:
        check_parts(path, {name.partition("/")[0] for name in files})
    return False


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turn whatever is raised inside into a ``SettingError`` about ``source``."""
    try:
        yield
    except (SettingError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any kind: the Hub's, the file system's, JSON's, a missing package's
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        if is_single_file(source):
            raise _single_file_refusal(source, error) from error
        if not Path(source).expanduser().exists() and _is_unreachable(error):
            problem = f"{source!r} is not in the local cache, and the Hub cannot be reached"
            raise UnreachableError("model", problem) from error
        raise SettingError("model", f"{source!r} cannot be loaded: {one_line(error)}{_hint(error)}") from error


def _single_file_kind(source: str) -> str:
    return kind_of(source, read_single_file(source))


def read_single_file(source: str) -> Mapping[str, torch.Tensor]:
    """The tensors of a single file by name; a .safetensors file is memory-mapped."""
    with loading(source):
        tensors: dict[str, torch.Tensor] = single_file_utils.load_single_file_checkpoint(local_path(source))
    return tensors


def kind_of(source: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """What a single file holds, by diffusers' name: "v1", "v2", "xl_base" or "playground-v2-5".

    Raises:
        SettingError: it holds anything else.
    """
    kind: str = single_file_utils.infer_diffusers_model_type(tensors)
    if kind in _PIPELINES and all(key in tensors for key in _A_PIPELINE_HAS):
        return kind
    if kind in _PIPELINES:  # diffusers also says "v1" of anything unknown
        problem = "holds no whole pipeline (a LoRA, a VAE or a UNet alone?)"
    elif kind in ("inpainting", "inpainting_v2", "xl_inpaint", "xl_refiner", "upscale", "instruct-pix2pix"):
        problem = f"is of the kind {kind}, which does not make images from text alone"
    else:
        problem = f"is of the kind {kind}: {CANNOT_USE_DITS}"
    raise SettingError("model", f"must be a checkpoint of Stable Diffusion 1.x, 2.x or SDXL, and {source!r} {problem}")


def published_source(kind: str) -> str:
    """The Hub id from which diffusers reads the configuration of a single file of this kind."""
    return single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def _single_file_refusal(source: str, error: Exception) -> SettingError:
    if _is_unreachable(error):
        hub_id = published_source(_single_file_kind(source))
        return UnreachableError(
            "model",
            f"{source!r} is a single file, which holds no configuration: that of {hub_id!r} is not in the local cache, "
            "and the Hub cannot be reached. Give compare the folder of a model of the same kind as --config, or make a "
            f"folder of the file on a machine with a network: diffusers.{_PIPELINES[_single_file_kind(source)]}"
            ".from_single_file(FILE).save_pretrained(FOLDER)",
        )
    return SettingError("model", f"{source!r} cannot be loaded: {one_line(error)}")


def _only_variant(folder: Path) -> str | None:
    """The variant of the UNet's weights if the folder has just one variant and no plain files; else None."""
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    names = [p.name for p in unet.glob("diffusion_pytorch_model*") if p.suffix in (".safetensors", ".bin")]
    variants = {name.split(".")[1].split("-")[0] if name.count(".") > 1 else None for name in names}
    return variants.pop() if len(variants) == 1 else None


def _is_unreachable(error: BaseException) -> bool:
    """Whether ``error`` comes from a missing network."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (ConnectionError, TimeoutError, socket.gaierror, LocalEntryNotFoundError)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _hint(error: Exception) -> str:
    text = str(error)
    if "no file named" in text or "variant=" in text:
        return " (for weights in files such as NAME.fp16.safetensors, give --variant fp16)"
    return ""
