"""One forward of a full-size UNet, random weights, diffusers' own attention against ToDo and other peers.

python -m benchmarks.unet --device cpu
python -m benchmarks.unet --device cuda --model sdxl --size 2048 --size 1920x1080 --methods dense,todo,tome
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

import todo_attn
from benchmarks import models
from todo_attn import ToDoConfig
from todo_attn.bench import harness, machine
from todo_attn.bench.harness import Meter, Rounds, Side

RESULTS = Path(__file__).parent / "results"
METHODS = ("dense", "todo", "tome")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOME_RATIO = 0.5  # tomesd's own default
Size = tuple[int, int]  # height, width in pixels


class Forward:
    """One call of the UNet; call number ``observed`` also finds what share of it self-attention takes."""

    def __init__(
        self, model: UNet2DConditionModel, inputs: dict[str, Any], info: dict[str, Any], observed: int, compiled: bool
    ) -> None:
        self.model, self.info, self.observed, self.calls = model, info, observed, 0
        self.run = torch.compile(model, dynamic=False) if compiled else model
        self.sample, self.others = inputs["sample"], {k: v for k, v in inputs.items() if k != "sample"}

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        if self.calls != self.observed or self.run is not self.model:  # hooks would cut a compiled graph in pieces
            return self._forward()
        with self_attention(self.model) as spans:
            start = harness.stamp(self.model.device)
            output = self._forward()
            whole = harness.between(start, harness.stamp(self.model.device))
        self.info["self_attention_share"] = sum(harness.between(*span) for span in spans) / whole
        return output

    @torch.inference_mode()
    def _forward(self) -> torch.Tensor:
        return self.run(self.sample, **self.others, return_dict=False)[0]


@contextmanager
def self_attention(model: UNet2DConditionModel) -> Iterator[list[tuple[Any, Any]]]:
    """Collects the start and end stamps of every self-attention (attn1, its projections included) inside."""
    starts: list[Any] = []
    spans: list[tuple[Any, Any]] = []

    def enter(*_: Any) -> None:
        starts.append(harness.stamp(model.device))

    def leave(*_: Any) -> None:
        spans.append((starts.pop(), harness.stamp(model.device)))

    layers = [module for name, module in model.named_modules() if name.endswith(".attn1")]
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def sides(
    unet: UNet2DConditionModel,
    inputs: dict[str, Any],
    methods: Sequence[str],
    configs: dict[str, ToDoConfig],
    observed: int,
    compiled: bool = False,
) -> list[Side]:
    """The baseline first, then the contenders: each its own module tree over the same weights."""

    def side(name: str, patch: Callable[[UNet2DConditionModel], None], **info: Any) -> Side:
        def build() -> Forward:
            model = models.twin(unet)
            model.set_attn_processor(AttnProcessor2_0())
            patch(model)
            return Forward(model, inputs, info, observed, compiled)

        return Side(name, build, info)

    def tome(model: UNet2DConditionModel) -> None:
        import tomesd

        tomesd.apply_patch(model, ratio=TOME_RATIO)

    chosen = [side("dense", lambda model: None, processor="AttnProcessor2_0")]
    if "todo" in methods:
        for name, config in configs.items():
            patch = lambda model, config=config: todo_attn.apply_todo(model, config)  # noqa: E731
            chosen.append(side(name, patch, config=config.to_dict()))
    if "tome" in methods:
        chosen.append(side("tome", tome, ratio=TOME_RATIO))
    return chosen


def check_output(baseline: torch.Tensor, output: torch.Tensor) -> None:
    """An output that no image could come from is not worth timing."""
    if output.shape != baseline.shape:
        raise ValueError(f"output must have the shape {tuple(baseline.shape)}, got {tuple(output.shape)}")
    if not output.isfinite().all():
        raise ValueError("output must be finite")


def check_exact(unet: UNet2DConditionModel) -> None:
    """At factor 1 ToDo is dense attention: the same bits on a CPU, within rounding elsewhere.

    Raises:
        RuntimeError: it is not.
    """
    inputs = models.inputs(unet, 128, 128, batch=1)
    both = sides(unet, inputs, ["dense", "todo"], {"todo": ToDoConfig(factor=1)}, observed=0)
    log = logging.getLogger("todo_attn")
    level = log.level
    log.setLevel(logging.ERROR)  # that factor 1 changes nothing is the point here
    try:
        dense, todo = (side.build()() for side in both)
    finally:
        log.setLevel(level)
    error = ((todo - dense).float().norm() / dense.float().norm()).item()
    # Another attention kernel moved such an output by 2 (half precision) to 14 (fp32) times its dtype's precision.
    if not (torch.equal(todo, dense) if unet.device.type == "cpu" else error < 32 * torch.finfo(unet.dtype).eps):
        raise RuntimeError(f"ToDo with factor 1 differs from dense attention by {error:.2g} of its norm")


def rows_at(
    size: Size,
    unet: UNet2DConditionModel,
    todos: dict[str, ToDoConfig],
    methods: Sequence[str],
    batch: int,
    rounds: Rounds,
    case: dict[str, Any],
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Dense against every other method at one size; ``case`` is what else tells this measurement from others."""
    height, width = size
    torch.compiler.reset()  # each size compiles anew, as its user would
    measured = harness.measure(
        sides(unet, models.inputs(unet, height, width, batch), methods, todos, rounds.warmup, compiled),
        Meter(unet.device),
        rounds,
        check=check_output,
        label=f"{width}x{height}",
    )
    where = {"height": height, "width": width, "batch": batch, "compile": compiled}
    return harness.compare("unet", case | where, machine.describe(unet.device), measured)


def plan(
    device: torch.device, sizes: Sequence[Size], caps: Sequence[int], factors: Sequence[str]
) -> list[tuple[Size, dict[str, ToDoConfig]]]:
    """Which configurations at which size. Nothing asked for on a CPU: the cap of 1024 keys at 1024 px only."""
    if not (sizes or caps or factors) and device.type == "cpu":
        return [((1024, 1024), configs((1024, 1024), [4096, 1024], [])), ((2048, 2048), configs((2048, 2048), [], []))]
    chosen = sizes or [(side, side) for side in ((1024,) if device.type == "cpu" else (1024, 1536, 2048))]
    return [(size, configs(size, caps, factors)) for size in chosen]


def configs(size: Size, caps: Sequence[int], factors: Sequence[str]) -> dict[str, ToDoConfig]:
    """ToDo's settings under the names they have in the rows; the default ones where none are asked for."""
    default = ToDoConfig()
    named = {"todo" if cap == default.max_kv_tokens else f"todo-kv{cap}": ToDoConfig(max_kv_tokens=cap) for cap in caps}
    for factor in factors:
        if factor != "paper" and not (factor.isdecimal() and int(factor)):
            raise typer.BadParameter(f"--factor must be an integer of at least 1 or paper, got {factor!r}")
        named[f"todo-{factor}"] = ToDoConfig.paper(*size) if factor == "paper" else ToDoConfig(factor=int(factor))
    return named or {"todo": default}


def parse_size(text: str) -> Size:
    """ "1024" or "1280x720" (width x height) as (height, width)."""
    width, _, height = text.partition("x")
    height = height or width
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"--size must be as 1024 or 1280x720, got {text!r}")
    return int(height), int(width)


def check_choices(device: torch.device, sizes: Sequence[Size], **chosen: tuple[Sequence[str], Collection[str]]) -> None:
    """Whether each option's values are among those it knows, before any weight is drawn.

    Raises:
        typer.BadParameter: one is not, with its name.
    """
    for name, (given, known) in chosen.items():
        if unknown := set(given) - set(known):
            raise typer.BadParameter(f"--{name} must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    for side in (side for size in sizes for side in size):
        if side < 1 or side % models.PIXELS_PER_LATENT:
            raise typer.BadParameter(f"sizes must be multiples of {models.PIXELS_PER_LATENT} pixels, got {side}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda needs a GPU that torch sees")


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    model: Annotated[str, typer.Option(help="sd15 or sdxl.")] = "sd15",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; fp32 on a CPU, fp16 on a GPU.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Pixels, as 1024 or 1280x720; repeatable.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; with --width, one more size.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; with --height, one more size.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="1 on a CPU, 2 (guidance) on a GPU.")] = None,
    max_kv_tokens: Annotated[list[int] | None, typer.Option(min=1, help="ToDo's cap on keys; repeatable.")] = None,
    factor: Annotated[list[str] | None, typer.Option(help="ToDo's factor, or paper; repeatable.")] = None,
    methods: Annotated[
        str, typer.Option(help="todo, tome; separated by commas, dense always with them.")
    ] = "dense,todo",
    compile: Annotated[bool, typer.Option("--compile", help="All sides through torch.compile.")] = False,
    warmup: Annotated[int | None, typer.Option(min=1, help="Untimed rounds; 1 on a CPU, 3 on a GPU.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed rounds; 3 on a CPU, 20 on a GPU.")] = None,
    seconds: Annotated[float, typer.Option(help="After two rounds, start none past this time at one size.")] = 300,
    out: Annotated[Path | None, typer.Option(help="Rows go there; benchmarks/results/unet-DEVICE.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, no table.")] = False,
) -> None:
    """Time one UNet forward with diffusers' own attention and with its peers, alternating in one run."""
    where = torch.device(device)
    cpu = where.type == "cpu"
    dtype = dtype or ("fp32" if cpu else "fp16")
    batch = batch or (1 if cpu else 2)
    often = Rounds(warmup or (1 if cpu else 3), rounds or (3 if cpu else 20), seconds)
    chosen = ["dense", *methods.split(",")]
    if (height is None) != (width is None):
        raise typer.BadParameter("--height and --width must be given together")
    if set(chosen) == {"dense"}:
        raise typer.BadParameter("--methods must have todo or tome: nothing is timed without its peer")
    sizes = [parse_size(text) for text in size or ()]
    if height is not None and width is not None:
        sizes.append((height, width))
    known: dict[str, tuple[Sequence[str], Collection[str]]] = {
        "model": ([model], models.CONFIGS),
        "dtype": ([dtype], DTYPES),
        "methods": (chosen, METHODS),
    }
    check_choices(where, sizes, **known)
    cases = plan(where, sizes, max_kv_tokens or [], factor or [])
    case: dict[str, Any] = {"model": model, "dtype": dtype}
    if cpu:
        case["keeps_freed_memory"] = machine.keep_freed_memory()

    typer.echo(f"{model}, {dtype}, batch {batch}: drawing the weights", err=True)
    unet = models.build(model, where, DTYPES[dtype])
    if "todo" in chosen:
        check_exact(unet)
    path = out or RESULTS / f"unet-{machine.slug(where)}.jsonl"
    rows = []
    for at, todos in cases:
        new = rows_at(at, unet, todos, chosen, batch, often, case, compile)
        harness.append(path, new)
        rows += new
        typer.echo(harness.table(new), err=True)
        if (share := new[0]["baseline"].get("self_attention_share")) is not None:
            typer.echo(f"self-attention takes {share:.0%} of dense, projections included", err=True)
    typer.echo(json.dumps(rows, indent=1) if as_json else harness.table(rows))
    typer.echo(f"rows added to {path}", err=True)


if __name__ == "__main__":
    typer.run(main)
