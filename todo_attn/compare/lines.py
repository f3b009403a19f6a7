"""The lines of Python that put a method on a pipeline, and the command that makes a comparison; both to copy."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..config.dato import DaToConfig
from ..config.todo import ToDoConfig
from ..options.settings import CompareSettings


def expression(config: ToDoConfig | DaToConfig) -> str:
    """The call that makes ``config``, with the arguments that are not the defaults."""
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    changed = {f.name: given[f.name] for f in fields(config) if given[f.name] != f.default}
    arguments = (f"{name}={expression(v) if isinstance(v, ToDoConfig) else repr(v)}" for name, v in changed.items())
    return f"{type(config).__name__}({', '.join(arguments)})"


def python_lines(kind: str, options: Mapping[str, Any], comment: str | None = None) -> str | None:
    """The lines for a method of a report: its kind, such as "todo", and its ``options``; None for dense.

    ``comment`` is about DaTo's schedule; None names it.
    """
    if kind == "todo":
        config = expression(ToDoConfig.from_dict(options))
        return f"from todo_attn import ToDoConfig, apply_todo\n\napply_todo(pipe, {config})"
    if kind in ("dato", "todo+dato"):
        dato = DaToConfig.from_dict({name: value for name, value in options.items() if name != "schedule"})
        names = "DaToConfig, apply_dato" if dato.todo is None else "DaToConfig, ToDoConfig, apply_dato"
        if comment is None and dato.cache_schedule:
            comment = f"cache_schedule is {options['schedule']!r}, for this number of steps"
        about = f"# {comment}\n" if comment else ""
        return f"from todo_attn import {names}\n\n{about}apply_dato(pipe, {expression(dato)})"
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    if kind == "tome":
        return f"import tomesd\n\ntomesd.apply_patch(pipe, {arguments})"
    if kind == "deepcache":
        return (
            "from DeepCache import DeepCacheSDHelper\n\n"
            f"helper = DeepCacheSDHelper(pipe)\nhelper.set_params({arguments})\nhelper.enable()"
        )
    return None


def command_line(settings: CompareSettings) -> str:
    """The ``todo-attn compare`` that makes the same images, with a page."""
    words = ["todo-attn", "compare", *([settings.model] if settings.model else [])]
    given = settings.to_dict()
    repeated = {"prompts": "--prompt", "seeds": "--seed"}
    for name, option in repeated.items():
        words += [word for value in given[name] for word in (option, str(value))]
    defaults = {f.name: f.default for f in fields(settings)} | dict.fromkeys(repeated)
    for name, value in given.items():
        if name not in ("model", *repeated) and value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--report"])
