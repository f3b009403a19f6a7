"""Everything that is refused before a model is loaded, and what is filled in where nothing is given."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from todo_attn import ToDoConfig
from todo_attn.compare_settings import CompareSettings, Method, SettingError, parse_factor


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
    ],
    ids=lambda x: str(x),
)
def test_refuses_naming_the_setting(sd_folder, name, value):
    with pytest.raises(SettingError, match=f"^{name} (must|has)") as caught:
        CompareSettings(model=str(sd_folder), **{name: value})
    assert caught.value.name == name


def test_refuses_folders_that_are_no_pipeline(tmp_path):
    def refused(source: object) -> str:
        with pytest.raises(SettingError) as caught:
            CompareSettings(model=str(source))
        assert caught.value.name == "model"
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
    assert settings.prompts and settings.steps > 1
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
    configs = [settings.todo_config(m.variant, 2048, 2048) for m in methods if m.kind == "todo"]
    assert [c.factor for c in configs] == [2, 4, ToDoConfig.paper(2048, 2048).factor]
    assert [settings.tome_ratio_of(Method("tome", v)) for v in ("0.25", None)] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("text", "factor"),
    [("auto", "auto"), ("3", 3), ("paper", {"finest": 2}), ("1=4+2=2", {1: 4, 2: 2}), ("finest=2", {"finest": 2})],
)
def test_parse_factor(text, factor):
    assert parse_factor(text, 1024, 1024) == factor
    assert ToDoConfig(factor=factor).factor == factor


@pytest.mark.parametrize(
    "text", ["1=2+1=3", "finest=2+finest=4", "", "0", "-1", "2.5", "1=0", "1=2=3", "1=", "=2", "0=2", "1=2+"]
)
def test_parse_factor_refuses(text):
    with pytest.raises(ValueError, match="factor must be"):
        parse_factor(text, 1024, 1024)
