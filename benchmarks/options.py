"""Options that the benchmarks share, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch
import typer

from todo_attn.bench import jsonl
from todo_attn.config import ArgumentError

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def naming_options() -> Iterator[None]:
    """Turn a refused argument into an error that names its option.

    Raises:
        typer.BadParameter: instead of an ArgumentError.
    """
    try:
        yield
    except ArgumentError as error:
        raise typer.BadParameter(f"--{error.argument.replace('_', '-')} {error.problem}") from error


def check_among(option: str, given: Iterable[object], known: Collection[object]) -> None:
    """Refuse values that an option does not know.

    Raises:
        typer.BadParameter: naming the option.
    """
    if unknown := [value for value in given if value not in known]:
        names, wrong = (", ".join(map(str, values)) for values in (known, unknown))
        raise typer.BadParameter(f"--{option} must be among {names}, got {wrong}")


def chosen_device(name: str) -> torch.device:
    """The device of --device.

    Raises:
        typer.BadParameter: it cannot be used here.
    """
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda needs a GPU that torch sees")
    return torch.device(name)


def default_dtype(device: torch.device) -> str:
    """The short name of the dtype that ``device`` is measured in: half precision on a GPU."""
    return "fp32" if device.type == "cpu" else "fp16"


def checked_out(path: Path, argument: str = "out") -> Path:
    """The file of an option, such as --out.

    Raises:
        typer.BadParameter: it cannot be written.
    """
    with naming_options():
        jsonl.check_appendable(path, argument)
    return path


def make_dump_folder(folder: Path) -> None:
    """Make the folder of --dump, before anything is compiled for it.

    Raises:
        typer.BadParameter: no files can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise typer.BadParameter(f"--dump must be a folder that can be written to, got {folder}: {error}") from error
