"""The training loop of a stage: checkpoints, learning rate, moving average, log and deadline."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import processes


class Stage:
    """Models and optimizer in one checkpoint.

    Randomness comes from the seed and the step alone, so a resumed run repeats the steps that it lost.

    The learning rate needs no planned end: it rises over ``warmup`` steps and, after ``constant`` steps, falls with the
    square root of the step. With ``steps`` it also falls linearly to 0 over the last ``decay`` of them.
    """

    stopped = False  # set by a signal, on the class: every stage ends after its step, with a checkpoint

    def __init__(
        self, name, work: Path, models, groups, seed, *, steps=None, decay=0, warmup=200, constant=2000, begun=0
    ):
        self.name, self.models, self.seed, self.steps, self.decay = name, models, seed, steps, decay
        self.warmup, self.constant = warmup, constant
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step = self.begun = begun  # ``begun``: the step at which the optimizer's state was empty
        self.extra: dict[str, int] = {}
        work.mkdir(parents=True, exist_ok=True)
        self.path, self.log = work / f"{name}.pt", work / "log.jsonl"
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            for key, model in models.items():
                model.load_state_dict(state["models"][key])
            if state["optimizer"]:
                self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.begun, self.extra = state["step"], state["begun"], state["extra"]
        self.trim_log()

    def trim_log(self) -> None:
        """Drop what was logged after the checkpoint: those steps are repeated."""
        if self.log.exists() and processes.is_first():
            lines = self.log.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and not self.repeated(json.loads(line))]
            self.log.write_text("".join(line + "\n" for line in kept))

    def repeated(self, record) -> bool:
        return record["stage"] == self.name and record["step"] > self.step

    def save(self) -> None:
        if not processes.is_first():
            return
        state = {
            "models": {key: model.state_dict() for key, model in self.models.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "begun": self.begun,
            "extra": self.extra,
        }
        new = self.path.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, self.path)

    def scale(self) -> float:
        """The learning rate of this step, as a factor."""
        scale = min(1.0, (self.step - self.begun) / self.warmup, (self.constant / self.step) ** 0.5)
        if self.steps and self.decay:
            scale = min(scale, (self.steps - self.step + 1) / self.decay)
        return scale

    def randomness(self) -> tuple[np.random.Generator, torch.Generator]:
        """The random generators of this step."""
        rng = np.random.default_rng((self.seed, self.step))
        return rng, torch.Generator().manual_seed(int(rng.integers(1 << 62)))

    @classmethod
    def over(cls, deadline: float | None) -> bool:
        """Whether a signal or the clock ends the run, of this process or another."""
        return processes.any_of(cls.stopped or (deadline is not None and time.monotonic() >= deadline))

    def run(self, loss_of_step, after_step=None, *, deadline=None, save_minutes=3.0, log_every=10) -> None:
        """Train until ``steps`` or the deadline (in seconds of ``time.monotonic``).

        ``loss_of_step(rng, generator)`` returns the loss and a dictionary of numbers to log.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        recent, started, saved, start = [], time.monotonic(), time.monotonic(), self.step
        first = processes.is_first()
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=10, disable=not first)
        while (self.steps is None or self.step < self.steps) and not self.over(deadline):
            self.step += 1
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * self.scale()
            loss, numbers = loss_of_step(*self.randomness())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            processes.average_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            if after_step:
                after_step(self.step)
            recent.append({"loss": loss.item(), **numbers})
            bar.update()
            if first and self.step % log_every == 0:
                mean = {k: round(float(np.mean([r[k] for r in recent if k in r])), 6) for r in recent for k in r}
                mean["s_per_step"] = round((time.monotonic() - started) / len(recent), 3)
                with self.log.open("a") as file:
                    file.write(json.dumps({"stage": self.name, "step": self.step, **mean}) + "\n")
                recent, started = [], time.monotonic()
            if time.monotonic() - saved > 60 * save_minutes:
                self.save()
                saved = time.monotonic()
        bar.close()
        if self.step > start or not self.path.exists():
            self.save()
