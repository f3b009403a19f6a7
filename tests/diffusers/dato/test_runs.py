"""Pipelines: which calls of the UNet are a run, and that a run leaves nothing to the next."""

import copy
import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)

from todo_attn.config.dato import DaToConfig
from todo_attn.diffusers.dato import apply_dato, remove_dato, reset_dato

SMALL = {"height": 16, "width": 16}
SCHEDULERS = {
    "DDIM": lambda: DDIMScheduler(steps_offset=1, clip_sample=False),
    "Euler": EulerDiscreteScheduler,
    "Euler ancestral": EulerAncestralDiscreteScheduler,
    "PNDM": lambda: PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "PNDM with Runge-Kutta": PNDMScheduler,
    "Heun": HeunDiscreteScheduler,
    "DPM-Solver": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "LCM": LCMScheduler,
}
STEPS = 6
CALLS = {"PNDM": STEPS + 1, "PNDM with Runge-Kutta": 2 * STEPS + 3, "Heun": 2 * STEPS - 1}


def warnings_of(caplog):
    found = [r for r in caplog.records if r.name == "todo_attn" and r.levelno >= logging.WARNING]
    return [record.getMessage() for record in found]


def resampled(caplog):
    """What was logged about it: at INFO, because it is the ordinary case."""
    found = [r for r in caplog.records if r.name == "todo_attn" and "resampled" in r.getMessage()]
    assert all(record.levelno == logging.INFO for record in found)
    return [record.getMessage() for record in found]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(pipe, generate, kinds, caplog, name):
    """The first image and the next are equal, with the same calls; also after an interrupted one."""
    pipe.scheduler = SCHEDULERS[name]()
    pipe.scheduler.set_timesteps(STEPS)
    calls = len(pipe.scheduler.timesteps)
    assert calls == CALLS.get(name, STEPS)
    digits = ("1201" * calls)[: calls - 1]
    log = kinds(pipe.unet)
    apply_dato(pipe, DaToConfig(cache_schedule=digits))
    arguments = {"num_inference_steps": STEPS, **SMALL}
    first = generate(pipe, **arguments)
    assert "".join(log) == "2" + digits

    def interrupt(pipe, step, timestep, arguments):
        pipe._interrupt = step == 2
        return arguments

    generate(pipe, **arguments, callback_on_step_end=interrupt)
    assert len(log) < 2 * calls
    log.clear()
    assert torch.equal(generate(pipe, **arguments), first)
    assert "".join(log) == "2" + digits
    assert not warnings_of(caplog)


def test_an_exception_in_the_middle(pipe, generate, kinds):
    log = kinds(pipe.unet)
    apply_dato(pipe, DaToConfig(cache_schedule="10121"))
    first = generate(pipe, num_inference_steps=6, **SMALL)
    for call, where in ((2, "conv_out"), (0, "mid_block"), (4, "up_blocks.2.resnets.1")):

        def fail(*_, call=call):
            if len(log) == call:
                raise KeyboardInterrupt

        log.clear()
        handle = pipe.unet.get_submodule(where).register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, num_inference_steps=6, **SMALL)
        handle.remove()
        log.clear()
        assert torch.equal(generate(pipe, num_inference_steps=6, **SMALL), first)
        assert "".join(log) == "210121"


def test_a_call_that_failed_ends_its_run(unet, inputs, kinds):
    """Also if the timesteps go on."""
    apply_dato(unet, DaToConfig(cache_schedule="111111"))
    log = kinds(unet)
    given = inputs(unet)
    first, second, third = torch.tensor([900, 800, 700])
    with torch.no_grad():
        unet(given.sample, first, **given.kwargs)
        with pytest.raises(TypeError):
            unet(given.sample, second, **given.kwargs, timestep_cond=torch.zeros(2, 3))
        unet(given.sample, third, **given.kwargs)
    assert "".join(log) == "22"


def test_an_image_cut_short_at_another_size(pipe, generate):
    config = DaToConfig(cache_schedule="11011")
    apply_dato(pipe, config)
    expected = generate(pipe, num_inference_steps=6, **SMALL)

    def stop(pipe, step, timestep, arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, num_inference_steps=6, height=24, width=40, images=3, callback_on_step_end=stop)
    assert torch.equal(generate(pipe, num_inference_steps=6, **SMALL), expected)


@pytest.mark.parametrize("scheduler", ["DDIM", "Heun", "PNDM"])
def test_image_to_image_starts_late(pipe, generate, kinds, caplog, scheduler):
    """A schedule for all the steps is resampled to the calls that happen, and that is logged once."""
    caplog.set_level(logging.INFO, "todo_attn")
    pipe.scheduler = SCHEDULERS[scheduler]()
    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    config = DaToConfig(cache_schedule="121012101")
    log = kinds(pipe.unet)
    apply_dato(img2img, config)
    arguments = {"image": torch.rand(1, 3, 16, 16), "strength": 0.6, "num_inference_steps": 10}
    first = generate(img2img, **arguments)
    assert 5 <= len(log) < len(img2img.scheduler.timesteps)
    calls = len(log)
    assert "".join(log) == "2" + config.schedule_for(calls)
    assert torch.equal(generate(img2img, **arguments), first)
    said = resampled(caplog)
    assert len(said) == (0 if len(config.cache_schedule) == calls - 1 else 1)
    assert all(f"for the {calls} of this run" in line for line in said)
    assert not warnings_of(caplog)


def test_a_schedule_for_another_number_of_steps(pipe, generate, kinds, caplog):
    caplog.set_level(logging.INFO, "todo_attn")
    config = DaToConfig(cache_schedule="1012101210121012101")
    log = kinds(pipe.unet)
    apply_dato(pipe, config)
    for steps in (8, 8, 20, 5, 1):
        log.clear()
        generate(pipe, num_inference_steps=steps, **SMALL)
        assert "".join(log) == "2" + config.schedule_for(steps)
    assert len(resampled(caplog)) == 2  # for 8 and 5; a single call has no schedule
    assert not warnings_of(caplog)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0], ids=["no-guidance", "guidance"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_guidance_on_and_off(pipe, generate, kinds, images, guidance_scale):
    """The halves of a batch are pairs only with guidance: without, each image has its own choice of tokens."""
    apply_dato(pipe, DaToConfig(cache_schedule="10121"))
    scores = []
    run = pipe.unet._todo_attn_dato.run
    score = run.score
    run.score = lambda *args: scores.append(score(*args)) or scores[-1]
    log = kinds(pipe.unet)
    arguments = {"num_inference_steps": 6, "images": images, "guidance_scale": guidance_scale, **SMALL}
    first = generate(pipe, **arguments)
    halves = [given.unflatten(0, (-1, images)) for given in scores]  # (parts, images, N)
    assert {len(parts) for parts in halves} == {2 if guidance_scale > 1 else 1}
    assert all(torch.equal(part, parts[0]) for parts in halves for part in parts)
    if images > 1:
        assert any(not torch.equal(parts[0][0], parts[0][1]) for parts in halves)
    assert torch.equal(generate(pipe, **arguments), first)
    assert "".join(log) == "210121" * 2


def test_the_order_of_images_does_not_matter(pipe, generate):
    """Guidance, size, steps and batch change from image to image; each image is the same as if it were the first."""
    config = DaToConfig(cache_schedule="1211")
    settings = [
        {"num_inference_steps": 5, **SMALL},
        {"num_inference_steps": 5, "height": 24, "width": 40},
        {"num_inference_steps": 7, "guidance_scale": 1.0, "images": 2, **SMALL},
        {"num_inference_steps": 5, "guidance_scale": 1.0, **SMALL},
    ]
    alone = []
    for setting in settings:
        apply_dato(pipe, config)
        alone.append(generate(pipe, **setting))
    for i in (3, 0, 1, 1, 2, 0, 3):
        assert torch.equal(generate(pipe, **settings[i]), alone[i])


def test_the_global_generator_is_not_touched(pipe, generate):
    apply_dato(pipe, DaToConfig(cache_schedule="101"))
    before = torch.get_rng_state()
    generate(pipe, num_inference_steps=4, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    expected = generate(pipe, num_inference_steps=4, **SMALL)
    torch.manual_seed(77)
    assert torch.equal(generate(pipe, num_inference_steps=4, **SMALL), expected)


def test_the_seed(pipe, generate):
    images = []
    for seed in (0, 1, 0):
        apply_dato(pipe, DaToConfig(seed=seed))
        images.append(generate(pipe, **SMALL))
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


@torch.no_grad()
def test_a_loop_of_ones_own(pipe, unet, inputs, kinds):
    """set_timesteps starts a run; so does going back in the timesteps, or looping over another scheduler's."""
    apply_dato(pipe, DaToConfig(prune_ratio=0.0, cache_schedule="111"))
    log = kinds(unet)
    given = inputs(unet)

    def loop(timesteps, stop=None):
        for t in timesteps[:stop]:
            unet(given.sample, t, **given.kwargs)
        log.append("|")

    pipe.scheduler.set_timesteps(4)
    loop(pipe.scheduler.timesteps)
    loop(pipe.scheduler.timesteps)
    loop(pipe.scheduler.timesteps, 2)
    pipe.scheduler.set_timesteps(4)
    loop(pipe.scheduler.timesteps[3:])
    other = copy.deepcopy(pipe.scheduler)
    other.set_timesteps(3)
    loop(other.timesteps)
    reset_dato(pipe)
    loop(pipe.scheduler.timesteps, 1)
    reset_dato(pipe)
    loop(pipe.scheduler.timesteps[1:])
    assert "".join(log) == "2111|2111|21|2|211|2|211|"


def test_a_pipeline_that_is_gone(make_unet, pipe, inputs, kinds):
    """Nothing keeps the pipeline alive; the UNet works without it."""
    unet = pipe.unet
    shell = copy.copy(pipe)
    apply_dato(shell, DaToConfig(cache_schedule="11"))
    del shell
    log = kinds(unet)
    given = inputs(unet)
    with torch.no_grad():
        for t in torch.tensor([900, 800, 700]):
            unet(given.sample, t, **given.kwargs)
    assert "".join(log) == "211"
    remove_dato(unet)
