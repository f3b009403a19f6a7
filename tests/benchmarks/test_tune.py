"""Other configurations of the attention kernel against the shipped: run in Triton's interpreter if there is no GPU."""

from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import tune
from todo_attn import machine
from todo_attn.bench import candidates, jsonl, kernels
from todo_attn.bench.compiling import Launch
from todo_attn.bench.harness import Rounds
from todo_attn.kernels import configs, launch
from todo_attn.kernels.configs import KernelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two heads: the interpreter runs one program after the other.
TINY = {
    d: replace(case, batch=1, height=64, width=96, dtype="fp32", levels={case.level: (2, d)})
    for d, case in tune.CASES.items()
}
OTHERS = [KernelConfig(32, 16, 4, 1), KernelConfig(16, 32, 4, 1, polynomial=True)]


def trying(monkeypatch, others):
    monkeypatch.setattr(candidates, "of_attention", lambda capability, head_dim: [None, *others])


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(tune, "CASES", TINY)
    trying(monkeypatch, OTHERS[:1])
    monkeypatch.setattr(kernels, "rounds_for", lambda device: Rounds(warmup=1, rounds=2))


@pytest.fixture
def cli(tmp_path):
    app = typer.Typer()
    app.command()(tune.main)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", DEVICE, "--size", "64", "--out", str(path)]
    return lambda *more: (CliRunner().invoke(app, [*arguments, *more]), path)


def test_every_setting_against_the_shipped(cli):
    result, path = cli("--head-dim", "40", "--head-dim", "80")
    assert result.exit_code == 0, result.output
    rows = jsonl.read(path)
    assert [(row["case"]["head_dim"], row["contender"]["name"]) for row in rows] == [
        (40, "32x16x4x1"),
        (40, "P V as Q K"),  # 32 + 16 columns in place of 64
        (80, "32x16x4x1"),
    ]
    assert all(row["speedup"] and row["baseline"]["name"] == "todo" for row in rows)
    assert all(row["baseline"]["relative_error"] < 1e-5 for row in rows)
    assert "P V as Q K" in result.stdout


def test_a_setting_whose_result_is_wrong_is_not_timed_and_no_failure(cli, monkeypatch):
    """exp2 by polynomial is too coarse for fp32."""
    trying(monkeypatch, OTHERS)
    result, path = cli("--head-dim", "80")
    assert result.exit_code == 0, result.output
    good, bad = jsonl.read(path)
    assert good["speedup"]
    assert bad["speedup"] is None
    assert bad["contender"]["samples"] == []
    assert "wrong result, not timed: off by" in bad["contender"]["error"]


def test_the_shipped_one_being_wrong_is_a_failure(cli, monkeypatch):
    attend = launch.attention

    def attention(*arguments):
        config, tile = arguments[7:]
        return attend(*arguments) + (config not in OTHERS and tile is None)

    monkeypatch.setattr(launch, "attention", attention)
    wrong, _ = cli("--head-dim", "80")
    assert wrong.exit_code == 1
    assert "todo was refused: ValueError: wrong result" in wrong.stderr.splitlines()[-1]


def test_where_rows_cannot_go_is_refused_before_anything_is_timed(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "run", None)
    result, _ = cli("--out", str(tmp_path))
    assert result.exit_code == 2
    assert "--out must be a file that can be written" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [["--head-dim", "48"], ["--size", "100"], ["--device", "tpu"]])
def test_what_there_is_not_is_refused(cli, arguments):
    result, path = cli(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not path.exists()


def test_what_does_not_compile_is_said_and_not_timed(cli, monkeypatch):
    """On a GPU; here the compilation is none."""
    device, case = torch.device("cpu"), TINY[80]
    (bad,) = tune.variants(case, device).values()
    monkeypatch.setattr(tune, "compile_all", lambda capability, launches: ["no" * (each == bad) for each in launches])
    seen = []
    monkeypatch.setattr(tune, "run", lambda make, *_: seen.append((make, _[-1])))
    tune.main()
    ((make, prepare),) = seen
    assert [candidate.name for candidate in make(case, device).ours] == ["32x16x4x1"]
    prepare([case], device)
    with pytest.raises(RuntimeError, match="no other configuration compiles"):
        make(case, device)


def test_the_launches_are_compiled_with_the_shipped_one():
    """Whatever was tuned: a launch without a configuration would ask for that."""
    device = torch.device("cpu")
    for case in TINY.values():
        launches = [tune.shipped(case, device), *tune.variants(case, device).values()]
        assert all(isinstance(each, Launch) and each.config is not None for each in launches)
        assert launches[0].config == configs.attention_config((9, 0), case.head_dim, half=False)
