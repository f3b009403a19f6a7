"""``todo-attn search``: what it prints and writes, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from todo_attn.config import schedule
from todo_attn.config.dato import DaToConfig


@pytest.fixture
def search(run, sd_folder, tmp_path, monkeypatch):
    """search(*options): a short one of a single image in 4 calls, in the folder "found"."""
    pytest.importorskip("pymoo")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("ein Hügel\n", encoding="utf-8")

    def search(*options):
        given = ("--prompts", "prompts.txt", "--steps", 4, "--height", 32, "--width", 32, "--device", "cpu")
        short = ("--population", 4, "--generations", 1, "--metric", "latents", "--folder", "found")
        return run("search", sd_folder, *given, *short, *options)

    return search


def test_from_a_model_to_a_comparison_by_a_schedule_that_was_found(search, run, sd_folder, tmp_path):
    code = "def nearness(image, dense, prompt):\n    return -float((image != dense).mean())\n"
    (tmp_path / "mine.py").write_text(code)
    options = ("--prune-ratios", "0,0.5", "--todo-factors", "1,2", "--metric", "mine:nearness")
    done = search(*options)
    assert done.code == 0, done.err
    assert "front-01" in done.out and "speed-up" in done.out and "mine:nearness" in done.out
    assert "generation 1 of 1: " in done.err
    file = tmp_path / "found" / "schedules" / "front-01.json"
    config = DaToConfig.from_file(file, calls=4)
    where = ("--steps", 4, "--height", 32, "--width", 32, "--prompt", "ein Hügel", "--device", "cpu")
    compared = run("compare", sd_folder, "--methods", "dense,dato", "--schedule", file, *where, "--json")
    assert compared.code == 0, compared.err
    options_of = json.loads(compared.out)["methods"][1]["options"]
    assert DaToConfig.from_dict({k: v for k, v in options_of.items() if k != "schedule"}) == config
    again = search(*options, "--json")
    assert again.code == 0
    assert json.loads(again.out) == json.loads((tmp_path / "found" / "front.json").read_text())
    listed = run("schedules", "--name", file, "--model", sd_folder, "--steps", 3, "--height", 32, "--width", 32)
    assert listed.code == 0 and "todo-attn search on tiny-sd" in listed.out


def refused(done, *words):
    assert done.code == 2 and not done.out, done.err
    assert done.err.count("\n") == 1 and done.err.startswith("todo-attn: error: "), done.err
    for word in words:
        assert word in done.err, done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--metric", "beauty"), ["--metric must be one of latents, psnr", "'beauty'"]),
        (("--metric", "no_such_module:x"), ["--metric must be MODULE:FUNCTION", "no_such_module"]),
        (("--metric", "perceptual"), ["--features must be given"]),
        (("--cost", "joules"), ["--cost must be one of operations, seconds"]),
        (("--prune-ratios", "0,x"), ["--prune-ratios must be numbers separated by commas, got '0,x'"]),
        (("--prune-ratios", "0.9"), ["--prune-ratios must be numbers from 0 to 0.75"]),
        (("--todo-factors", "1.5"), ["--todo-factors must be integers separated by commas"]),
        (("--population", 2), ["--population must be an integer of at least 4, got 2"]),
        (("--steps", 1), ["--steps must give at least 2 calls"]),
        (
            ("--start-from", "absent.json"),
            ["--start-from must be a file with a schedule", "absent.json cannot be read"],
        ),
        (
            ("--start-from", "long.json"),
            ["--start-from must be schedules for the 4 calls of this search", "for 7 calls"],
        ),
        (("--prompts", "latin.txt"), ["--prompts must be a UTF-8 file", "latin.txt"]),
        (("--prompts", "absent.txt"), ["--prompts must be a file that can be read"]),
        (("--prompt", "a hill"), ["--prompts and --prompt cannot both be given"]),
        (("--folder", "long.json/x"), ["--folder must be a folder that can be written"]),
        (("--folder", "."), ["--folder must be new, empty or of an earlier search"]),
    ],
)
def test_what_is_refused(search, tmp_path, options, words):
    schedule.save(schedule.Schedule("012012"), tmp_path / "long.json")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    refused(search(*options), *words)
    assert not (tmp_path / "found").exists()


def test_another_search_in_the_folder(search, tmp_path):
    assert search().code == 0
    before = (tmp_path / "found" / "checkpoint.json").read_bytes()
    refused(search("--search-seed", 1), "--folder must be of the same search", "search_seed 0 instead of 1")
    assert (tmp_path / "found" / "checkpoint.json").read_bytes() == before


def test_no_space(search, monkeypatch, tmp_path):
    right = Path.write_bytes

    def full(path, content):
        if "checkpoint" in path.name:
            raise OSError(28, "No space left on device")
        return right(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    done = search()
    assert done.code == 1 and "checkpoint.json cannot be written: No space left on device" in done.err
    monkeypatch.setattr(Path, "write_bytes", right)
    assert search().code == 0


def test_an_interrupt(search, monkeypatch, tmp_path):
    from todo_attn.search.fidelity import Fidelity

    right, left = Fidelity.of, iter(range(3))

    def of(self, *images):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return right(self, *images)

    monkeypatch.setattr(Fidelity, "of", of)
    done = search()
    assert done.code == 130 and "0 of 1 generations are in found, and the same command goes on" in done.err
    assert len(json.loads((tmp_path / "found" / "front.json").read_text())["points"]) == 3
    monkeypatch.setattr(Fidelity, "of", right)
    assert search().code == 0


def test_without_pymoo(search, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    monkeypatch.delitem(sys.modules, "todo_attn.search.evolution", raising=False)
    done = search()
    assert done.code == 1 and "pymoo is not installed: pip install 'todo_attn[search]'" in done.err
    assert not (tmp_path / "found").exists()


def test_no_option_begins_one_of_torchruns():
    """torchrun would take it for its own, or refuse it."""
    from torch.distributed.run import get_args_parser
    from typer.main import get_command

    from todo_attn.cli import commands

    theirs = {option for action in get_args_parser()._actions for option in action.option_strings} - {"--help"}
    ours = {option for param in get_command(commands.app).commands["search"].params for option in param.opts}
    assert "--start-from" in ours
    assert not {option for option in ours if option.startswith("--") and any(t.startswith(option) for t in theirs)}
