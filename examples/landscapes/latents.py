"""Latents of rendered scenes, on disk and renewed while training goes on.

A pool is a window over an endless fixed sequence of scenes. The window moves on with the number of samples drawn, so
which scenes a step sees depends on nothing but the seed and the counts in the checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from tqdm import tqdm

from . import processes
from .model import LATENTS, PIXELS, build_vae
from .scenes import render, scene_of_index


class Pool:
    """``capacity`` scenes of one size: float16 latents (slots, 2, LATENTS, h, w), as they are and mirrored."""

    def __init__(self, folder: Path, height: int, width: int, capacity: int, seed: int, fresh: float):
        self.height, self.width, self.capacity, self.seed, self.fresh = height, width, capacity, seed, fresh
        self.slots = capacity + max(1, capacity // 8)  # the spare slots hold what comes next
        folder.mkdir(parents=True, exist_ok=True)
        self.latents = self.map(
            folder / f"{height}x{width}.latents", (self.slots, 2, LATENTS, height, width), np.float16
        )
        self.indices = self.map(folder / f"{height}x{width}.indices", (self.slots,), np.int64)  # scene index + 1, or 0

    @staticmethod
    def map(path: Path, shape: tuple[int, ...], dtype) -> np.memmap:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != size:
            with path.open("wb") as file:
                file.truncate(size)
        return np.memmap(path, dtype, "r+", shape=shape)

    def start(self, drawn: int) -> int:
        """The first scene of the window after so many samples."""
        return int(self.fresh * drawn)

    def missing(self, start: int, count: int) -> np.ndarray:
        """Those of the ``count`` scenes from ``start`` on that are not on disk."""
        wanted = np.arange(start, start + count)
        return wanted[self.indices[wanted % self.slots] != wanted + 1]

    def make(self, index: int, vae) -> None:
        """Render, encode and store one scene."""
        image = render(scene_of_index(self.seed, index), PIXELS * self.height, PIXELS * self.width)
        pixels = torch.from_numpy(np.stack([image, image[:, ::-1]])).permute(0, 3, 1, 2) * 2 - 1
        with torch.no_grad():
            self.latents[index % self.slots] = vae.encode(pixels).latents.numpy()
        self.indices[index % self.slots] = index + 1

    def draw(self, rng: np.random.Generator, count: int, drawn: int):
        """``count`` random scenes of the window and their latents (count, LATENTS, h, w)."""
        picked = self.start(drawn) + rng.integers(0, self.capacity, count)
        flips = rng.integers(0, 2, count)
        latents = np.stack([self.latents[i % self.slots, f] for i, f in zip(picked, flips, strict=True)])
        scenes = [scene_of_index(self.seed, int(i)) for i in picked]
        scenes = [scene.mirrored() if flip else scene for scene, flip in zip(scenes, flips, strict=True)]
        return scenes, torch.from_numpy(latents.astype(np.float32))


def load_vae(path: Path):
    """The autoencoder of a checkpoint of stage vae."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    vae = build_vae()
    vae.load_state_dict(state["models"]["vae"])
    return vae.eval().requires_grad_(False), state["step"]


class Pools:
    """The pools of every size, filled by a process in the background (``background=False``: by the caller)."""

    def __init__(self, work: Path, sizes: dict[tuple[int, int], int], seed: int, fresh: float, background: bool = True):
        self.vae_path, self.folder, self.background = work / "vae.pt", work / "latents", background
        self.vae, step = load_vae(self.vae_path)
        meta = {"vae_step": step, "seed": seed}
        about = self.folder / "about.json"
        if processes.is_first() and about.exists() and json.loads(about.read_text()) != meta:
            for path in self.folder.iterdir():  # of another autoencoder or sequence
                path.unlink()
        processes.wait()
        self.arguments = {
            (h, w): (self.folder, h, w, capacity, seed * 1_000_003 + 1009 * h + w, fresh)
            for (h, w), capacity in sizes.items()
        }
        self.pools = {size: Pool(*arguments) for size, arguments in self.arguments.items()}
        if processes.is_first():
            about.write_text(json.dumps(meta))
        processes.wait()  # until all files are there, before the first process writes to them
        self.process = None

    def __getitem__(self, size: tuple[int, int]) -> Pool:
        return self.pools[size]

    def fill(self, counts: dict[tuple[int, int], int], sizes) -> None:
        """Render what the windows of these sizes lack, with a progress bar; the first process does it for all."""
        for size in sizes if processes.is_first() else ():
            pool = self[size]
            lacking = pool.missing(pool.start(counts[size]), pool.capacity)
            with one_thread():
                for index in tqdm(lacking, f"latents {size[0]} x {size[1]}", mininterval=10, disable=not len(lacking)):
                    pool.make(int(index), self.vae)
        processes.wait()

    def begin(self, counts: dict[tuple[int, int], int]) -> None:
        """Start the background process."""
        self.starts = {size: mp.get_context("spawn").Value("q", self[size].start(counts[size])) for size in self.pools}
        if self.background and processes.is_first():
            self.process = mp.get_context("spawn").Process(
                target=produce, args=(self.vae_path, self.arguments, self.starts, os.getpid()), daemon=True
            )
            self.process.start()

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.join()

    def draw(self, size: tuple[int, int], rng: np.random.Generator, count: int, drawn: int):
        """See ``Pool.draw``; waits until the window is complete."""
        pool = self[size]
        start = pool.start(drawn)
        self.starts[size].value = start
        while len(lacking := pool.missing(start, pool.capacity)):
            if not processes.is_first():
                time.sleep(0.05)
            elif self.process is None:
                with one_thread():
                    for index in lacking:
                        pool.make(int(index), self.vae)
            elif not self.process.is_alive():
                raise RuntimeError("The background process that renders scenes has died; its error is above.")
            else:
                time.sleep(0.05)
        return pool.draw(rng, count, drawn)


class one_thread:  # noqa: N801
    """Encode on one thread, as the background process does: the same bits."""

    def __enter__(self):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_):
        torch.set_num_threads(self.threads)


def produce(vae_path: Path, arguments, starts, parent: int) -> None:
    """Keep every window complete, and the spare slots full; ends with the process that started it."""
    os.nice(5)
    torch.set_num_threads(1)
    vae, _ = load_vae(vae_path)
    pools = {size: Pool(*values) for size, values in arguments.items()}
    while os.getppid() == parent:
        for size, pool in pools.items():  # a larger size waits until the smaller ones are complete
            lacking = pool.missing(starts[size].value, pool.slots)
            if len(lacking):
                pool.make(int(lacking[0]), vae)
                break
        else:
            time.sleep(0.1)
