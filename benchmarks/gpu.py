"""Everything that needs a GPU in one command on a bare machine: tests, kernels, UNets; the most important first.

python -m benchmarks.gpu --minutes 9 --out results --wheels wheels
python -m benchmarks.gpu --minutes 9 --out results --dry-run       only print the steps
python -m benchmarks.gpu --minutes 2 --out results --device cpu    the same on small sizes, to try it without a GPU
python -m benchmarks.gpu --minutes 5 --out results --tune          only the configurations to try, and candidate kernels

It needs torch, Triton and numpy, and a checkout, or a copy of one with its commit in $GIT_COMMIT. It installs only the
wheels in --wheels, into a temporary folder: whatever the machine lacks of diffusers, pytest, typer, tabulate, tqdm and
the peers tomesd, DeepCache and sageattention. The compiled libraries todo_attn/*.so are used if they are there.

Each step is a process of its own with a share of the time left. At its limit it is told to stop. Rows are written as
they are measured, so those measured by then are kept.

--out gets summary.txt, kernels.jsonl, unet.jsonl, tune.jsonl and a log of each part. The last output is a short table.
"""

# Only the standard library until the wheels are installed: typer and tabulate may come from them.
from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_GRACE = {signal.SIGINT: 8.0, signal.SIGTERM: 4.0, signal.SIGKILL: 2.0}  # seconds to end after each, in this order
_TABLE_SECONDS = sum(_GRACE.values()) + 6  # reserved for stopping the last step and for the table
Command = list[str]


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name: what it does.
        log: the file in the output folder to which its output is added.
        share: of the time left, relative to the shares of the steps after it.
        command: returns the command for the seconds that it has.
    """

    name: str
    log: str
    share: float
    command: Callable[[float], Command]


@dataclass(frozen=True)
class Outcome:
    """The result of a step."""

    name: str
    seconds: float
    said: str


def steps(device: str, out: Path, path: Sequence[str], tune: bool = False) -> list[Step]:
    """The steps in order; ``path`` is the sys.path of their processes."""
    gpu = device == "cuda"

    def module(name: str, *arguments: object) -> Command:
        return [sys.executable, "-m", name, *map(str, arguments)]

    def has(package: str) -> bool:
        return PathFinder.find_spec(package, list(path)) is not None

    def pytest(*arguments: str) -> Callable[[float], Command]:
        workers = ["-n", "8"] if gpu and has("xdist") else []
        # A file that needs a missing package must not stop the others.
        options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *workers]
        return lambda seconds: module("pytest", *options, *arguments)

    def doctor(seconds: float) -> Command:
        return module("todo_attn.cli", "doctor")

    def sanitized(seconds: float) -> Command:
        options = ["--target-processes", "application-only", "--report-api-errors", "no", "--error-exitcode", "9"]
        return ["compute-sanitizer", *options, *doctor(seconds)]

    def kernels(seconds: float) -> Command:
        small = [] if gpu else ["--only", "gather", "--only", "match_tokens"]
        minutes = max(0.0, seconds - 15) / 60  # so that the last case ends in time
        arguments = ["--device", device, "--out", out / "kernels.jsonl", "--minutes", f"{minutes:.2f}", *small]
        return module("benchmarks.kernels", *arguments)

    def unet(size: Sequence[int], methods: str, *more: object) -> Callable[[float], Command]:
        def command(seconds: float) -> Command:
            arguments: list[object] = ["--device", device, "--out", out / "unet.jsonl", "--methods", methods, *more]
            for side in size if gpu else [64]:
                arguments += ["--size", side]
            # The rest is for loading, drawing weights and warming up.
            arguments += ["--seconds", max(1, int(seconds * 0.4 / len(size)))]
            return module("benchmarks.unet", *arguments, *([] if gpu else ["--model", "tiny", "--rounds", 1]))

        return command

    def tuning(name: str) -> Callable[[float], Command]:
        def command(seconds: float) -> Command:
            # A head dim takes less than a minute: its oracle, 6 s of rounds; candidates also their checks.
            minutes = max(0.0, seconds - 60) / 60
            return module(name, "--device", device, "--out", out / "tune.jsonl", "--minutes", f"{minutes:.2f}")

        return command

    if tune:
        return [
            Step("every op against its oracle", "doctor.log", 30, doctor),
            Step("configurations", "tune.log", 260, tuning("benchmarks.tune")),
            # Last: a candidate that hangs takes its whole time limit.
            Step("candidates", "tune.log", 230, tuning("benchmarks.experiments.hopper.tune")),
        ]
    many = ["--calls", 50 if gpu else 4]
    ours = (
        ["tests/ops", "tests/kernels/test_exp2.py", "tests/kernels/test_backward.py"]
        if gpu
        else ["tests/ops/test_tokens.py"]
    )
    # Single files: others in these folders need packages that a bare machine lacks, or no GPU.
    graphs = ["tests/diffusers/test_compile.py", "tests/diffusers/dato/test_compiled.py"]
    others = ["tests/bench", *graphs * has("diffusers")]
    # In addition to the plain run, which works even if the sanitizer cannot run or is slow.
    memory = Step("every op under compute-sanitizer", "doctor.log", 20, sanitized)
    return [
        Step("every op against its oracle", "doctor.log", 20, doctor),
        Step("tests of the ops", "tests.log", 75, pytest(*ours)),
        Step("kernels", "kernels.log", 200, kernels),
        Step("UNet, ToDo", "unet.log", 40, unet([1024, 2048], "dense,todo,tome")),
        Step("UNet, DaTo", "unet.log", 35, unet([512], "dense,dato,deepcache", *many)),
        # One round: a dense run of 50 calls takes most of the time.
        Step("UNet, ToDo and DaTo", "unet.log", 80, unet([2048], "dense,todo+dato", *many, "--rounds", 1)),
        Step("UNet of SDXL", "unet.log", 30, unet([2048], "dense,todo", "--model", "sdxl")),
        Step("UNet, compiled", "unet.log", 60, unet([1024], "dense,todo", "--compile")),
        Step("other tests that need a GPU", "tests.log", 30, pytest("-m", "gpu", *others)),
        *([memory] if gpu and shutil.which("compute-sanitizer") else []),
    ]


def seconds_for(step: Step, after: Sequence[Step], left: float) -> float:
    """The seconds that a step gets of those left; what it does not use is for the steps after it."""
    return max(0.0, left) * step.share / (step.share + sum(later.share for later in after))


def run_all(steps: Sequence[Step], seconds: float, out: Path, environment: dict[str, str]) -> list[Outcome]:
    """Run the steps in order within ``seconds``; an interrupt ends the running one and skips the rest."""
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    try:
        for i, step in enumerate(steps):
            share = seconds_for(step, steps[i + 1 :], end - time.monotonic())
            print(f"{step.name}: at most {share:.0f} s", flush=True)
            outcomes.append(run(step, share, out / step.log, environment))
            print(f"  {outcomes[-1].said}, {outcomes[-1].seconds:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    return outcomes


def run(step: Step, seconds: float, log: Path, environment: dict[str, str]) -> Outcome:
    """Run one step for at most ``seconds``, then end it and all processes that it has started."""
    start = time.monotonic()
    command = step.command(seconds)
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(step.name, 0.0, f"could not start: {error}")
        try:
            said = "done" if child.wait(seconds) == 0 else f"failed: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            said = "stopped at its limit"
        finally:
            _stop(child)
    return Outcome(step.name, time.monotonic() - start, said)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the process group of a step: first by SIGINT, so that it can finish its line, then by stronger signals."""
    for kind, grace in _GRACE.items():
        if child.poll() is not None:
            break
        os.killpg(child.pid, kind)
        try:
            child.wait(grace)
        except subprocess.TimeoutExpired:
            continue
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what is left of the group


def _last_line(log: Path) -> str:
    """The last line with text; the frame around a message is not text."""
    lines = [line.strip(" │╭╮╰╯─") for line in log.read_text(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "no output")


def install(wheels: Path | None, target: Path, log: Path) -> str | None:
    """Install the wheels of a folder into ``target``; returns the problem, or None."""
    files = sorted(str(file) for file in wheels.glob("*.whl")) if wheels else []
    if not files:
        return f"no wheels in {wheels}" if wheels else None
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], capture_output=True, text=True)
    log.write_text(done.stdout + done.stderr)
    return None if done.returncode == 0 else f"the wheels could not be installed: {_last_line(log)}"


def environment_in(folder: Path) -> dict[str, str]:
    """The environment of the steps, with packages and all caches in ``folder``."""
    known = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), *([known] if known else [])]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
    }


def cannot(device: str) -> str | None:
    """The reason why nothing can be measured here, or None."""
    import torch

    from todo_attn import machine

    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda needs a GPU that torch sees; --device cpu tries the steps on small sizes"
    if machine.commit() is None:
        return "this is no git checkout: rows name their commit, so give it as GIT_COMMIT in the environment"
    return None


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    """The results of the steps, and the rows as a table."""
    from todo_attn.bench import jsonl, report

    lines = [f"{outcome.seconds:5.0f} s  {outcome.name}: {outcome.said}" for outcome in outcomes]
    files = [file for name in ("kernels", "unet", "tune") if (file := out / f"{name}.jsonl").exists()]
    rows = [row for file in files for row in jsonl.read(file)]
    if rows:
        about = rows[0]["machine"]
        names = ("device", "driver", "torch", "triton", "commit")
        lines += ["", ", ".join(f"{name} {about.get(name)}" for name in names), report.table(rows)]
        lines += report.slower(rows)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 if a step failed or was not reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9, help="for all of it; 9")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and logs")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the machine lacks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes, to try it out")
    parser.add_argument(
        "--tune", action="store_true", help="only other configurations of the attention kernel, and candidates"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the steps, run none")
    given = parser.parse_args(arguments)
    if not given.minutes * 60 > _TABLE_SECONDS:
        parser.error(f"--minutes must be more than {_TABLE_SECONDS / 60:.2f}, got {given.minutes}")
    if not given.dry_run and (problem := cannot(given.device)):
        parser.error(problem)
    start = time.monotonic()
    for kind in (signal.SIGINT, signal.SIGTERM):  # a shell may ignore SIGINT, which the steps would inherit
        signal.signal(kind, signal.default_int_handler)
    out = given.out.absolute()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        path = [str(folder / "site"), *sys.path]
        if given.dry_run:
            left = 60 * given.minutes - _TABLE_SECONDS
            planned = steps(given.device, out, path, given.tune)
            for i, step in enumerate(planned):
                share = seconds_for(step, planned[i + 1 :], left)
                left -= share
                print(f"{share:4.0f} s  {step.name} ({step.log})\n        {' '.join(step.command(share))}")
            return 0
        out.mkdir(parents=True, exist_ok=True)
        if problem := install(given.wheels, folder / "site", folder / "pip.log"):
            print(problem, flush=True)
        seconds = 60 * given.minutes - _TABLE_SECONDS - (time.monotonic() - start)
        planned = steps(given.device, out, path, given.tune)
        outcomes = run_all(planned, seconds, out, environment_in(folder))
        sys.path.append(str(folder / "site"))
        try:
            text = summary(outcomes, out)
        except ImportError as error:
            text = json.dumps([outcome.__dict__ for outcome in outcomes]) + f"\nno table: {error}"
    (out / "summary.txt").write_text(text + "\n")
    print(text)
    return 0 if [o.said for o in outcomes] == ["done"] * len(planned) else 1


if __name__ == "__main__":
    sys.exit(main())
