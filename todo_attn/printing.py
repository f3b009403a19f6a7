"""Tables on the terminal, by rich."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def seconds_text(seconds: float) -> str:
    """Three digits, as seconds need: "0.123 s", "4.56 s", "78.9 s", "123 s"."""
    digits = 3 if seconds < 1 else 2 if seconds < 10 else 1 if seconds < 100 else 0
    return f"{seconds:.{digits}f} s"


def compare_table(report: dict[str, Any]) -> Table:
    """One row per method."""
    settings = report["settings"]
    count = len(settings["prompts"]) * len(settings["seeds"])
    with_memory = any(m["peak_memory_bytes"] is not None for m in report["methods"])
    table = Table(
        title=f"{settings['width']} x {settings['height']}, {settings['steps']} steps, "
        f"{count} picture{'s' if count > 1 else ''} by each method, on {report['machine']['device']}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("method", "seconds", "from", "to", "speed-up", "PSNR", "SSIM", "memory")[: 8 if with_memory else 7]:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in report["methods"]:
        table.add_row(method["method"], *_cells(method)[: 7 if with_memory else 6])
    return table


def _cells(method: dict[str, Any]) -> list[str]:
    seconds, memory = method["seconds"], method["peak_memory_bytes"]
    if seconds is None:
        return ["-"] * 7
    same = bool(method["images"]) and all(i["same_as_dense"] for i in method["images"])
    return [
        *(seconds_text(seconds[key]) for key in ("median", "min", "max")),
        f"{method['speedup']:.2f}x",
        "the same" if same else "-" if method["psnr"] is None else f"{method['psnr']:.1f} dB",
        "-" if method["ssim"] is None else f"{method['ssim']:.3f}",
        "-" if memory is None else f"{memory / 2**30:.2f} GiB",
    ]


def print_examination(examination: dict[str, Any], console: Console) -> None:
    """What :func:`todo_attn.doctor.examine` found."""
    found, cuda, diffusers = examination["versions"], examination["cuda"], examination["diffusers"]
    facts = Table.grid(padding=(0, 2))
    for name, version in found.items():
        facts.add_row(name, version or "[dim]not installed[/dim]")
    facts.add_row("system", examination["machine"]["platform"])
    facts.add_row("processor", f"{examination['machine']['cpu']}, {examination['machine']['cpu_threads']} threads")
    facts.add_row("CUDA", f"{cuda['torch_cuda'] or 'none'} in torch, driver {cuda['driver'] or 'not found'}")
    for gpu in cuda["gpus"]:
        facts.add_row("GPU", f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB")
    if cuda["why_not"]:
        facts.add_row("GPU", f"none: {cuda['why_not']}")
    console.print(facts)
    console.print()
    table = Table(title="what runs each op here", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("op", "on", "in", "backend", "tried out"):
        table.add_column(heading)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in examination["ops"]:
        table.add_row(row["op"], row["device"], row["dtype"], row["backend"], _verdict(row["checks"]))
        if row["why_not_triton"]:
            reasons.setdefault((row["device"], row["why_not_triton"]), []).append(row["dtype"])
    console.print(table)
    for (device, reason), dtypes in reasons.items():
        console.print(f"no Triton attention on {device} in {', '.join(dtypes)}: {reason}", soft_wrap=True, markup=False)
    if not diffusers["installed"]:
        console.print(f"ToDo in diffusers: {diffusers['why_not']}", markup=False)
    elif diffusers["problem"] is None:
        console.print("ToDo in diffusers: applied to a small UNet and removed again, [green]right[/green]")
    for problem in examination["problems"]:
        console.print("[red]broken[/red]", escape(problem), soft_wrap=True)
    if examination["ok"]:
        console.print("[green]Everything that is installed works.[/green]")


def _verdict(checks: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{c['backend']} " + ("[red]broken[/red]" if c["problem"] else "[green]right[/green]") for c in checks
    )
