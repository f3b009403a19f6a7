"""The nodes beside ComfyUI's own that patch the same model, and what ComfyUI answers to wrong inputs.

    python -m benchmarks.comfyui.chains /path/to/ComfyUI

It uses the checkpoints and the work folder of ``python -m benchmarks.comfyui``.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import torch

from .checkpoint import STRUCTURES
from .latents import difference, read_latent
from .server import Server, WorkflowError, serve
from .workflow import DATO, DATO_INPUTS, TODO, TODO_INPUTS, Task, workflow

Nodes = tuple[tuple[str, dict[str, Any]], ...]
_SIZE = (328, 264)  # width and height: odd grids of tokens
_TODO = (TODO, TODO_INPUTS | {"factor": "finest: 2"})
_DATO = (DATO, DATO_INPUTS)
_OTHERS: Nodes = (
    ("FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
    ("TomePatchModel", {"ratio": 0.3}),
    ("PerturbedAttentionGuidance", {"scale": 3.0}),
    ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    (
        "PatchModelAddDownscale",
        {
            "block_number": 3,
            "downscale_factor": 2.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "downscale_after_skip": True,
            "downscale_method": "bicubic",
            "upscale_method": "bicubic",
        },
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comfyui.chains", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--work", type=Path, default=Path("comfyui-work"))
    parser.add_argument("--structures", default="sdxl-small", help=f"some of {','.join(STRUCTURES)}")
    arguments = parser.parse_args()
    for structure in arguments.structures.split(","):
        asyncio.run(
            _try_all(arguments.comfyui.resolve(), arguments.work.resolve(), f"todo_attn_{structure}.safetensors")
        )


async def _try_all(comfyui: Path, work: Path, checkpoint: str) -> None:
    async with serve(comfyui, work) as server:
        for other in _OTHERS:
            one = await _latent(server, checkpoint, (other, _TODO))
            _report(f"{other[0]}, then ToDo", one, await _latent(server, checkpoint, (other,)))
            _report(f"ToDo, then {other[0]}", await _latent(server, checkpoint, (_TODO, other)), one)
        both = await _latent(server, checkpoint, (_DATO, _TODO))
        _report("DaTo, then ToDo", both, await _latent(server, checkpoint, (_DATO,)))
        _report("ToDo, then DaTo", await _latent(server, checkpoint, (_TODO, _DATO)), both)
        for wrong in ({"factor": "fast"}, {"factor": "16: 2"}, {"start_percent": 0.5, "end_percent": 0.5}):
            _report(f"ToDo with {wrong}", await _latent(server, checkpoint, ((TODO, TODO_INPUTS | wrong),)), None)


async def _latent(server: Server, checkpoint: str, nodes: Nodes) -> torch.Tensor | str:
    """The latent that ``nodes`` lead to, or ComfyUI's error."""
    width, height = _SIZE
    try:
        done = await server.run(workflow(Task(checkpoint, height, width, 1, nodes)))
    except WorkflowError as error:
        return str(error)
    return read_latent(done.files["numbers"][0])


def _report(what: str, latent: torch.Tensor | str, other: torch.Tensor | str | None) -> None:
    if isinstance(latent, str):
        print(f"{what}: {latent}", flush=True)
    elif isinstance(other, torch.Tensor):
        print(f"{what}: runs, differs by {difference(latent, other):.3g}", flush=True)
    else:
        print(f"{what}: runs", flush=True)


if __name__ == "__main__":
    main()
