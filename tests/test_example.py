"""The small pipeline that comes with the package, loaded the ordinary way."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from todo_attn import example_pipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_loads_and_runs_in_any_dtype_and_in_float32_if_none_is_named(dtype):
    pipe = StableDiffusionPipeline.from_pretrained(example_pipeline(), **({"dtype": dtype} if dtype else {}))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {dtype or torch.float32}
    pipe.to(DEVICE).set_progress_bar_config(disable=True)
    run = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "np"}
    image = pipe("green hills by day with a lake", generator=torch.Generator().manual_seed(0), **run).images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all() and image.std() > 0.01


def test_its_weights_are_in_half_precision():
    files = sorted(example_pipeline().rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "unet", "vae"]
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118
