"""A UNet shared by several runs, pipelines or calls a step: each gives what it gives alone."""

import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLPipeline,
)

from todo_attn.config.dato import DaToConfig
from todo_attn.diffusers.dato import apply_dato

SMALL = {"height": 16, "width": 16}
CONFIG = DaToConfig(cache_schedule="10121")


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "todo_attn" and r.levelno >= logging.WARNING]


def another(pipe, cls=StableDiffusionPipeline, **components):
    """A pipeline with the same models and its own scheduler."""
    components = {"scheduler": DDIMScheduler(steps_offset=1, clip_sample=False), **components}
    other = cls(**{**pipe.components, **components}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


@torch.no_grad()
def loop(unet, parts, steps=6, latents=None):
    """Each step calls ``unet`` once for each prompt of ``parts`` on the same latents; the next latents are the sum."""
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4)) if latents is None else latents
    outputs = []
    for t in scheduler.timesteps:
        outputs.append([unet(x, t, prompt).sample for prompt in parts])
        x = scheduler.step(outputs[-1][0], t, x).prev_sample
    return outputs


def test_guidance_in_two_calls_a_step(make_unet, kinds, caplog):
    """Each half is as in its own run, though both have the same latents and timestep."""
    cond, uncond = torch.randn(2, 1, 5, 8)
    alone = make_unet()
    apply_dato(alone, CONFIG)
    first = [outputs[0] for outputs in loop(alone, [cond])]
    shared = make_unet()
    apply_dato(shared, CONFIG)
    log = kinds(shared)
    both = loop(shared, [cond, uncond])
    assert "".join(log) == "221100112211"
    assert all(torch.equal(outputs[0], one) for outputs, one in zip(both, first, strict=True))
    assert all((outputs[0] - outputs[1]).abs().max() > 1e-3 for outputs in both)
    assert not warnings_of(caplog)


@pytest.mark.parametrize("first", [0, 1], ids=["prompt first", "prompt last"])
def test_two_calls_a_step_are_one_batched_call(make_unet, first):
    """If the choice does not depend on the outputs of one half: with noise alone."""
    config = DaToConfig(cache_schedule="10121", dynamics_weight=0.0)
    parts = torch.randn(2, 1, 5, 8)
    parts = [parts[first], parts[1 - first]]
    apart, batched = make_unet(), make_unet()
    apply_dato(apart, config)
    apply_dato(batched, config)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(6)
    x, both = torch.randn(1, 4, 8, 8), torch.cat(parts)
    with torch.no_grad():
        for t in scheduler.timesteps:
            expected = batched(torch.cat([x, x]), t, both).sample
            actual = torch.cat([apart(x, t, part).sample for part in parts])
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
            x = scheduler.step(expected[:1], t, x).prev_sample


def test_pipelines_in_turn_each_with_its_scheduler(pipe, generate, kinds):
    """Other numbers of steps, one step too; the second pipeline was never given to apply_dato."""
    other = another(pipe, scheduler=EulerDiscreteScheduler())
    apply_dato(pipe, CONFIG)
    log = kinds(pipe.unet)
    runs = [(pipe, 5), (other, 1), (other, 1), (other, 9), (pipe, 6), (other, 9)]
    for which, steps in runs:
        log.clear()
        image = generate(which, num_inference_steps=steps, **SMALL)
        assert "".join(log) == "2" + CONFIG.schedule_for(steps)
        apply_dato(pipe, CONFIG)
        assert torch.equal(generate(which, num_inference_steps=steps, **SMALL), image)


def test_an_interrupted_run_and_another_pipelines(pipe, generate, kinds):
    """Image to image, of the same shape: it does not start in the middle of the first run's schedule."""
    img2img = another(pipe, StableDiffusionImg2ImgPipeline)
    arguments = {"image": torch.rand(1, 3, 16, 16), "strength": 0.7, "num_inference_steps": 10}
    apply_dato(pipe, CONFIG)
    expected = generate(img2img, **arguments)

    def stop(pipe, step, timestep, arguments):
        pipe._interrupt = step == 2
        return arguments

    generate(pipe, num_inference_steps=6, callback_on_step_end=stop, **SMALL)
    log = kinds(pipe.unet)
    assert torch.equal(generate(img2img, **arguments), expected)
    assert "".join(log) == "2" + CONFIG.schedule_for(7)


def test_requests_that_take_turns(pipe, generate, kinds, caplog):
    """A second run of the same shape advances inside each step of the first."""
    other, config = another(pipe), DaToConfig(cache_schedule="10121", dynamics_weight=3.0)
    apply_dato(pipe, config)
    first = generate(pipe, num_inference_steps=6, **SMALL)
    second = generate(other, num_inference_steps=4, guidance_scale=3.0, **SMALL)
    runs = []

    def interleave(pipe, step, timestep, arguments):
        runs.append(generate(other, num_inference_steps=4, guidance_scale=3.0, **SMALL))
        return arguments

    assert torch.equal(generate(pipe, num_inference_steps=6, callback_on_step_end=interleave, **SMALL), first)
    assert len(runs) == 6
    assert all(torch.equal(run, second) for run in runs)
    assert not warnings_of(caplog)


@torch.no_grad()
def test_requests_step_by_step_of_two_sizes(make_unet, kinds):
    """Also of different shapes: the shapes of skipped blocks belong to the stream."""
    prompts, sizes = torch.randn(2, 1, 5, 8), [(8, 8), (12, 6)]
    samples = [torch.randn(6, 1, 4, *size) for size in sizes]
    schedulers = [DDIMScheduler(steps_offset=1), DDIMScheduler(steps_offset=1)]
    for scheduler in schedulers:
        scheduler.set_timesteps(6)

    def step(unet, request, i):
        return unet(samples[request][i], schedulers[request].timesteps[i], prompts[request]).sample

    alone = []
    for request in range(2):
        unet = make_unet()
        apply_dato(unet, CONFIG)
        alone.append([step(unet, request, i) for i in range(6)])
    unet = make_unet()
    apply_dato(unet, CONFIG)
    log = kinds(unet)
    for i in range(6):
        for request in range(2):
            assert torch.equal(step(unet, request, i), alone[request][i])
    assert "".join(log) == "221100112211"


def paired(pipe):
    """Whether the last run took its batch for two halves of the same images."""
    return pipe.unet._todo_attn_dato.run.stream.paired


@pytest.mark.parametrize("order", [(5.0, 1.0), (1.0, 5.0)], ids=["guided first", "guided last"])
def test_guidance_of_the_pipeline_that_calls(pipe, generate, order):
    """Not the guidance of the pipeline that DaTo was applied to, nor of its last call."""
    img2img = another(pipe, StableDiffusionImg2ImgPipeline)
    apply_dato(pipe, CONFIG)
    generate(pipe, images=2, guidance_scale=order[0], num_inference_steps=2, **SMALL)
    assert paired(pipe) == (order[0] > 1)
    arguments = {"image": torch.rand(2, 3, 16, 16), "strength": 1.0, "num_inference_steps": 2}
    generate(img2img, images=2, guidance_scale=order[1], **arguments)
    assert paired(pipe) == (order[1] > 1)


@torch.no_grad()
def test_a_call_before_a_run_does_not_change_it(make_unet):
    """A warm-up call by hand, at the step at which the run starts."""
    config, prompts, latents = DaToConfig(cache_schedule="1012"), torch.randn(2, 2, 5, 8), torch.randn(5, 2, 4, 8, 8)
    timesteps, outputs = torch.tensor([900, 700, 500, 300, 100]), []
    for warm in (False, True):
        unet = make_unet()
        apply_dato(unet, config)
        if warm:
            unet(torch.randn(2, 4, 8, 8), timesteps[0], prompts[1])
        outputs.append([unet(x, t, prompts[0]).sample for x, t in zip(latents, timesteps, strict=True)])
    assert all(map(torch.equal, *outputs))


class Unguided(StableDiffusionPipeline):
    """A pipeline without guidance: each row of a call is another image."""

    do_classifier_free_guidance = property()

    def __call__(self, steps, prompt):
        self.scheduler.set_timesteps(steps)
        x = torch.ones(len(prompt), 4, 8, 8)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t, prompt).sample, t, x).prev_sample
        return x


@torch.no_grad()
def test_a_pipeline_that_knows_no_guidance(pipe):
    apply_dato(pipe, CONFIG)
    unguided = another(pipe, Unguided)
    unguided(3, torch.randn(2, 5, 8))
    assert paired(pipe) is False


def test_a_schedule_is_laid_over_the_calls_that_run(make_unet, pipe, kinds):
    """With ``denoising_end`` the last steps are another model's."""
    unet = make_unet("sdxl")
    xl = StableDiffusionXLPipeline(
        vae=pipe.vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), add_watermarker=False,
    )  # fmt: skip
    xl.set_progress_bar_config(disable=True)
    config = DaToConfig(cache_schedule="1012101210121012101")
    apply_dato(xl, config)
    log = kinds(unet)
    prompt, pooled = torch.randn(1, 5, 8), torch.randn(1, 8)
    xl(
        prompt_embeds=prompt, negative_prompt_embeds=-prompt, pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=-pooled, num_inference_steps=20, denoising_end=0.5, output_type="latent",
        height=16, width=16,
    )  # fmt: skip
    assert len(log) == 10
    assert "".join(log) == "2" + config.schedule_for(10)


def test_a_modular_pipeline(make_unet, pipe, kinds):
    """Its guider calls the UNet for each part of a step: both follow the same schedule, and rows are not paired."""
    from diffusers import ClassifierFreeGuidance
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    blocks = StableDiffusionXLAutoBlocks()
    for name in [name for name in blocks.sub_blocks if name != "denoise"]:
        del blocks.sub_blocks[name]
    modular, unet = blocks.init_pipeline(), make_unet("sdxl")
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    modular.update_components(unet=unet, vae=pipe.vae, scheduler=scheduler, guider=ClassifierFreeGuidance(5.0))
    config = DaToConfig(cache_schedule="1012101210121012101")
    apply_dato(modular, config)
    log, (prompt, pooled) = kinds(unet), (torch.randn(2, 5, 8), torch.randn(2, 8))
    modular(
        prompt_embeds=prompt, negative_prompt_embeds=-prompt, pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=-pooled, num_inference_steps=8, height=16, width=16, output="latents",
    )  # fmt: skip
    assert "".join(log) == "".join(2 * digit for digit in "2" + config.schedule_for(8))
    assert not unet._todo_attn_dato.run.stream.paired


@pytest.mark.parametrize("mid_is_finest", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_self_attention_guidance(pipe, generate, kinds, caplog, guidance_scale, mid_is_finest):
    """It reads an attention's maps after every call, and calls the UNet again on perturbed latents."""
    if mid_is_finest:
        blocks = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
        pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, **blocks}).eval()
    sag = another(pipe, StableDiffusionSAGPipeline, image_encoder=None)
    arguments = {"guidance_scale": guidance_scale, "sag_scale": 0.7, "num_inference_steps": 3, **SMALL}
    dense = generate(sag, **arguments)
    apply_dato(sag, DaToConfig(prune_ratio=0.0, cache_schedule="11"))
    log = kinds(pipe.unet)
    assert torch.equal(generate(sag, **arguments), dense)
    assert set(log) == {"2"}
    assert any("keeps its maps" in line for line in warnings_of(caplog))
    apply_dato(sag, DaToConfig())  # pruning leaves the attention whose maps are read alone
    assert torch.equal(generate(sag, **arguments), dense) == mid_is_finest


@torch.no_grad()
def test_an_image_is_the_same_in_any_batch(make_unet):
    """Noise, the choice of tokens and what is reused do not depend on the other images of the batch."""
    unet = make_unet()
    x, prompts = torch.randn(4, 3, 4, 8, 8), torch.randn(3, 5, 8)
    batches = [prompts, prompts[:1], prompts[1:2], prompts[:2]]
    config = DaToConfig(cache_schedule="212", align_guidance=False, dynamics_weight=1.0)
    outputs = []
    for prompt, rows in zip(batches, (slice(0, 3), slice(0, 1), slice(1, 2), slice(0, 2)), strict=True):
        apply_dato(unet, config)
        outputs.append([unet(x[i, rows], 900 - i, prompt).sample for i in range(4)])
    for i in range(4):
        for other, rows in ((1, slice(0, 1)), (2, slice(1, 2)), (3, slice(0, 2))):
            torch.testing.assert_close(outputs[other][i], outputs[0][i][rows], rtol=0, atol=1e-5)


def test_images_with_guidance_are_the_same_in_any_batch(pipe, generate):
    apply_dato(pipe, DaToConfig(cache_schedule="10121", dynamics_weight=1.0))
    latents, prompts, negative = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 8), torch.randn(3, 5, 8)

    def image(rows):
        return pipe(
            prompt_embeds=prompts[rows], negative_prompt_embeds=negative[rows], latents=latents[rows].clone(),
            num_inference_steps=6, output_type="latent", **SMALL,
        ).images  # fmt: skip

    together = image(slice(0, 3))
    for i in range(3):
        difference = image(slice(i, i + 1)) - together[i : i + 1]
        assert difference.abs().max() < 1e-4 * together.abs().max()
