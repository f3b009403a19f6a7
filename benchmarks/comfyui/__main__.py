"""The nodes in a real ComfyUI: images with and without them, seconds, and how near they are to diffusers' ToDo.

    python -m benchmarks.comfyui /path/to/ComfyUI --out results.json

Run it with the Python that has ComfyUI's requirements, diffusers and todo_attn's own. It makes checkpoints with random
weights in a work folder, starts ComfyUI's server on the CPU there, and posts workflows to its HTTP API.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from todo_attn import ToDoConfig
from todo_attn.machine import describe

from .checkpoint import STRUCTURES, Structure, write_checkpoint, write_config
from .latents import difference, read_latent
from .reference import Reference
from .server import Done, Server, serve
from .workflow import DATO, DATO_INPUTS, SAMPLER, TODO, TODO_INPUTS, Task, workflow

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
# Of a latent under ToDo: the largest difference between ComfyUI's and diffusers', over the standard deviation. Both
# compute in fp32, and differ in the order of their sums.
TOLERANCE = 1e-4
SETTINGS = ("structure", "width", "height", "steps", "node", "inputs")  # what makes two rows the same


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comfyui", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("comfyui", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--work", type=Path, default=Path("comfyui-work"), help="checkpoints, images, latents")
    parser.add_argument("--out", type=Path, default=Path("comfyui.json"))
    parser.add_argument("--structures", default="sd15-small,sdxl-small", help=f"some of {','.join(STRUCTURES)}")
    parser.add_argument("--sizes", default="1024x1024,1920x1080", help="width x height, in pixels")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--max-keys", type=int, default=4096, help="of the ToDo node")
    parser.add_argument("--dato", action="store_true", help="the node of DaTo's pruning too")
    parser.add_argument("--dense-reference", action="store_true", help="compare dense with diffusers too")
    arguments = parser.parse_args()

    sys.path.insert(0, str(arguments.comfyui.resolve()))
    import comfy.cli_args  # type: ignore[import-not-found]

    comfy.cli_args.args.cpu = True
    work = arguments.work.resolve()
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes.split(",")]
    for name in arguments.structures.split(","):
        structure = STRUCTURES[name]
        checkpoint = prepare(structure, work)
        tasks = list(tasks_of(checkpoint.name, sizes, arguments))
        done = asyncio.run(run_all(arguments.comfyui.resolve(), work, tasks))
        rows = compare(structure, work, checkpoint, tasks, done, arguments.dense_reference)
        write(arguments.out, rows)


def prepare(structure: Structure, work: Path) -> Path:
    """The checkpoint of ``structure`` in the ``work`` folder, which also gets the node pack."""
    checkpoint = work / "models" / "checkpoints" / f"todo_attn_{structure.name}.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if not checkpoint.exists():
        write_checkpoint(structure, checkpoint)
    write_config(structure, work / structure.name)
    link = work / "custom_nodes" / "todo_attn"
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(PACK)
    return checkpoint


def tasks_of(checkpoint: str, sizes: list[tuple[int, ...]], arguments: argparse.Namespace) -> Iterator[Task]:
    """A small image first, which loads everything; then each size dense and under each node."""
    yield Task(checkpoint, 64, 64, 1)
    for width, height in sizes:
        yield Task(checkpoint, height, width, arguments.steps)
        yield Task(
            checkpoint, height, width, arguments.steps, ((TODO, TODO_INPUTS | {"max_keys": arguments.max_keys}),)
        )
        if arguments.dato:
            yield Task(checkpoint, height, width, arguments.steps, ((DATO, DATO_INPUTS),))


async def run_all(comfyui: Path, work: Path, tasks: list[Task]) -> list[Done]:
    async with serve(comfyui, work) as server:
        return [await run(server, task) for task in tasks]


async def run(server: Server, task: Task) -> Done:
    done = await server.run(workflow(task))
    print(
        f"{task.checkpoint} {task.name}: {done.seconds[SAMPLER]:.1f} s, {done.cpu_seconds[SAMPLER]:.1f} s of CPU",
        flush=True,
    )
    return done


def compare(
    structure: Structure, work: Path, checkpoint: Path, tasks: list[Task], done: list[Done], dense_too: bool
) -> list[dict[str, Any]]:
    """A row for each task but the first: seconds, what the node changes, and the distance to diffusers."""
    reference = Reference(checkpoint, work / structure.name, tasks[0].prompt)
    rows, dense = [], (torch.empty(0), torch.empty(0), math.nan)
    for task, ran in list(zip(tasks, done, strict=True))[1:]:
        node, inputs = task.nodes[0] if task.nodes else (None, {})
        latent, image = read_latent(ran.files["numbers"][0]), read_image(ran.files["image"][0])
        seconds, cpu_seconds = ran.seconds[SAMPLER], ran.cpu_seconds[SAMPLER]
        row: dict[str, Any] = {"structure": structure.name, "what": structure.text}
        row |= {
            "width": task.width,
            "height": task.height,
            "steps": task.steps,
            "node": node,
            "inputs": inputs,
            "sampler_seconds": round(seconds, 2),
        }
        row["sampler_cpu_seconds"] = round(cpu_seconds, 2)
        if node is None:
            dense = (latent, image, cpu_seconds)
        else:
            row["speed_up_of_cpu_seconds"] = round(dense[2] / cpu_seconds, 3)
            row["image_psnr_to_dense"] = round(psnr(image, dense[1]), 2)
            row["latent_difference_to_dense"] = difference(latent, dense[0])
        if node == TODO or (node is None and dense_too):
            config = ToDoConfig(max_kv_tokens=inputs["max_keys"]) if node == TODO else None
            expected = reference.latent(task, config)
            row["latent_difference_to_diffusers"] = difference(latent, expected)
            row["within_tolerance"] = row["latent_difference_to_diffusers"] < TOLERANCE
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def read_image(path: Path) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * math.log10(max(float((a - b).square().mean()), 1e-12))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add ``rows`` to ``path``, in place of those of the same settings."""
    import comfyui_version  # type: ignore[import-not-found]

    about = {"comfyui": comfyui_version.__version__, **describe(torch.device("cpu")), "tolerance": TOLERANCE}
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    by_settings = {tuple(str(row[key]) for key in SETTINGS): row for row in known + rows}
    path.write_text(json.dumps({**about, "rows": list(by_settings.values())}, indent=2) + "\n")


if __name__ == "__main__":
    main()
