"""The rows behind docs/recipes.md."""

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

from benchmarks import RESULTS, recipes
from todo_attn.bench import jsonl
from todo_attn.bench.harness import Rounds
from todo_attn.models.architectures import CONFIGS
from todo_attn.models.unets import on_meta

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_recipes_against_dense_and_the_distance_of_their_images():
    chosen = {"todo": recipes.FEW_STEPS["todo-kv1024"], "nothing": lambda pipe: None}
    rows = recipes.timed(chosen, torch.device("cpu"), 256, 1, Rounds(rounds=1))
    todo, nothing = (row["contender"] for row in rows)
    assert todo["error"] is nothing["error"] is None
    assert todo["psnr"] > 20 and nothing["psnr"] is None  # the same image
    json.dumps(rows, allow_nan=False)


def test_a_recipe_that_cannot_be_applied_gets_a_row_with_the_error():
    def broken(pipe):
        raise ModuleNotFoundError("No module named 'torchao'")

    (row,) = recipes.timed({"int8": broken}, torch.device("cpu"), 64, 1, Rounds(rounds=1))
    assert "torchao" in row["contender"]["error"] and row["speedup"] is None


def test_counts_are_those_of_the_page(tmp_path):
    path = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(recipes.app, ["counts", "--size", "1024", "--out", str(path)])
    assert result.exit_code == 0, result.output
    (row,) = jsonl.read(path)
    stored = jsonl.read(RESULTS / "recipes-cpu.jsonl")
    (same,) = (s for s in stored if s["benchmark"] == row["benchmark"] and s["case"] == row["case"])
    assert (row["operations"], row["share"]) == (same["operations"], same["share"])
    assert f"| 1024 x 1024 | {row['operations']['vae'] / 1e12:.1f} |" in PAGE.read_text(encoding="utf-8")


def test_tiles_of_the_vae_cost_more_operations_above_their_own_size():
    whole, tiles = ([recipes.decoding(size, tiled=tiled) for size in (512, 768)] for tiled in (False, True))
    assert whole[0] == tiles[0] and whole[1] < tiles[1]


def test_the_share_of_linear_layers_that_the_page_names():
    text = PAGE.read_text(encoding="utf-8")
    for name in ("sd15", "sdxl"):
        unet = on_meta(CONFIGS[name])
        linear = sum(module.weight.numel() for module in unet.modules() if isinstance(module, torch.nn.Linear))
        assert f"{linear / sum(p.numel() for p in unet.parameters()):.0%}".replace("%", " %") in text
