"""Shared by the commands: the app that they are registered on, and their errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import __version__
from ..config.checks import ArgumentError
from ..config.dtypes import DTYPES
from ..options.methods import SettingError
from ..options.prompts import read_prompts
from ..options.settings import OTHER_STEPS, SCHEDULERS, SHIPPED_STEPS, CompareSettings

if TYPE_CHECKING:
    from ..models.architectures import Architecture

app = typer.Typer(
    name="todo-attn",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Stable Diffusion at high resolution, faster: ToDo token downsampling for diffusers.",
)

# Options that several commands have.
DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
MaxKeys = Annotated[int, typer.Option(help="ToDo: the most keys that factor auto keeps.")]
PruneRatio = Annotated[
    float | None,
    typer.Option(help="DaTo: the share of tokens pruned, at most 0.75.", show_default="the schedule's own, or 0.4"),
]
DtypeName = Annotated[
    str,
    typer.Option(help=f"auto (float16 on CUDA, else float32), {', '.join(DTYPES.values())}, or {', '.join(DTYPES)}."),
]

ModelSource = Annotated[
    str | None,
    typer.Argument(
        help="A folder saved by diffusers, a .safetensors or .ckpt file, or a Hub id.",
        show_default="the shipped pipeline",
    ),
]
Prompts = Annotated[list[str] | None, typer.Option(help="What to draw; give it again for more.", show_default="two")]
Seeds = Annotated[list[int] | None, typer.Option(help="An image per prompt and seed.", show_default="0")]
Side = Annotated[int | None, typer.Option(help="In pixels.", show_default="the model's normal")]
Steps = Annotated[
    int | None,
    typer.Option(
        help="Of the scheduler.", show_default=f"{SHIPPED_STEPS} for the shipped pipeline, else {OTHER_STEPS}"
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale; 1 is without.", show_default="3 for the shipped pipeline, else its own"),
]
SchedulerName = Annotated[
    str | None, typer.Option(help=f"One of {', '.join(SCHEDULERS)}.", show_default="the pipeline's own")
]
Variant = Annotated[str | None, typer.Option(help="Of the weight files, such as fp16.")]
ConfigSource = Annotated[
    str | None,
    typer.Option(
        help="For a single file: the folder or Hub id of a model of the same kind, for the configuration.",
        show_default="the published model's, from the Hub",
    ),
]


class UserError(Exception):
    """A message for the user instead of a traceback, and the exit code."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def format_message(self) -> str:
        """Named as in the parser's own errors."""
        return str(self)


@contextmanager
def naming_options(refused: type[ArgumentError] = SettingError, **names: str) -> Iterator[None]:
    """Turn a refused argument into a :class:`UserError` that names the option: of ``names``, or its own."""
    try:
        yield
    except refused as error:
        if not error.argument.isidentifier():  # none of the user's
            raise
        option = names.get(error.argument, f"--{error.argument.replace('_', '-')}")
        raise UserError(f"{option} {error.problem}", getattr(error, "exit_code", 2)) from error


def as_typed(argument: str) -> str:
    """``argument`` in UTF-8: Python decodes arguments by the locale, and the C locale loses what is not ASCII."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode(errors="replace")
    return argument


def given_prompts(file: Path | None, prompts: Sequence[str] | None) -> tuple[str, ...]:
    """Those of ``--prompts FILE`` or of each ``--prompt``; none if neither is given."""
    if file is not None and prompts:
        raise UserError("--prompts and --prompt cannot both be given")
    return read_prompts(file) if file else tuple(map(as_typed, prompts or ()))


def _say_version(asked: bool) -> None:
    if asked:
        print(f"todo-attn {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _not_about_tiny_vae(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not (said.startswith("Expected types for vae") and "AutoencoderTiny" in said)


def hush_loading() -> None:
    """Silence the libraries' own progress bars and advice on loading, unless their environment variables ask for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    if "HF_HUB_VERBOSITY" not in os.environ:
        hub_logging.set_verbosity_error()
    if "DIFFUSERS_VERBOSITY" not in os.environ:  # of an AutoencoderTiny, which the shipped pipeline has
        logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(_not_about_tiny_vae)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def chosen_architecture(model: str) -> Architecture:
    """The UNet that ``--model`` names; a path that does not exist is not looked up on the Hub."""
    from ..models.architectures import CONFIGS, read_architecture

    if model not in CONFIGS and not Path(model).expanduser().exists():
        try:
            CompareSettings(model=model)  # checks what may be a Hub id
        except SettingError as error:
            known = ", ".join(CONFIGS)
            raise SettingError(
                "model",
                f"must be {known}, or a folder or Hub id of a pipeline with a UNet, got {model!r}: there is no such "
                "folder, and a Hub id is owner/name",
            ) from error
    return read_architecture(model)
