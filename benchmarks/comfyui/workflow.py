"""The workflow that is posted: a text to an image, with or without nodes that patch the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Workflow = dict[str, dict[str, Any]]  # ComfyUI's API format: nodes by id
SAMPLER = "sample"


@dataclass(frozen=True)
class Task:
    """One image: its size, its steps, and the nodes between checkpoint and sampler, with their inputs (none: dense)."""

    checkpoint: str
    height: int
    width: int
    steps: int = 1
    nodes: tuple[tuple[str, dict[str, Any]], ...] = ()
    prompt: str = "an old lighthouse on a rocky coast"
    seed: int = 1

    @property
    def name(self) -> str:
        return "-".join([f"{self.width}x{self.height}", *(node for node, _ in self.nodes)])


TODO, DATO = "TodoAttnToDo", "TodoAttnDaTo"
TODO_INPUTS: dict[str, Any] = {
    "factor": "auto",
    "max_keys": 4096,
    "mode": "nearest",
    "start_percent": 0.0,
    "end_percent": 1.0,
}
DATO_INPUTS: dict[str, Any] = {"prune_ratio": 0.4, "seed": 0, "start_percent": 0.0, "end_percent": 1.0}


def workflow(task: Task) -> Workflow:
    """``task`` in ComfyUI's API format. Guidance is off (cfg 1), so each step calls the UNet once."""
    model: list[Any] = ["load", 0]
    nodes: Workflow = {
        "load": _node("CheckpointLoaderSimple", ckpt_name=task.checkpoint),
        "text": _node("CLIPTextEncode", clip=["load", 1], text=task.prompt),
        "latent": _node("EmptyLatentImage", width=task.width, height=task.height, batch_size=1),
    }
    for number, (kind, inputs) in enumerate(task.nodes):
        nodes[f"patch {number}"] = _node(kind, model=model, **inputs)
        model = [f"patch {number}", 0]
    nodes |= {
        SAMPLER: _node(
            "KSampler",
            model=model,
            seed=task.seed,
            steps=task.steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["latent", 0],
            denoise=1.0,
        ),
        "decode": _node("VAEDecode", samples=[SAMPLER, 0], vae=["load", 2]),
        "image": _node("SaveImage", images=["decode", 0], filename_prefix=task.name),
        "numbers": _node("SaveLatent", samples=[SAMPLER, 0], filename_prefix=task.name),
    }
    return nodes


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
