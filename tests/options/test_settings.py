"""Everything that is refused before a model is loaded, and what is filled in where nothing is given."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from todo_attn import DaToConfig, ToDoConfig
from todo_attn.config import schedule
from todo_attn.options.methods import Method, SettingError, parse_factor
from todo_attn.options.settings import CompareSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", 100),
        ("height", 8),
        ("width", 0),
        ("width", -64),
        ("steps", 0),
        ("warmup_steps", 0),
        ("prompts", ("a red circle", " ")),
        ("seeds", ()),
        ("seeds", (0, -1)),
        ("guidance", -1.0),
        ("guidance", float("nan")),
        ("scheduler", "DDIM"),
        ("device", "tpu"),
        ("device", "cuda:99"),
        ("device", "meta"),
        ("dtype", "int8"),
        ("methods", "dense,todoo"),
        ("methods", ""),
        ("methods", "todo"),
        ("methods", "dense,todo,todo"),
        ("methods", "dense:2"),
        ("methods", "dense,todo:0"),
        ("methods", "dense,todo:"),
        ("methods", "dense,tome:0.8"),
        ("methods", "dense,tome:x"),
        ("factor", "two"),
        ("factor", "1=2,2=2"),
        ("factor", "coarsest=2"),
        ("max_kv_tokens", 0),
        ("mode", "bilinear"),
        ("tome_ratio", 0.0),
        ("tome_ratio", 0.76),
        ("methods", "dense,dato:nothing"),
        ("methods", "dense,dato:"),
        ("methods", "dense,todo+dato:nothing"),
        ("methods", "dense,dato,dato"),
        ("methods", "dense,dato+todo"),
        ("methods", "dense,deepcache:0"),
        ("methods", "dense,deepcache:1.5"),
        ("schedule", "nothing"),
        ("schedule", "."),
        ("prune_ratio", -0.1),
        ("prune_ratio", 0.76),
        ("prune_ratio", float("nan")),
        ("cache_interval", 0),
    ],
    ids=lambda x: str(x),
)
def test_refuses_naming_the_setting(sd_folder, name, value):
    with pytest.raises(SettingError, match=f"^{name} (must|has)") as caught:
        CompareSettings(model=str(sd_folder), **{name: value})
    assert caught.value.argument == name


def test_refuses_folders_that_are_no_pipeline(tmp_path):
    def refused(source: object) -> str:
        with pytest.raises(SettingError) as caught:
            CompareSettings(model=str(source))
        assert caught.value.argument == "model"
        return caught.value.problem

    (tmp_path / "folder").mkdir()
    assert "no folder" in refused(tmp_path / "nothing")
    assert "no folder" in refused("./owner/name")
    assert "no folder" in refused("nothing")
    assert "model_index.json" in refused(tmp_path / "folder")
    (tmp_path / "folder" / "model_index.json").write_text("{")
    assert "readable" in refused(tmp_path / "folder")
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "DiT"]}))
    assert "UNet" in refused(tmp_path / "folder")


def test_a_hub_id_is_left_to_the_loader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CompareSettings(model="owner/name").source == "owner/name"
    (tmp_path / "owner").mkdir()
    with pytest.raises(SettingError, match="no folder"):
        CompareSettings(model="owner/name")


def test_what_is_filled_in(sd_folder):
    settings = CompareSettings(model=str(sd_folder))
    on_cuda = torch.cuda.is_available()
    assert (settings.device, settings.dtype) == (("cuda", "float16") if on_cuda else ("cpu", "float32"))
    assert settings.prompts and settings.steps > 1 and settings.guidance is None
    assert CompareSettings().guidance == 3 and CompareSettings(guidance=1).guidance == 1  # of the shipped pipeline
    assert (settings.height, settings.width) == (None, None)
    assert replace(settings, height=128) == CompareSettings(model=str(sd_folder), height=128)
    assert CompareSettings(model=str(sd_folder), dtype="bf16").dtype == "bfloat16"
    assert json.loads(json.dumps(settings.to_dict())) == asdict(settings) | {
        "prompts": list(settings.prompts),
        "seeds": [0],
    }


def test_methods(sd_folder):
    settings = CompareSettings(
        model=str(sd_folder), methods=" todo:2, dense,tome:0.25,tome,todo,todo:paper", factor="4", tome_ratio=0.75
    )
    methods = settings.parsed_methods()
    assert [m.label for m in methods] == ["todo:2", "dense", "tome:0.25", "tome", "todo", "todo:paper"]
    configs = [settings.todo_config(m, 2048, 2048) for m in methods if m.kind == "todo"]
    assert [c.factor for c in configs] == [2, 4, ToDoConfig.paper(2048, 2048).factor]
    assert [settings.tome_ratio_of(Method("tome", v)) for v in ("0.25", None)] == [0.25, 0.75]


def test_methods_that_cache(sd_folder, tmp_path):
    file = tmp_path / "mine.json"
    schedule.save(schedule.Schedule("10" * 12 + "2"), file)
    settings = CompareSettings(
        model=str(sd_folder),
        methods="dense,dato,dato:search,dato:coco,todo+dato:search,deepcache,deepcache:5",
        schedule=str(file),
        cache_interval=2,
        factor="paper",
    )
    _, mine, search, coco, both, *deepcache = settings.parsed_methods()
    configs = {m: settings.dato_config(m, 51, 1024, 1024) for m in (search, coco, both)}
    assert configs[search].cache_schedule == schedule.load("search").digits
    assert configs[coco].cache_schedule == schedule.load("coco").digits
    assert configs[search].todo is None and configs[both].todo == ToDoConfig.paper(1024, 1024)
    assert settings.dato_config(mine, 26, 64, 64).cache_schedule == "10" * 12 + "2"
    assert settings.dato_config(mine, 51, 64, 64).cache_schedule == schedule.resample("10" * 12 + "2", 50)
    assert settings.dato_config(mine, 1, 64, 64).cache_schedule is None
    assert [settings.cache_interval_of(m) for m in deepcache] == [2, 5]


def test_a_schedule_with_a_ratio_and_factors_of_its_own(sd_folder, tmp_path):
    file = tmp_path / "mine.json"
    todo = ToDoConfig({1: 2})
    schedule.save(schedule.Schedule("10", prune_ratio=0.2, todo=todo), file)
    given = {"model": str(sd_folder), "methods": "dense,dato,todo+dato,dato:coco", "schedule": str(file)}
    _, mine, both, coco = CompareSettings(**given).parsed_methods()
    settings = CompareSettings(**given)
    assert settings.dato_config(mine, 3, 64, 64) == DaToConfig(0.2, cache_schedule="10", todo=todo)
    assert settings.dato_config(both, 3, 64, 64) == settings.dato_config(mine, 3, 64, 64)
    coarser = CompareSettings(**given, max_kv_tokens=16)
    assert coarser.dato_config(both, 3, 64, 64).todo == ToDoConfig(max_kv_tokens=16)
    assert settings.dato_config(coco, 3, 64, 64).prune_ratio == DaToConfig.prune_ratio
    asked = CompareSettings(**given, prune_ratio=0.5)
    assert asked.dato_config(mine, 3, 64, 64) == DaToConfig(0.5, cache_schedule="10", todo=todo)
    schedule.save(schedule.Schedule("10", prune_ratio=(0.0, 0.1, 0.2)), file)
    assert settings.dato_config(mine, 3, 64, 64).prune_ratio == (0.0, 0.1, 0.2)
    assert settings.dato_config(mine, 5, 64, 64).prune_ratio == (0.0, 0.1, 0.1, 0.2, 0.2)
    for ratio, problem in (
        (0.8, "prune ratios of at most 0.75, got 0.8"),
        (1.5, "a file with a schedule: .*prune_ratio"),
    ):
        file.write_text(f'{{"version": 1, "digits": "10", "prune_ratio": {ratio}}}')
        with pytest.raises(SettingError, match=f"^schedule must .*{problem}"):
            CompareSettings(**given)


@pytest.mark.parametrize("text", ["", "{", '{"version": 1}', '{"version": 1, "digits": "123"}'])
def test_a_file_that_is_no_schedule(sd_folder, tmp_path, text):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(SettingError, match=r"^schedule must be a file with a schedule: .*mine\.json"):
        CompareSettings(model=str(sd_folder), schedule=str(file))


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        *[("auto", "auto"), ("3", 3), ("paper", {"finest": 2}), ("1=4+2=2", {1: 4, 2: 2}), ("finest=2", {"finest": 2})],
        *[("1.5", 1.5), ("2.0", 2), ("1=2.5+2=1.25", {1: 2.5, 2: 1.25})],
    ],
)
def test_parse_factor(text, factor):
    assert parse_factor(text, 1024, 1024) == factor
    assert ToDoConfig(factor=factor).factor == factor


@pytest.mark.parametrize(
    "text",
    [
        *["1=2+1=3", "finest=2+finest=4", "", "0", "-1", "0.5", "1.", ".5", "1e1", "nan", "inf"],
        *["1.5=2", "1=0", "1=2=3", "1=", "=2", "0=2", "1=2+"],
    ],
)
def test_parse_factor_refuses(text):
    with pytest.raises(ValueError, match="factor must be"):
        parse_factor(text, 1024, 1024)
