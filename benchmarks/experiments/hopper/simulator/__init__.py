"""Runs a Gluon kernel's own source on a CPU, partition by partition, in a model of Hopper's asynchrony.

Triton has no interpreter for Gluon. So the source is executed with stand-ins (``language.py``) in the place of Gluon,
over a model of what is asynchronous (``machine.py``).

Not modelled: layouts, the warps of one warpgroup among each other (the barrier before an arrival), proxies and fences,
registers. Compiled code answers the first, by compiling at all, and the last.
"""

from __future__ import annotations

import builtins
import types
from pathlib import Path
from typing import Any

from benchmarks.experiments.hopper.simulator import language
from benchmarks.experiments.hopper.simulator.machine import MachineError

__all__ = ["MachineError", "kernel"]


def kernel(
    name: str, sources: dict[str, Path], edits: dict[str, list[tuple[str, str]]] | None = None
) -> language.Kernel:
    """The kernel ``name`` of the last of the modules ``sources``, each of which may import those before it.

    ``edits``: by module, texts and what each is replaced by, wherever it occurs. Nothing is put into ``sys.modules``.

    Raises:
        ValueError: a text to replace is not there.
    """
    simulated: dict[str, Any] = dict(language.MODULES)

    def imports(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name in simulated:
            return simulated[name]
        return builtins.__import__(name, globals, locals, fromlist, level)

    module = types.ModuleType("nothing")
    for path, file in sources.items():
        text = file.read_text()
        for old, new in (edits or {}).get(path, []):
            if old not in text:
                raise ValueError(f"{path} must have {old!r}, which was to be replaced")
            text = text.replace(old, new)
        module = types.ModuleType(f"simulated.{path}")
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": imports, "range": language.integers}
        exec(compile(text, str(file), "exec"), module.__dict__)
        simulated[path] = module
    return getattr(module, name)
