"""Tables for the terminal, by rich."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..compare.words import bytes_text, psnr_text, seconds_text, steps_text
from ..config.schedule import FEWEST_CALLS


def print_lines(lines: list[str], *, stderr: bool = False) -> None:
    """Print ``lines``; a terminal gets them wrapped between words, a file or pipe whole."""
    console = Console(stderr=stderr)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def compare_table(report: dict[str, Any]) -> Table:
    """One row per method."""
    settings = report["settings"]
    count = len(settings["prompts"]) * len(settings["seeds"])
    with_memory = any(m["peak_memory_bytes"] is not None for m in report["methods"])
    table = Table(
        title=f"{settings['width']} x {settings['height']}, {steps_text(settings['steps'])}, "
        f"{count} image{'s' if count > 1 else ''} by each method, on {report['machine']['device']}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    headings = ("method", "seconds", "from", "to", "speed-up", "PSNR", "SSIM", "peak memory")
    for heading in headings[: 8 if with_memory else 7]:
        is_name = heading == "method"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=is_name)
    for method in report["methods"]:
        table.add_row(method["method"], *_cells(method)[: 7 if with_memory else 6])
    return table


def _cells(method: dict[str, Any]) -> list[str]:
    seconds, memory = method["seconds"], method["peak_memory_bytes"]
    if seconds is None:
        return ["-"] * 7
    return [
        *(seconds_text(seconds[key]) for key in ("median", "min", "max")),
        "-" if method["speedup"] is None else f"{method['speedup']:.2f}x",
        psnr_text(method),
        "-" if method["ssim"] is None else f"{method['ssim']:.3f}",
        "-" if memory is None else bytes_text(memory),
    ]


def schedules_table(listing: dict[str, Any]) -> Table:
    """One row per schedule of :func:`todo_attn.cli.schedules.build_listing`; at most 80 columns wide."""
    table = Table(title=_run_text(listing), title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("name", "full", "shallow", "reuse", "published", "here", "saved"):
        table.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=True)
    for row in listing["schedules"]:
        calls = (str(row[kind]) for kind in ("full", "shallow", "reuse"))
        table.add_row(
            escape(row["name"]), *calls, _published_text(row), f"{row['speedup']:.2f}x", f"{row['saving']:.1%}"
        )
    return table


def schedule_lines(listing: dict[str, Any]) -> list[str]:
    """The only schedule of ``listing``, in full."""
    (row,) = listing["schedules"]
    published = row["published"]
    made_for = [f"{published['steps']} steps"] if published["steps"] is not None else []
    made_for += [f"of {published['scheduler']}"] if published["scheduler"] is not None else []
    return [
        f"{row['name'] or 'without a name'}, {_run_text(listing)}",
        f"source:    {row['source'] or 'not known'}",
        f"made for:  {' '.join(made_for) or 'not known'}, {len(published['digits']) + 1} calls",
        f"digits:    {row['digits']}",
        *_own_lines(row),
        f"calls:     {row['full']} full, {row['shallow']} shallow, {row['reuse']} reused",
        f"published: {_published_text(row)}",
        f"here:      {row['speedup']:.2f}x, {row['saving']:.1%} of the operations saved",
    ]


def _own_lines(row: dict[str, Any]) -> list[str]:
    """The prune ratio and ToDo of a schedule that has its own, with which it was counted."""
    ratio, todo = row["prune_ratio"], row["todo"]
    ratios = ", ".join(f"{each:g}" for each in ratio) if isinstance(ratio, (list, tuple)) else ratio
    return [
        *([] if ratio is None else [f"pruned:    {ratios} of the tokens"]),
        *([] if todo is None else [f"ToDo:      factor {todo['factor']}"]),
    ]


def schedules_notes(listing: dict[str, Any]) -> list[str]:
    """What the columns of :func:`schedules_table` mean, and what one call costs."""
    calls = ", ".join(f"{kind} {count / 1e9:.4g}" for kind, count in listing["operations_per_call"].items())
    own = any(row["prune_ratio"] is not None or row["todo"] is not None for row in listing["schedules"])
    few = f"a published schedule pays from about {FEWEST_CALLS} calls on, and here there are {listing['calls']}"
    return [
        "full, shallow (the last layers alone) and reuse (the last output again): how many calls of each kind",
        "published: times fewer operations, by the published code, on Stable Diffusion 1.5 at 512 x 512 with 51 calls, "
        "nothing pruned and the middle block computed in shallow calls too",
        f"here: times fewer operations than dense in a whole run, counted on the UNet of {listing['model']}",
        f"operations of a call, in 1e9: {calls} (batch {listing['batch']}, {listing['prune_ratio']:g} of the tokens "
        "pruned unless the call is dense; a multiplication with its addition is two)",
        *(["a schedule with its own prune ratio or ToDo is counted with them"] if own else []),
        *([few] if listing["calls"] < FEWEST_CALLS else []),
    ]


DIGITS_NOTE = "digits, one for each call after the first, which is full: 2 full, 1 shallow, 0 reuse"


def _run_text(listing: dict[str, Any]) -> str:
    return f"{listing['width']} x {listing['height']}, {listing['steps']} steps, {listing['calls']} calls of the UNet"


def _published_text(row: dict[str, Any]) -> str:
    speedup = row["published"]["speedup"]
    return "-" if speedup is None else f"{speedup:.2f}x"


def tuning_table(result: dict[str, Any]) -> Table:
    """One row for each kernel that :func:`todo_attn.bench.tuning.tune` timed."""
    table = Table(title=f"tuned for {result['machine']['device']}", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("head dim", "before", "kept", "ratio"):
        table.add_column(heading, justify="right" if heading == "ratio" else "left", no_wrap=True)
    for row in result["rows"]:
        name = "matching" if row["head_dim"] is None else str(row["head_dim"])
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        table.add_row(name, row["before"], row["kept"] or "-", ratio)
    return table


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
    for each in examination["tuning"]:
        facts.add_row("tuned", _tuning_text(each))
    if cuda["why_not"]:
        facts.add_row("GPU", f"none: {cuda['why_not']}")
    console.print(facts)
    console.print()
    table = Table(title="what runs each op here", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("op", "on", "in", "backend", "tried out"):
        table.add_column(heading)
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    compiled: dict[str, str] = {}
    for row in examination["ops"]:
        table.add_row(row["op"], row["device"], row["dtype"], row["backend"], _verdict(row["checks"]))
        if reason := row.get("why_not_triton"):
            reasons.setdefault((row["device"], reason), {})[row["dtype"]] = None
        if reason := row.get("why_not_compiled"):
            compiled[row["device"]] = reason
    console.print(table)
    for (device, reason), dtypes in reasons.items():
        console.print(f"no Triton on {device} in {', '.join(dtypes)}: {reason}", soft_wrap=True, markup=False)
    for device, reason in compiled.items():
        console.print(f"no compiled token ops on {device}: {reason}", soft_wrap=True, markup=False)
    if not diffusers["installed"]:
        console.print(f"ToDo in diffusers: {diffusers['why_not']}", markup=False)
    elif diffusers["problem"] is None:
        console.print("ToDo in diffusers: applied to a small UNet and removed again, [green]right[/green]")
    for problem in examination["problems"]:
        console.print("[red]broken[/red]", escape(problem), soft_wrap=True)
    if examination["ok"]:
        console.print("[green]Everything that is installed works.[/green]")


def _tuning_text(each: dict[str, Any]) -> str:
    if each["file"] is None:
        return f"{each['device']}: no; `todo-attn tune` looks for faster configurations, in about a minute"
    what = [f"head dim {', '.join(map(str, each['head_dims']))}"] if each["head_dims"] else []
    what += ["matching"] if each["match"] else []
    return f"{each['device']}: {' and '.join(what)}, {each['measured']}"


def _verdict(checks: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{c['backend']} " + ("[red]broken[/red]" if c["problem"] else "[green]right[/green]") for c in checks
    )
