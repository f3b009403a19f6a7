"""A whole run: what was asked is checked, then images are made, operations counted, images measured, rows built."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.fidelity import table
from benchmarks.fidelity.cases import DENSE, Case, bind_checked
from benchmarks.fidelity.generate import Generator
from benchmarks.fidelity.metrics import METRICS, Column, Part, columns, measure, selected
from benchmarks.fidelity.operations import Operations
from benchmarks.fidelity.reference import Reference
from benchmarks.fidelity.store import Images, Size, Store
from todo_attn import machine
from todo_attn.compare.features import Network
from todo_attn.compare.files import write_whole
from todo_attn.compare.workers import Workers
from todo_attn.config.checks import ArgumentError
from todo_attn.options.settings import CompareSettings

PROBED_PROMPTS = 16


@dataclass(frozen=True)
class Plan:
    """What a run is asked to do.

    Args:
        settings: model, steps, guidance.
        images: prompts and seeds.
        sizes: (height, width) in pixels.
        cases: dense first.
        metrics: of :data:`~benchmarks.fidelity.metrics.METRICS`; empty for all that can be had.
        network, reference: None if there is none.
        subset: of KID, in images.
        versus: the case that all others are compared with, or None.
    """

    settings: CompareSettings
    images: Images
    sizes: Sequence[Size]
    cases: Sequence[Case]
    metrics: Sequence[str] = ()
    network: Network | None = None
    reference: Reference | None = None
    subset: int = 50
    versus: str | None = None


class Run:
    """Checks ``plan`` before anything is made.

    Args:
        pipe: the pipeline; it stays as it is.
        plan: what to do.
        workers: this process among all.
        tell: prints a line, in the main process only.

    Raises:
        ArgumentError: something in the plan does not fit; ``notes`` says what is left out without an error.
    """

    def __init__(self, pipe: Any, plan: Plan, workers: Workers, tell: Callable[[str], object] = print) -> None:
        self.pipe, self.plan, self.workers = pipe, plan, workers
        self.tell = tell if workers.is_main else lambda line: None
        assert plan.settings.steps is not None
        self.steps = plan.settings.steps
        self.notes: list[str] = []
        self.cases = self._able()
        if plan.versus is not None and plan.versus not in [case.name for case in self.cases]:
            raise ArgumentError("versus", f"must be among the chosen cases, got {plan.versus!r}")
        width = 0
        if plan.network is not None:
            prompts = list(dict.fromkeys(plan.images.prompts))[:PROBED_PROMPTS]
            for size in plan.sizes:
                width = plan.network.probe(*size, prompts)
        if plan.reference is not None:
            plan.reference.pixels(0, *plan.sizes[0])
        self.metrics, left_out = selected(
            plan.metrics, plan.network, width, len(plan.images), plan.reference, plan.subset
        )
        self.notes += left_out

    def _able(self) -> list[Case]:
        """The cases that can run here."""
        able = []
        for case in self.plan.cases:
            bound = bind_checked(case, self.pipe, case.steps_of(self.steps))
            if bound.unavailable is None:
                able.append(case)
            else:
                self.notes.append(f"no {case.name}: {bound.unavailable}")
        return able

    def rows(self, store: Store) -> list[table.Row]:
        """Make and measure everything; the rows, in the main process, else none."""
        plan, shard = self.plan, self.workers.shard
        generator = Generator(self.pipe, plan.settings, plan.images, store)
        abouts = {(size, case.name): generator.about(case, size) for size in plan.sizes for case in self.cases}
        for (size, name), about in abouts.items():
            store.open_case(size, name, about, writes=self.workers.is_main)
        for size in plan.sizes:
            total = len(self.cases) * len(shard.of(len(plan.images)))
            with self._bar(f"images at {size[1]}x{size[0]}", total) as step:
                generator.make(self.cases, size, shard, shard.world, step)
        operations = self._operations(store)
        self.workers.wait()
        return [row for size in plan.sizes for row in self._rows_at(store, size, abouts, operations)]

    def _operations(self, store: Store) -> dict[tuple[Size, str], int]:
        """Operations by size and case, counted by the processes in turns and kept beside the images."""
        pairs = [(size, case) for size in self.plan.sizes for case in self.cases]
        counter = None
        found = []
        mine = self.workers.shard.of(len(pairs))
        with self._bar("operations", len(mine)) as step:
            for size, case in (pairs[i] for i in mine):
                file = store.case_folder(size, case.name) / "operations.json"
                if file.exists():
                    count = json.loads(file.read_text(encoding="utf-8"))
                else:
                    counter = counter or Operations(self.pipe, self.plan.settings, self.plan.images.prompts[0])
                    count = counter.of(case, size)
                    write_whole(file, json.dumps(count).encode())
                found.append(((size, case.name), count))
                step()
        return dict(self.workers.gather(found))

    def _rows_at(
        self, store: Store, size: Size, abouts: dict[tuple[Size, str], Any], operations: dict[tuple[Size, str], int]
    ) -> Iterator[table.Row]:
        plan = self.plan
        reference = self._reference_features(size)
        # The case to compare with comes first, so that no other is kept.
        ordered = sorted(self.cases, key=lambda case: case.name != plan.versus)
        versus: dict[str, Column] | None = None
        rows: dict[str, table.Row] = {}
        mine = self.workers.shard.of(len(plan.images))
        with self._bar(f"measures at {size[1]}x{size[0]}", len(mine) * len(ordered)) as step:
            for case in ordered:
                parts: list[Part] = self.workers.gather(
                    measure(store, plan.images, size, case.name, DENSE, self.metrics, plan.network, mine, step)
                )
                if not self.workers.is_main:
                    continue
                parts.sort(key=lambda part: part.index)
                found = columns(parts, self.metrics, reference, plan.subset)
                if case.name == plan.versus:
                    versus = found
                about = self._about(store, case, size) | {
                    "about": abouts[size, case.name],
                    "operations": operations[size, case.name],
                    "operations_saved": 1 - operations[size, case.name] / operations[size, DENSE],
                }
                rows[case.name] = table.row_of(about, parts, found, versus)
        yield from (rows[case.name] for case in self.cases if case.name in rows)

    def _about(self, store: Store, case: Case, size: Size) -> dict[str, Any]:
        plan = self.plan
        return {
            "run": store.digest,
            "case": case.name,
            "family": case.family,
            "height": size[0],
            "width": size[1],
            "versus": plan.versus,
            "features": plan.network and plan.network.name,
            "reference": plan.reference and {"name": plan.reference.name, "images": plan.reference.count},
            "kid_subset": plan.subset if "kid" in self.metrics else None,
            "made": store.about,
            "machine": machine.describe(self.pipe.unet.device),
        }

    def _reference_features(self, size: Size) -> np.ndarray | None:
        """(M, F), the same in every process."""
        reference, network = self.plan.reference, self.plan.network
        if reference is None or network is None or not any(METRICS[n].needs == "reference" for n in self.metrics):
            return None
        mine = self.workers.shard.of(reference.count)
        found = []
        with self._bar(f"true images at {size[1]}x{size[0]}", len(mine)) as step:
            for index in mine:
                found.append((index, network.features(reference.pixels(index, *size))))
                step()
        return np.stack([features for _, features in sorted(self.workers.gather(found), key=lambda pair: pair[0])])

    @contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Callable[[], object]]:
        """A progress bar of the main process, and the function that moves it."""
        with tqdm(total=total, desc=what, disable=None if self.workers.is_main else True, leave=False) as bar:
            yield lambda: bar.update()
