"""Runs a search: checks everything, makes dense's images, then one generation after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from ..compare.bind import bind_dato, calls_of, check_fits
from ..compare.files import wait_for
from ..compare.identity import identity, open_folder
from ..compare.run import quiet
from ..compare.workers import Workers
from ..config.checks import ArgumentError
from ..config.dato import DaToConfig
from ..config.todo import ToDoConfig
from ..diffusers.levels import transformers_by_level
from ..logs import silent
from ..machine import device_name
from ..models.pipelines import check_pipeline, sized
from ..options.methods import SettingError
from ..options.settings import CompareSettings
from ..peak_memory import is_out_of_memory
from .checkpoint import Checkpoint, Result
from .cost import Cost, cost_for
from .fidelity import Fidelity, MetricError
from .found import Found, Point
from .images import Images
from .output import write_found
from .plan import Plan
from .space import Candidate, Space

SEARCH, DENSE = "search.json", "dense"


@dataclass(frozen=True)
class Progress:
    """How far a search is: ``done`` of ``total`` images of this process in this generation, 0 being dense's images.

    ``found`` is what there is so far; None before the first candidates.
    """

    generation: int
    done: int
    total: int
    found: Found | None


def search(
    pipe: Any,
    settings: CompareSettings,
    plan: Plan | None = None,
    folder: str | Path = "search",
    workers: Workers | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> Found:
    """Search schedules for ``pipe`` that are cheap and give images near to dense's.

    Everything is kept in ``folder``: dense's images, the checkpoint, and what was found (schedule files, table, plot).
    If the folder has a search that ended early, this one goes on from there, to the same front. The same search with
    more generations goes on too. If an image does not fit in memory, torch's own error ends the search.

    Every process that ``accelerate launch`` starts must call this, with the same arguments and on a folder that all
    see. Each makes its part of the images; all return the same.

    Args:
        pipe: a text-to-image pipeline with a UNet, as ``todo_attn.models.pipelines.load_pipeline`` gives. It is left
            as it was found.
        settings: prompts, seeds, size (None: the model's normal one), steps and guidance. Its methods do not matter.
        plan: what to search and to measure, and for how long.
        folder: new, empty, or of the same search.
        workers: this process among all; None asks accelerate.
        watch: called after each image.

    Raises:
        ArgumentError: something that does not fit, before any image is made; or the metric fails for every candidate.
        OSError: a file cannot be written; what was there stays, and the same search goes on from there.
    """
    check_pipeline(pipe, settings.source)
    run = _Search(pipe, sized(settings, pipe, times=1), plan or Plan(), Path(folder), workers, watch)
    with quiet(pipe), silent():  # what the package says of candidates, the user cannot change
        return run.run()


class _TimeIsUpError(Exception):
    """The plan's minutes are over."""


class _Search:
    def __init__(
        self,
        pipe: Any,
        settings: CompareSettings,
        plan: Plan,
        folder: Path,
        workers: Workers | None,
        watch: Callable[[Progress], None] | None,
    ) -> None:
        from .evolution import Evolution  # pymoo takes a second to import

        assert settings.steps is not None
        self.evolution = Evolution
        self.pipe, self.settings, self.plan, self.folder = pipe, settings, plan, folder
        self.workers = workers or Workers.joined(pipe.unet.device.type)
        self.watch = watch
        self.calls = calls_of(pipe.scheduler, settings.steps)
        self.space = Space(self.calls, sorted({level for level, _ in transformers_by_level(pipe.unet)}), plan)
        self.fidelity = Fidelity(plan.metric, plan.features, self.workers.device)
        self._check_fits()
        self.about = self._about()
        if self.workers.is_main:
            open_folder(folder, SEARCH, self.about, what="search")
        self.workers.wait()
        if not self.workers.is_main:
            wait_for(folder / SEARCH)
            open_folder(folder, SEARCH, self.about, writes=False, what="search")
        self.checkpoint = Checkpoint(folder, self.about, len(settings.images))
        if self.workers.is_main:
            self.checkpoint.read()
        # What one process reads, all know: another node may still see an older file.
        self.checkpoint.add(self.workers.gather(self.checkpoint.all()))
        self.cost: Cost
        self.images = Images(pipe, settings, folder / DENSE, self.fidelity.metric.needs_pixels)
        self.found: Found | None = None  # so far
        self.generation = 0
        self.born: dict[str, int] = {}  # the generation that first had each candidate
        self.candidates: dict[str, Candidate] = {}
        self.warm = False
        self.started = time.monotonic()

    def _check_fits(self) -> None:
        todo = ToDoConfig({level: max(self.plan.todo_factors) for level in self.space.levels})
        config = DaToConfig(max(self.plan.prune_ratios), cache_schedule="1" * self.space.digits, todo=todo)
        try:
            check_fits(bind_dato(self.pipe, config), self.pipe)
        except ArgumentError as error:
            if error.argument == "pipe":
                raise
            raise SettingError("model", f"must be one that DaTo takes: {error}") from error
        except ValueError as error:
            raise SettingError("model", f"must be one that DaTo takes: {error}") from error

    def _about(self) -> dict[str, Any]:
        """What decides every figure of the search."""
        settings = self.settings
        assert settings.steps is not None
        about = identity(self.pipe, settings.steps, settings.guidance, settings.prompts)
        about |= {
            "seeds": list(settings.seeds),
            "height": settings.height,
            "width": settings.width,
            "calls": self.calls,
            **self.plan.to_dict(),
            "pymoo": version("pymoo"),
        }
        if self.plan.cost == "seconds":
            about["machine"] = device_name(self.workers.device)
        return about

    def run(self) -> Found:
        try:
            self._make_dense()
            self.cost = cost_for(self.pipe, self.settings, self.plan.cost, self.images, self.checkpoint)
            evolution = self.evolution(self.space)
            for generation in range(1, self.plan.generations + 1):
                self.generation = generation
                rows = evolution.ask()
                if not len(rows):
                    break  # there is nothing new to try
                candidates = [self.space.candidate(row) for row in rows]
                for candidate in candidates:
                    self.candidates.setdefault(candidate.key, candidate)
                    self.born.setdefault(candidate.key, self.generation)
                self._evaluate(candidates)
                evolution.tell([self._objectives(candidate) for candidate in candidates])
                self.found = self._found(self.generation)
                self._tell(1, 1)
            self.workers.wait()
        except _TimeIsUpError:
            self.found = self._found(self.generation - 1)
        except BaseException:  # an interrupt too: keep what there is
            if self.workers.is_main and self.candidates:
                with contextlib.suppress(OSError):
                    self.checkpoint.save()
                    write_found(self._found(self.generation - 1), self.folder)
            raise
        assert self.found is not None
        if self.workers.is_main:
            write_found(self.found, self.folder)
        return self.found

    def _make_dense(self) -> None:
        """Make dense's images that the folder lacks, and check how they called the UNet."""
        mine = [i for i in self.workers.shard.of(len(self.images)) if not self.images.has_dense(i)]
        for done, index in enumerate(mine):
            self._warm_up()
            self.images.make_dense(index)
            self._tell(done + 1, len(mine))
        self.workers.wait()
        self.images.wait_for_dense()
        found = self.images.dense_calls(0)
        if found.calls != self.calls:
            problem = (
                f"must call its UNet once for each of the {self.calls} timesteps, and calls it {found.calls} times"
            )
            raise SettingError("model", problem)

    def _evaluate(self, candidates: Sequence[Candidate]) -> None:
        """Make and measure what the checkpoint lacks of ``candidates``, and save it after every round.

        A round is as many images of each process as a candidate has, so that little is lost to a kill, and no process
        waits long for the others.
        """
        rank, world = self.workers.shard.rank, self.workers.shard.world
        keys = [candidate.key for candidate in candidates if not self._is_dense(candidate)]
        missing = self.checkpoint.missing(keys)
        a_round = world * len(self.images)
        for start in range(0, len(missing), a_round):
            self._check_time()
            mine: list[tuple[str, int, Result]] = []
            try:
                for key, index in missing[start : start + a_round][rank::world]:
                    mine.append((key, index, self._result(key, index)))
                    self._tell((start // world) + len(mine), -(-len(missing) // world))
            except BaseException:
                self.checkpoint.add(mine)
                raise
            self.checkpoint.add(self.workers.gather(mine))
            if self.workers.is_main:
                self.checkpoint.save()
        if self.generation == 1 and not any(self.checkpoint.figures(key) for key in keys):
            reason = next(filter(None, map(self.checkpoint.failure, keys)), "there is none")
            self.checkpoint.results.clear()  # so that a better metric of the same name is tried
            raise ArgumentError("metric", f"must give a number for a candidate, and does for none: {reason}")

    def _result(self, key: str, index: int) -> Result:
        self._warm_up()
        image = self.images.make(self.candidates[key].config, index)
        try:
            return self.fidelity.of(image, self.images.dense(index), self.images.prompt(index)), image.seconds
        except MetricError as error:
            if error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise error.__cause__ from None
            return str(error)

    def _check_time(self) -> None:
        """All processes find the same, by the clock of any. A search without a candidate would be of no use."""
        if self.plan.minutes is None or not any(map(self.checkpoint.figures, self.candidates)):
            return
        late = time.monotonic() - self.started >= 60 * self.plan.minutes
        if any(self.workers.gather([late])):
            raise _TimeIsUpError

    def _warm_up(self) -> None:
        """A first image takes longer than others, which matters only if they are timed."""
        if not self.warm and self.plan.cost == "seconds":
            self.images.warm_up()
        self.warm = True

    def _is_dense(self, candidate: Candidate) -> bool:
        """Whether it does what dense does, whose fidelity and cost need no measurement."""
        return candidate.config.computes_everything and candidate.config.todo is None

    def _objectives(self, candidate: Candidate) -> tuple[float, float] | None:
        """What is to be made small: the loss of fidelity, and the cost. None if there are no figures."""
        figures = None if self._is_dense(candidate) else self.checkpoint.figures(candidate.key)
        if figures is None:
            return None
        fidelity = fmean(value for value, _ in figures)
        return -fidelity if self.fidelity.metric.higher_is_better else fidelity, self.cost.of(candidate)

    def _found(self, generations: int) -> Found:
        points = []
        for key, candidate in self.candidates.items():
            if (figures := self.checkpoint.figures(key)) is not None:
                origin = self.space.known.get(candidate.config.cache_schedule or "", "")
                fidelity = fmean(value for value, _ in figures)
                points.append(Point(key, candidate.config, fidelity, self.cost.of(candidate), self.born[key], origin))
        failures = {key: reason for key in self.candidates if (reason := self.checkpoint.failure(key)) is not None}
        return Found(
            self.settings,
            self.plan,
            self.calls,
            self.fidelity.metric,
            self.cost.dense,
            generations,
            points,
            failures,
            self.about,
        )

    def _tell(self, done: int, total: int) -> None:
        if self.watch is not None:
            self.watch(Progress(self.generation, done, total, self.found))
