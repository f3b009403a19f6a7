"""The kernels compiled for every architecture, no GPU needed: they compile, do not spill, and use the matrix units.

In processes of their own, because here the kernels are Triton's interpreted ones.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from benchmarks.sass import RATES
from todo_attn.kernels import configs

ROOT = Path(__file__).parents[2]
# The head dims compiled for each architecture: those of Stable Diffusion, and elsewhere in the table of launch
# configurations. `python -m benchmarks.compile_report` compiles all of them for all architectures.
HEAD_DIMS = {
    80: {8, 40, 64, 80, 160, 256},
    86: {64},
    89: {96},
    90: {24, 40, 64, 80, 128, 160, 256},
    100: {40, 160},
    120: {64, 160},
}
BACKWARD = {"query_grad": 3, "key_grad": 4}  # the number of products
LATENCY = 800  # clocks that a copy from memory to shared memory may take
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have


def python(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )


def compile_report(*arguments):
    run = python("-m", "benchmarks.compile_report", "--json", "--jobs", "1", *arguments)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def check(rows):
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY[row["arch"]] * 1024, row
        assert row["spills"] == 0 and row["stack"] == 0, row
        if row["kernel"] in ("attention", "pack", *BACKWARD):
            assert row["narrow"] == 0, row
        if row["kernel"] == "attention" and row["dtype"] != "fp32":
            check_clocks(row)
        if row["kernel"] in BACKWARD:
            check_backward(row)
    return rows


def check_backward(row):
    """Above 160 columns a tile has fewer rows than the warps need, so some products run twice."""
    assert row["mma"] > 0 and not row["serialised"], row
    columns = sum(configs.backward_tiles(divmod(row["arch"], 10), row["head_dim"]).k)
    if row["head_dim"] <= 128:
        rates = RATES[row["arch"]]
        assert row["tensor"] == pytest.approx(BACKWARD[row["kernel"]] * columns / rates.tensor, rel=0.01), row
        assert row["mufu"] == pytest.approx(1 / rates.special, rel=0.1), row
    if row["head_dim"] <= 160:
        assert row["ahead_clocks"] >= LATENCY, row


def check_clocks(row):
    """The counts of the loop that was found, against arithmetic: its products with padding, an exp2 for each score."""
    tile = configs.tiles(divmod(row["arch"], 10), row["head_dim"])
    products = (sum(tile.k) + sum(tile.v)) / RATES[row["arch"]].tensor
    exp2 = (7 / 8 if row["polynomial"] else 1) / RATES[row["arch"]].special
    assert row["tensor"] == pytest.approx(products, rel=0.01), row
    # And those of a row's factor: one in each of the threads that share the row.
    assert exp2 <= row["mufu"] <= exp2 * (1 + 17 / row["block_n"]), row
    assert row["bound"] == max(row[pipe] for pipe in ("tensor", "mufu", "fma", "alu", "issue", "smem")), row
    assert row["bound"] <= row["no_overlap"] <= 2 * row["bound"] + 1e-4, row
    if row["head_dim"] <= 160:
        assert row["ahead_clocks"] >= LATENCY, row
    if row["head_dim"] <= 80:  # beyond, tiles of 4 warps do not fit the registers
        assert row["smem"] <= row["tensor"] or row["smem"] <= row["mufu"], row


@pytest.mark.parametrize("arch", HEAD_DIMS)
def test_fp16_in_every_mode(arch):
    head_dims = [f for d in HEAD_DIMS[arch] for f in ("--head-dim", str(d))]
    rows = check(compile_report("--dtype", "fp16", "--arch", str(arch), *head_dims))
    attention = [row for row in rows if row["kernel"] == "attention"]
    assert {row["head_dim"] for row in attention} == HEAD_DIMS[arch]
    assert {row["mode"] for row in attention} == {"plain", "tail", "large-scale", "lse"}
    assert {(row["kernel"], row["mode"]) for row in rows if row["kernel"] in BACKWARD} == {
        *(("query_grad", mode) for mode in ("plain", "tail")),
        ("key_grad", "plain"),
    }
    assert {row["mode"] for row in rows if row["kernel"] == "pack"} == {"nearest", "nearest-exact", "mean"}
    assert {row["head_dim"] for row in rows if row["kernel"] == "match"} == {20, 320, 1280}
    assert all(row["mma"] > 0 for row in rows if row["kernel"] in ("attention", "match"))
    assert all(row["ahead"] > 1 for row in rows if row["kernel"] == "match")
    if arch == 90:
        assert all(row["wgmma"] > 0 for row in rows if row["kernel"] in ("attention", "match"))
        assert all(row["wgmma"] > 0 for row in rows if row["kernel"] in BACKWARD and row["head_dim"] <= 160)
        assert not any(row["serialised"] for row in attention)


@pytest.mark.parametrize(("dtype", "arch", "head_dim"), [("bf16", 90, 40), ("fp32", 80, 40), ("fp32", 90, 160)])
def test_other_dtypes(dtype, arch, head_dim):
    """At Stable Diffusion's smallest or largest head dim; bf16 compiles to the counts of fp16."""
    for row in check(compile_report("--dtype", dtype, "--arch", str(arch), "--head-dim", str(head_dim))):
        if row["kernel"] in ("attention", "match"):
            assert (row["mma"] > 0) == (dtype == "bf16"), row
            assert (row["wgmma"] > 0) == (dtype == "bf16" and row["arch"] >= 90 and row["arch"] < 120), row


# SM clocks per score on sm_90: the main loop's bound, and its time without any overlap, for "plain" and "large-scale".
# A guard: a change that makes the loop slower has to say so here.
CLOCKS = {40: (0.0565, 0.112, 0.112), 64: (0.0635, 0.120, 0.127), 80: (0.079, 0.149, 0.156), 160: (0.158, 0.268, 0.274)}


def test_clocks_per_score_and_dump(tmp_path):
    """Also if the last tile is partial, which must not cost the loop anything, and if the scale is large."""
    head_dims = [f for d in CLOCKS for f in ("--head-dim", str(d))]
    rows = compile_report(
        "--arch", "90", "--dtype", "fp16", "--kernel", "attention", "--dump", str(tmp_path), *head_dims
    )
    assert {(row["head_dim"], row["mode"]) for row in rows} == {
        *product((40, 64, 80, 160), ("plain", "large-scale", "lse")),
        *product((64, 80, 160), ("tail",)),
    }
    for row in rows:
        dumped = json.loads((tmp_path / f"attention-sm90-fp16-d{row['head_dim']}-{row['mode']}.json").read_text())
        assert dumped == row
        assert {"arch", "dtype", "head_dim", "mode", "block_m", "block_n", "num_warps"} <= set(row)
        bound, *no_overlap = CLOCKS[row["head_dim"]]
        assert row["bound"] <= bound and row["no_overlap"] <= no_overlap[row["mode"] == "large-scale"], row
        assert row["spills"] == row["stack"] == 0 and not row["serialised"], row
    assert len(list(tmp_path.glob("*.cubin"))) == len(rows)


def test_one_exp2_in_eight_leaves_the_special_function_unit(tmp_path):
    """The polynomial is written for the whole tile; the assembler has to drop the seven in eight that are not used."""
    compile_report(
        "--arch", "90", "--dtype", "fp16", "--kernel", "attention", "--dump", str(tmp_path), "--head-dim", "40"
    )
    from benchmarks import sass

    names = [i.split()[0] for i in sass.hot_loop(tmp_path / "attention-sm90-fp16-d40-plain.cubin")]
    scores = 128 * 256 // 256  # a thread's, of 256 threads
    assert names.count("MUFU.EX2") == scores * 7 // 8 + 2  # and its two rows' factors
    assert names.count("FMNMX.NAN") == scores // 8


def test_other_settings_than_the_shipped(tmp_path):
    """Only attention is compiled, each setting in a file of its own, and a row says what it was compiled with."""
    tried = ["--settings", "128x64x4x2", "--settings", "128x64x4x2:poly", "--settings", "64x128x4x3"]
    rows = compile_report("--arch", "90", "--dtype", "fp16", "--head-dim", "40", "--dump", str(tmp_path), *tried)
    keys = ("mode", "block_m", "block_n", "num_warps", "num_stages", "polynomial")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (mode, *run)
        for run in ((128, 64, 4, 2, False), (128, 64, 4, 2, True), (64, 128, 4, 3, False))
        for mode in ("plain", "large-scale", "lse")
    ]
    assert all(row["kernel"] == "attention" and row["arch"] == 90 and "bound" in row for row in rows)
    names = [f"attention-sm90-fp16-d40-{mode}" for mode in ("plain", "large-scale", "lse")]
    endings = ("128x64x4x2", "128x64x4x2-poly", "64x128x4x3")
    assert {path.stem for path in tmp_path.glob("*.cubin")} == {f"{n}-{e}" for n, e in product(names, endings)}
    dumped = json.loads((tmp_path / "attention-sm90-fp16-d40-plain-128x64x4x2-poly.json").read_text())
    assert dumped == rows[3]


# Options, and what has to be said about them.
WRONG = [
    (["--arch", "75"], "among"),
    (["--dtype", "fp8"], "among"),
    (["--head-dim", "12"], "multiple of 8"),
    (["--kernel", "gather"], "among"),
    (["--channels", "0"], "at least 1, got 0"),
    (["--jobs", "0"], "at least 1, got 0"),
    (["--settings", "128x64"], "QUERIESxKEYSxWARPSxSTAGES"),
    (["--settings", "96x64x4x2"], "powers of two"),
    (["--settings", "128x64x4x2:fast"], "QUERIESxKEYSxWARPSxSTAGES"),
    (["--settings", "128x64x4x2", "--kernel", "match"], "got --kernel match"),
    (["--settings", "128x64x4x2:poly", "--dtype", "fp32"], "got fp32"),
    (["--dump", "/proc/nowhere/cubins"], "folder that can be written to"),
    (["--dump", __file__], "folder that can be written to"),
]
_REFUSED = """
import json, sys, typer
from typer.testing import CliRunner
from benchmarks import compile_report
compile_report.report = None  # nothing is to be compiled
app = typer.Typer()
app.command()(compile_report.main)
runs = [CliRunner().invoke(app, options) for options in json.loads(sys.argv[1])]
print(json.dumps([(run.exit_code, run.output) for run in runs]))
"""


def test_wrong_options_are_refused_before_anything_is_compiled():
    """All in one process: importing takes longer than refusing."""
    run = python("-c", _REFUSED, json.dumps([options for options, _ in WRONG]))
    assert run.returncode == 0, run.stderr[-2000:]
    for (options, must), (code, output) in zip(WRONG, json.loads(run.stdout), strict=True):
        said = " ".join(output.replace("\u2502", " ").split())
        assert code == 2 and options[0] in said and must in said, (options, said)


def test_tiles_split_head_dims():
    """40, 80 and 160 as 32 + 16, 64 + 16 and 128 + 32; every tile a power of two that covers the head dim."""
    assert [configs.tiles((9, 0), d).k for d in (40, 80, 160)] == [(32, 16), (64, 16), (128, 32)]
    assert [configs.tiles(c, 40).v for c in ((8, 0), (9, 0), (10, 0), (12, 0))] == [
        (32, 16),
        (64, 0),
        (64, 0),
        (32, 16),
    ]
    for capability, head_dim in product([(8, 0), (9, 0)], range(8, 257, 8)):
        tile = configs.tiles(capability, head_dim)
        for parts in (tile.k, tile.v):
            assert all(p == 0 or (p >= 16 and p & (p - 1) == 0) for p in parts)
            assert head_dim <= sum(parts) < head_dim + 32 or sum(parts) in (64, 256)
        assert tile.ones == (sum(tile.v) > head_dim)
        assert tile.v_columns >= head_dim + tile.ones


def test_an_untuned_gpu_gets_the_default_settings():
    for head_dim in (8, 40, 128, 256):
        new, default = (configs.attention_config(c, head_dim, half=True) for c in ((13, 7), (8, 0)))
        assert new == default
