"""Figures from rows made up here: each benchmark's rows give their file, and what has none is said."""

import json

import pytest
import typer
from matplotlib import image
from typer.testing import CliRunner

from benchmarks import models, plot, plot_model
from todo_attn import ToDoConfig
from todo_attn.models import unets
from todo_attn.predict.count import count_self_attention, count_work
from todo_attn.predict.model import Rates, Work

GPU = {"device": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "capability": "9.0", "multiprocessors": 132}
CPU = {"device": "AMD EPYC", "driver": None, "cuda": None, "threads": 2}
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "diffusers": "0.42.1", "commit": "0123456789ab"}


def row(benchmark, case, baseline, contender, speedup=2.0, machine=GPU, measured="2026-11-21T06:02:36+00:00"):
    """As the harness writes it, of a baseline and a contender given as (name, what else is said of it)."""

    def side(name, **info):
        seconds = {"p20": 0.9, "p50": 1.0, "p80": 1.2}
        return {"name": name, "seconds": seconds, "samples": [1.0], "peak_gib": None, "error": None, **info}

    return {
        "benchmark": benchmark,
        "case": case,
        "baseline": side(baseline[0], **baseline[1]),
        "contender": side(contender[0], **contender[1]),
        "speedup": speedup and {"p20": speedup * 0.9, "p50": speedup, "p80": speedup * 1.1},
        "measured": measured,
        "machine": machine | VERSIONS,
    }


def unet_row(side, speedup, config=None, name="todo", model="sd15", calls=1, **others):
    case = {"model": model, "dtype": "fp16", "height": side, "width": side, "batch": 2, "calls": calls}
    config = (config or ToDoConfig()).to_dict()
    return row("unet", case, ("dense", {"self_attention_share": 0.6}), (name, {"config": config}), speedup, **others)


def attention_row(side, level, name, tflops, head_dim=40, ours=500.0):
    case = {"model": "sd15", "height": side, "width": side, "level": level, "batch": 2, "dtype": "fp16"}
    case |= {"head_dim": head_dim, "heads": 8}
    return row("attention", case, (name, {"tflops": tflops}), ("todo", {"tflops": ours, "sm_mhz": 1500.0}))


def token_row(benchmark, megabytes, name, rate, ours=3900.0, **case):
    case = {"model": "sd15", "height": 1024, "width": 1024, "level": 1, "batch": megabytes, "dtype": "fp16", **case}
    size = {"bytes": megabytes * 1e6}
    return row(benchmark, case, (name, size | {"gb_per_s": rate}), ("todo", size | {"gb_per_s": ours}))


@pytest.fixture
def cli(tmp_path):
    """cli(rows) -> what is said, and the names of the files, each of which is an image of some size."""
    app = typer.Typer()
    app.command()(plot.main)

    def cli(rows):
        results, out = tmp_path / "results", tmp_path / "images"
        results.mkdir()
        (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (results / "compare.json").write_text("{}")  # no rows, and none of plot's
        ran = CliRunner().invoke(app, ["--results", str(results), "--out", str(out)])
        assert ran.exit_code == 0, ran.output
        for path in out.iterdir():
            height, width, _ = image.imread(path).shape
            assert width > 1200 and height > 400
        return ran.output, sorted(path.name for path in out.iterdir())

    return cli


@pytest.fixture(autouse=True)
def _no_compilation_and_few_points_of_a_small_unet(monkeypatch):
    """A point of a line is a count of a whole UNet."""
    for name in ("sd15", "sdxl"):
        monkeypatch.setitem(models.CONFIGS, name, unets.SMALLEST)
    monkeypatch.setattr(plot, "_LINE_POINTS", 2)
    monkeypatch.setattr(plot_model, "clocks_per_score", lambda head_dim, dtype: {40: 0.057, 80: 0.091}.get(head_dim))


def test_every_figure(cli):
    rows = [
        *(unet_row(side, speedup) for side, speedup in ((1024, 1.8), (1536, 2.6), (2048, 4.5))),
        unet_row(1024, 2.3, ToDoConfig(max_kv_tokens=1024), "todo-kv1024"),
        unet_row(1024, 1.2, model="sdxl"),
        unet_row(512, 7.0, name="dato", calls=50),
        *(attention_row(2048, level, name, rate, dim) for level, dim in ((1, 40), (2, 80)) for name, rate in PEERS),
        *(token_row(op, size, "copy", 4000.0) for op in ("gather", "scatter", "recover") for size in (10, 100)),
        token_row("recover", 100, "torch", 1900.0, residual=True),
    ]
    said, files = cli(rows)
    assert files == ["attention-nvidia-h200.png", "token-ops-nvidia-h200.png", "unet-speedup-nvidia-h200.png"]
    assert "no rows" not in said


PEERS = (("sdpa-flash", 250.0), ("sdpa-cudnn", 330.0))


def test_what_has_no_rows_is_said_and_not_drawn(cli):
    said, files = cli([unet_row(1024, 1.6, machine=CPU)])
    assert files == ["unet-speedup-cpu-amd-epyc.png"]
    assert "no rows for attention: python -m benchmarks.kernels" in said
    assert "no rows for token-ops: python -m benchmarks.kernels" in said


def test_nothing_at_all(cli):
    said, files = cli([])
    assert files == []
    assert "no rows for unet-speedup: python -m benchmarks.unet" in said


def test_failed_sides_are_left_out_and_the_later_row_counts(cli):
    failed = unet_row(1024, None)
    old, new = unet_row(2048, 3.0, measured="2026-11-20T06:02:36+00:00"), unet_row(2048, 4.0)
    assert plot._latest([new, failed, old]) == [new]
    _, files = cli([failed, attention_row(1024, 1, "sdpa-flash", None, ours=300.0)])
    assert files == ["attention-nvidia-h200.png"]


def test_a_folder_that_is_none(tmp_path):
    app = typer.Typer()
    app.command()(plot.main)
    ran = CliRunner().invoke(app, ["--results", str(tmp_path / "nothing")])
    assert ran.exit_code == 2 and "must be a folder" in ran.output


def test_the_ceiling_is_the_bound_at_the_measured_clock():
    # 132 processors of 1.5 GHz, a score of 160 operations every 0.057 clocks.
    assert plot_model.ceiling(attention_row(1024, 1, "sdpa-flash", 1.0)) == pytest.approx(
        132 * 1.5e9 / 0.057 * 160 / 1e12
    )
    assert plot_model.ceiling(attention_row(1024, 1, "sdpa-flash", 1.0, head_dim=96)) is None  # cannot be compiled
    older = attention_row(1024, 1, "sdpa-flash", 1.0)
    older["machine"]["capability"] = "8.0"
    assert plot_model.ceiling(older) is None


def test_rates_are_those_of_the_smallest_dense_call():
    """A dense call made up from rates gives them back, batch and calls taken into account."""
    unet, rates = models.CONFIGS["sd15"], Rates(300e12, 500e12)
    made = unet_row(1024, 1.8)
    whole = count_work(unet, 1024, 1024, [], batch=2)[0].full
    attention = count_self_attention(unet, 1024, 1024, batch=2)
    made["case"]["calls"] = 50
    made["baseline"]["seconds"]["p50"] = 50 * rates.seconds(whole)
    made["baseline"]["self_attention_share"] = rates.seconds(attention) / rates.seconds(whole)
    found, where = plot_model.rates_of([unet_row(2048, 4.0), made])
    assert where == "1024 x 1024"
    assert (found.attention, found.other) == pytest.approx((rates.attention, rates.other))


def test_the_line_is_the_model_of_time():
    rates = Rates(attention=1e12, other=2e12)
    counted = count_work(models.CONFIGS["sd15"], 1024, 1024, [ToDoConfig()], batch=1)
    dense, todo = (each.full for each in counted)
    expected = rates.seconds(dense) / rates.seconds(todo)
    assert plot_model.predicted_speedups("sd15", 1024, [ToDoConfig(), ToDoConfig(factor=1)], rates) == [expected, 1]
    assert plot_model.predicted_speedups("sd15", 512, [ToDoConfig()], rates) == [1]
    assert isinstance(dense, Work) and todo.attention < dense.attention


def test_names_in_the_legend():
    named = {
        "todo": "ToDo, 4096 keys",
        "todo-paper": "ToDo, paper",
        "dato-coco": "DaTo, coco",
        "todo+dato-v1": "ToDo and DaTo, v1",
        "deepcache-3": "DeepCache, 3",
        "other": "other",
    }
    assert {name: plot._contender({"contender": {"name": name}}) for name in named} == named


@pytest.mark.parametrize("key", ["threads", "cpu_threads"])  # rows made before and after the key was renamed
def test_the_caption_names_the_threads_of_a_cpu(key):
    on_cpu = {"device": "AMD EPYC", "driver": None, "cuda": None, key: 3}
    assert plot._caption([unet_row(1024, 2.0, machine=on_cpu)]).startswith("AMD EPYC, 3 threads, ")


def test_the_caption_names_every_commit_in_order():
    old, new = unet_row(1024, 2.0, measured="2026-11-20T00:00:00+00:00"), unet_row(2048, 4.0)
    old["machine"] = old["machine"] | {"commit": "ba9876543210"}
    assert "commits ba9876543210 0123456789ab, 2026-11-20 to 2026-11-21" in plot._caption([new, old])
    assert "commit 0123456789ab, 2026-11-21" in plot._caption([new, new])
