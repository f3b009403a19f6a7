"""A model from whatever it lies in: folders, single files, the Hub; and one sentence on what does not load."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models import UNet2DConditionModel
from safetensors.torch import save_file

from todo_attn.compare.run import compare
from todo_attn.models import loading
from todo_attn.models.architectures import CONFIGS, read_architecture
from todo_attn.models.pipelines import load_pipeline
from todo_attn.models.unets import on_meta
from todo_attn.options.methods import SettingError
from todo_attn.options.settings import ARCHITECTURES, CompareSettings

# Single files. Names in the layout of the original code, against those of diffusers.

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_prefixes(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Modules of diffusers' UNet and what the original code calls them."""
    yield from {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }.items()
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers:
            place = 2 if getattr(block, "attentions", None) else 1
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number - 1}.{place}.conv"


def vae_prefixes(levels: int) -> Iterator[tuple[str, str]]:
    for side, there, here in (("encoder", "down", "down"), ("decoder", "up", "up")):
        yield f"{side}.mid_block.resnets.0", f"{side}.mid.block_1"
        yield f"{side}.mid_block.resnets.1", f"{side}.mid.block_2"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        for i in range(levels):
            level = i if side == "encoder" else levels - 1 - i
            for j in range(3):
                yield f"{side}.{there}_blocks.{i}.resnets.{j}", f"{side}.{here}.{level}.block.{j}"
            yield f"{side}.{there}_blocks.{i}.{there}samplers.0", f"{side}.{here}.{level}.{here}sample"


def renamed(state: dict[str, torch.Tensor], prefixes: dict[str, str], parts: dict[str, str]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in state.items():
        for there, here in prefixes.items():
            if name.startswith(there + "."):
                rest = name.removeprefix(there + ".")
                first = rest.partition(".")[0]
                name = f"{here}.{rest.replace(first, parts.get(first, first), 1) if 'resnets' in there else rest}"
                break
        found[name] = tensor.contiguous()
    return found


@pytest.fixture(scope="module")
def checkpoint(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of ``sd_folder`` in one file, in the original layout."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd_folder)
    unet = renamed(pipe.unet.state_dict(), dict(unet_prefixes(pipe.unet)), _RESNET)
    vae = renamed(pipe.vae.state_dict(), dict(vae_prefixes(4)), {"conv_shortcut": "nin_shortcut"})
    text = {"text_model." + k.removeprefix("text_model."): t for k, t in pipe.text_encoder.state_dict().items()}
    tensors = {
        **{loading.UNET_KEYS + name: tensor for name, tensor in unet.items()},
        **{f"first_stage_model.{name}": tensor for name, tensor in vae.items()},
        **{f"cond_stage_model.transformer.{name}": tensor for name, tensor in text.items()},
    }
    assert not any("blocks.0.resnets" in name or "samplers" in name for name in tensors)
    file = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_file(tensors, file)
    torch.save({"state_dict": tensors}, file.with_suffix(".ckpt"))
    return file


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_makes_the_pictures_of_its_folder(checkpoint, sd_folder, suffix):
    given = {"prompts": ("a star",), "height": 64, "width": 64, "steps": 2, "methods": "dense", "device": "cpu"}
    settings = [
        CompareSettings(model=str(sd_folder), **given),
        CompareSettings(model=str(checkpoint.with_suffix(suffix)), config=str(sd_folder), **given),
    ]
    one, other = (compare(load_pipeline(s), s).shots[0].pixels for s in settings)
    assert np.array_equal(one, other)


def shapes_of(name: str) -> dict[str, torch.Tensor]:
    """A whole checkpoint of a built-in architecture, without memory."""
    unet = on_meta(CONFIGS[name])
    tensors = renamed(unet.state_dict(), dict(unet_prefixes(unet)), _RESNET)
    meta = torch.empty(1, device="meta")
    extra = {"sd15": [], "sdxl": ["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"]}
    return {
        **{loading.UNET_KEYS + key: tensor for key, tensor in tensors.items()},
        **dict.fromkeys(["first_stage_model.decoder.conv_in.weight", *extra[name]], meta),
    }


@pytest.fixture
def holds(monkeypatch, tmp_path):
    """holds(tensors) -> a single file that is read as these."""

    def holds(tensors: dict[str, torch.Tensor]) -> Path:
        file = tmp_path / "model.safetensors"
        file.touch()
        monkeypatch.setattr(loading.single_file_utils, "load_single_file_checkpoint", lambda path: tensors)
        return file

    return holds


@pytest.fixture
def no_network(monkeypatch):
    """Every way to the Hub ends with what a machine without a network gets there."""

    def lost(*args, **kwargs):
        try:
            raise socket.gaierror(-2, "Name or service not known")
        except socket.gaierror as error:
            raise OSError("Please check out the root cause in the stacktrace above.") from error

    monkeypatch.setattr(loading, "model_info", lost)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lost)
    monkeypatch.setattr(UNet2DConditionModel, "load_config", lost)
    monkeypatch.setattr(diffusers.loaders.single_file, "_download_diffusers_model_config_from_hub", lost)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_architecture_of_a_single_file_is_told_without_a_network(holds, no_network, name):
    file = holds(shapes_of(name))
    found = read_architecture(str(file))
    assert (found.name, found.config, found.size) == (str(file), CONFIGS[name], read_architecture(name).size)


@pytest.mark.parametrize(
    ("name", "pipeline"), [("sd15", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")]
)
def test_the_pipeline_of_a_single_file_is_told_by_its_weights(holds, monkeypatch, sd, name, pipeline):
    calls = []

    def from_single_file(path, **arguments):
        calls.append((path, arguments))
        return sd

    monkeypatch.setattr(getattr(diffusers, pipeline), "from_single_file", from_single_file)
    file = holds(shapes_of(name))
    assert load_pipeline(CompareSettings(model=str(file), dtype="fp32", device="cpu")) is sd
    assert calls == [(str(file), {"config": None, "torch_dtype": torch.float32})]


def test_a_single_file_of_another_size_is_not_counted_as_the_published_one(checkpoint):
    with pytest.raises(SettingError, match=r"must have the UNet of stable-diffusion-v1-5/.* save_pretrained"):
        read_architecture(str(checkpoint))


def test_a_single_file_without_a_network_says_what_is_missing(run, checkpoint, no_network, tmp_path):
    ran = run("compare", checkpoint, "--out", tmp_path / "out")
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1), ran
    for words in (
        "'stable-diffusion-v1-5/stable-diffusion-v1-5' is not in the local cache, and the Hub cannot be reached",
        "--config",
        "save_pretrained",
    ):
        assert words in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["compare"], ["doctor", "--model"], ["schedules", "--model"]])
@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["lora_unet_down_blocks_0_attentions_0.lora_down.weight"], "holds no whole pipeline"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "DiTs (SD 3, Flux), "),
        (
            ["conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"],
            "not make images from text alone",
        ),
    ],
    ids=["lora", "flux", "refiner"],
)
def test_a_single_file_of_another_kind_is_refused(run, tmp_path, command, keys, reason):
    save_file({key: torch.zeros(4) for key in keys}, tmp_path / "model.safetensors")
    ran = run(
        *command, tmp_path / "model.safetensors", *(["--out", tmp_path / "out"] if command == ["compare"] else [])
    )
    assert (ran.code, ran.out) == (2, "")
    assert reason in ran.err.splitlines()[-1] and "Traceback" not in ran.err


@pytest.mark.parametrize("command", [["compare"], ["doctor", "--model"]])
def test_a_broken_single_file_is_one_line(run, tmp_path, command):
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    ran = run(*command, tmp_path / "model.safetensors")
    assert (ran.code, ran.out) == (2, "")
    assert "cannot be loaded" in ran.err.splitlines()[-1] and "Traceback" not in ran.err


def test_measuring_a_single_file_needs_its_shapes_alone(holds, monkeypatch):
    """Time does not depend on weights."""
    tensors = shapes_of("sd15")
    file = holds(tensors)
    seen = []
    monkeypatch.setattr(
        "todo_attn.predict.timing.with_random_weights", lambda config, *rest: seen.append(config) or on_meta(config)
    )
    from todo_attn.predict.timing import _load

    _load(read_architecture(str(file)), torch.device("cpu"), torch.float32)
    assert seen == [CONFIGS["sd15"]]


@pytest.mark.parametrize("suffix", [".txt", ".gguf"])
def test_another_file_is_refused(run, tmp_path, suffix):
    (tmp_path / f"model{suffix}").touch()
    ran = run("compare", tmp_path / f"model{suffix}")
    assert ran.code == 2 and "a .safetensors or .ckpt file" in ran.err


def test_a_configuration_is_for_single_files(sd_folder, checkpoint, tmp_path):
    with pytest.raises(SettingError, match=r"^config is for a model in a single file"):
        CompareSettings(model=str(sd_folder), config=str(sd_folder))
    with pytest.raises(SettingError, match=r"^config must be a folder saved by diffusers or a Hub id"):
        CompareSettings(model=str(checkpoint), config=str(tmp_path))
    assert CompareSettings(model=str(checkpoint), config="owner/name").config == "owner/name"


# Folders and the Hub.


def test_weights_of_one_variant_only_are_found(sd, tmp_path, caplog):
    sd.save_pretrained(tmp_path, variant="fp16")
    settings = CompareSettings(model=str(tmp_path), device="cpu", dtype="fp32")
    pipe = load_pipeline(settings)
    assert torch.equal(pipe.unet.conv_in.weight, sd.unet.conv_in.weight)
    assert "has weights of the variant fp16 only" in caplog.text
    found = loading.load_weights(UNet2DConditionModel, str(tmp_path), torch.float32)
    assert torch.equal(found.conv_in.weight, sd.unet.conv_in.weight)


def test_a_variant_beside_others_is_not_taken(sd, tmp_path, caplog):
    sd.save_pretrained(tmp_path)
    shutil.copy(
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors",
        tmp_path / "unet" / "diffusion_pytorch_model.non_ema.safetensors",
    )
    load_pipeline(CompareSettings(model=str(tmp_path), device="cpu"))
    assert not caplog.records


def test_a_hub_model_of_a_variant_only_gets_a_hint(run, monkeypatch, tmp_path):
    def absent(*args, **kwargs):
        raise OSError("Error no file named diffusion_pytorch_model.bin found in directory /cache.")

    monkeypatch.setattr(loading, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=None))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", absent)
    ran = run("compare", "owner/name", "--out", tmp_path / "out")
    assert ran.code == 2 and "--variant fp16" in ran.err.splitlines()[-1]


@pytest.mark.parametrize("command", [["compare"], ["doctor", "--model"], ["schedules", "--model"]])
def test_a_hub_that_cannot_be_reached_is_one_line(run, no_network, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    ran = run(*command, "owner/name")
    assert (ran.code, ran.out) == (1, "")
    line = ran.err.splitlines()[-1]
    assert line.endswith("'owner/name' is not in the local cache, and the Hub cannot be reached")
    assert "Traceback" not in ran.err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["compare"], ["doctor", "--model"], ["schedules", "--model"]])
def test_the_folder_of_a_dit_is_refused(run, tmp_path, command):
    parts = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(parts), encoding="utf-8")
    ran = run(*command, tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert "DiTs (SD 3, Flux), which have a transformer instead of a UNet, are not supported" in ran.err


@pytest.mark.parametrize("command", [["compare"], ["doctor", "--model"]])
def test_a_dit_on_the_hub_is_refused_before_it_is_downloaded(run, no_network, monkeypatch, tmp_path, command):
    files = [SimpleNamespace(rfilename=name) for name in ("model_index.json", "transformer/config.json")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=files))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)

    def absent(*args, **kwargs):
        raise OSError("owner/name does not appear to have a file named config.json.")

    monkeypatch.setattr(UNet2DConditionModel, "load_config", absent)
    ran = run(*command, "owner/name")
    assert ran.code == 2 and "DiTs (SD 3, Flux)" in ran.err


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_alone_has_no_weights_to_compare(run, name):
    assert ARCHITECTURES.keys() == CONFIGS.keys()
    ran = run("compare", name)
    assert ran.code == 2
    assert ran.err == (
        f"todo-attn: error: MODEL must have weights, and {name!r} names a UNet's shapes alone: give a folder saved by "
        f"diffusers, a single file, or a Hub id such as {ARCHITECTURES[name]}\n"
    )


@pytest.mark.parametrize("inside", [True, False], ids=["in-a-pipeline", "alone"])
def test_the_own_folder_of_a_unet_is_counted_as_in_its_pipeline(sdxl_folder, tmp_path, inside):
    """Its config.json is not taken for that of a VAE, whose halvings say how many pixels a latent stands for."""
    if inside:
        folder = sdxl_folder / "unet"
    else:
        shutil.copytree(sdxl_folder / "unet", tmp_path / "alone")
        folder = tmp_path / "alone"
    found, whole = read_architecture(str(folder)), read_architecture(str(sdxl_folder))
    assert (found.pixels_per_latent, found.size) == (whole.pixels_per_latent, whole.size) == (8, (128, 128))


def test_the_vae_beside_a_unet_counts(sdxl_folder, tmp_path):
    shutil.copytree(sdxl_folder, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "vae" / "config.json"
    vae = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(vae | {"block_out_channels": [4, 4]}), encoding="utf-8")
    assert read_architecture(str(tmp_path / "unet")).pixels_per_latent == 2
    config.unlink()
    assert read_architecture(str(tmp_path / "unet")).pixels_per_latent == 8


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_the_folder_of_another_part_is_no_unet(sd_folder, part):
    with pytest.raises(SettingError, match=r"^model must have a UNet2DConditionModel, and .* has a "):
        read_architecture(str(sd_folder / part))


def test_a_cpu_without_memory_for_the_weights(sd_folder, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
        )

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError, match="can't allocate"):
        load_pipeline(CompareSettings(model=str(sd_folder)))
