"""steps: ToDo acts in a share of the calls of a run, and no timestep is read to find it."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)

from todo_attn import DaToConfig, ToDoConfig, ToDoProcessor, apply_dato, apply_todo, remove_todo, status

SMALL = {"height": 16, "width": 16}
FIRST = ToDoConfig(factor=2, steps=(0.0, 0.7))
TIMESTEPS = torch.arange(900, 0, -90)  # ten


@pytest.fixture
def acts():
    """acts(model) -> a list that grows with every call of ``model``: "1" if ToDo acted in all self-attentions."""

    def acts(model):
        log = []

        def look(module, args, output):
            (state,) = {layer.state for layer in status(module).layers}
            log.append({"coarse": "1", "dense": "."}[state])

        model.register_forward_hook(look)
        return log

    return acts


@pytest.fixture
def played(unet, call, acts):
    """played(timesteps) -> where ToDo acted in calls at ``timesteps``."""
    log = acts(unet)

    def played(timesteps, **kwargs):
        log.clear()
        for timestep in timesteps:
            call(unet, (8, 8), timestep=timestep, **kwargs)
        return "".join(log)

    return played


def said(caplog):
    """But for that of a single row of keys, which these small images have."""
    return [r.getMessage() for r in caplog.records if r.name == "todo_attn" and "single row" not in r.getMessage()]


@pytest.mark.parametrize(
    ("steps", "expected"), [((0, 0.7), "1111111..."), ((0.25, 0.5), "...11....."), ((0.9, 1), ".........1")], ids=str
)
def test_a_loop(unet, played, caplog, steps, expected):
    apply_todo(unet, ToDoConfig(factor=2, steps=steps))
    assert played(TIMESTEPS) == expected
    assert played(TIMESTEPS) == expected  # the same tensor again is another image
    assert played(TIMESTEPS.clone()) == expected
    assert not said(caplog)


def test_the_calls_are_those_of_the_reference(unet, call, reference):
    dense = call(unet, timestep=1)
    with reference(unet, (16, 16), {1: 2, 2: 2, 4: 2}):
        coarse = call(unet, timestep=900)
    apply_todo(unet, FIRST)
    outputs = [call(unet, timestep=t) for t in torch.tensor([900, 500, 300, 1])]
    assert (outputs[0] - coarse).abs().max() < 1e-5
    assert torch.equal(outputs[3], dense)


def test_no_timestep_is_read(unet):
    """On the meta device any read of a value raises."""
    apply_todo(unet.to("meta"), FIRST)
    with torch.no_grad(), torch.device("meta"):
        for timestep in torch.empty(4, device="meta"):
            unet(torch.empty(2, 4, 8, 8), timestep, torch.empty(2, 5, 8))


def test_both_conditions_must_hold(unet, played):
    apply_todo(unet, ToDoConfig(factor=2, steps=(0, 0.7), timestep_range=(0, 720)))
    assert played(TIMESTEPS) == "..11111..."


def test_status_says_why(unet, played):
    apply_todo(unet, FIRST)
    played(TIMESTEPS[:8])
    assert {layer.why for layer in status(unet).layers} == {"call 8 of 10 is outside of steps, 0 to 0.7"}
    played([500])
    assert "which is not known" in status(unet).layers[0].why


@pytest.mark.parametrize("form", [int, float, torch.tensor, lambda t: torch.full((2,), t)])
@pytest.mark.parametrize("steps", [(0, 0.7), (0.3, 1)], ids=str)
def test_a_call_that_cannot_be_placed_is_dense_and_that_is_said_once(unet, played, caplog, form, steps):
    apply_todo(unet, ToDoConfig(factor=2, steps=steps))
    assert played(form(t) for t in (900, 500, 100)) == "..."
    (message,) = said(caplog)
    assert "cannot be known" in message and message.endswith("Pass the elements of scheduler.timesteps.")


def test_timesteps_that_are_copied_in_every_call(unet, played, caplog):
    """Each looks like the start of a run, and a warning says so."""
    apply_todo(unet, FIRST)
    assert played(TIMESTEPS.clone()[i] for i in range(10)) == "1" * 10
    (message,) = said(caplog)
    assert "another tensor in every call" in message


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (lambda: DDIMScheduler(steps_offset=1, clip_sample=False), "1111.."),
        (EulerDiscreteScheduler, "1111.."),
        (HeunDiscreteScheduler, "1111111...."),  # 11 calls in 6 steps
        (lambda: PNDMScheduler(skip_prk_steps=True, steps_offset=1), "11111.."),
    ],
    ids=["DDIM", "Euler", "Heun", "PNDM"],
)
def test_pipelines_and_schedulers(pipe, generate, acts, caplog, scheduler, expected):
    pipe.scheduler = scheduler()
    apply_todo(pipe, ToDoConfig(factor=2, steps=(0, 0.6)))
    log = acts(pipe.unet)
    for steps in (6, 6, 3):
        log.clear()
        generate(pipe, num_inference_steps=steps, **SMALL)
        if steps == 6:
            assert "".join(log) == expected
    assert not said(caplog)


def test_an_image_after_an_interrupted_one(pipe, generate, acts):
    apply_todo(pipe, FIRST)
    log = acts(pipe.unet)

    def interrupt(pipe, step, timestep, arguments):
        pipe._interrupt = step == 4
        return arguments

    generate(pipe, num_inference_steps=10, **SMALL, callback_on_step_end=interrupt)
    log.clear()
    generate(pipe, num_inference_steps=10, **SMALL)
    assert "".join(log) == "1111111..."


def test_strength_counts_the_steps_that_run(pipe, generate, acts):
    """Five of ten; and the pipelines share a scheduler and a UNet."""
    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    apply_todo(pipe, ToDoConfig(factor=2, steps=(0, 0.4)))
    log = acts(pipe.unet)
    for _ in range(2):
        log.clear()
        generate(img2img, image=torch.rand(1, 3, 16, 16), strength=0.5, num_inference_steps=10)
        assert "".join(log) == "11..."
        generate(pipe, num_inference_steps=5, **SMALL)
        assert "".join(log) == "11...11..."


def test_one_step(pipe, generate, acts, caplog):
    """The only timestep is no element of a longer tensor, but its pipeline says that it is one of one."""
    log = acts(pipe.unet)
    for steps, expected in (((0, 0.5), "1"), ((0.5, 1), ".")):
        apply_todo(pipe, ToDoConfig(factor=2, steps=steps))
        log.clear()
        generate(pipe, num_inference_steps=1, **SMALL)
        assert "".join(log) == expected
    assert not said(caplog)


def test_runs_that_alternate(unet, call, acts):
    apply_todo(unet, FIRST)
    log = acts(unet)
    one, other = TIMESTEPS, TIMESTEPS[:5].clone()
    for i in range(10):
        call(unet, (8, 8), timestep=one[i])
        if i < 5:
            call(unet, (8, 8), timestep=other[i])
    assert "".join(log[:10:2]) + "".join(log[10:]) == "1111111..."
    assert "".join(log[1:10:2]) == "1111."


def test_several_calls_at_a_step(unet, played):
    """Guidance in two calls, or views of a large image: all calls at a step have the same place."""
    apply_todo(unet, FIRST)
    assert played(t for t in TIMESTEPS for _ in range(3)) == "1" * 21 + "." * 9


def test_a_controlnet_follows_as_well(pipe, generate, make_controlnet, acts):
    control = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=[make_controlnet(0), make_controlnet(1)], requires_safety_checker=False
    )
    apply_todo(control, FIRST)
    logs = [acts(model) for model in (control.unet, *control.controlnet.nets)]
    image = [torch.rand(1, 3, 16, 16)] * 2
    generate(control, image=image, num_inference_steps=10, control_guidance_start=[0.0, 0.3], **SMALL)
    assert {"".join(log) for log in logs} == {"1111111..."}
    for log in logs:
        log.clear()
    generate(control, image=image, num_inference_steps=1, **SMALL)
    assert {"".join(log) for log in logs} == {"1"}


@pytest.mark.parametrize("order", ["todo first", "dato first", "todo="])
def test_with_dato(pipe, generate, acts, order):
    log = acts(pipe.unet)
    if order == "todo first":
        apply_todo(pipe, FIRST)
    apply_dato(pipe, DaToConfig(prune_ratio=0.3, todo=FIRST if order == "todo=" else None))
    if order == "dato first":
        apply_todo(pipe, FIRST)
    generate(pipe, num_inference_steps=10, **SMALL)
    assert "".join(log) == "1111111..."


def test_a_processor_set_by_hand(pipe, generate, acts):
    """Its first call is placed too. Where the model is not known, it is refused."""
    pipe.unet.set_attn_processor(ToDoProcessor(FIRST))
    log = acts(pipe.unet)
    generate(pipe, num_inference_steps=10, **SMALL)
    assert "".join(log) == "1111111..."
    pipe.vae.set_attn_processor(ToDoProcessor(FIRST))
    with pytest.raises(ValueError, match="steps of a ToDoProcessor must not be"):
        pipe.vae.encode(torch.rand(1, 3, 16, 16))


def test_compiled(make_unet, fresh_dynamo):
    """Two graphs, as for a narrow timestep_range; the place is found outside of them."""
    traces = torch._dynamo.testing.CompileCounter()
    unet, eager = make_unet("small"), make_unet("small")
    for model in (unet, eager):
        apply_todo(model, FIRST)
    compiled = torch.compile(unet, fullgraph=True, backend=traces)
    text = torch.randn(1, 5, 8)
    with torch.no_grad():
        for timestep in TIMESTEPS:
            sample = torch.randn(1, 4, 8, 8)
            got, expected = (model(sample, timestep, text).sample for model in (compiled, eager))
            assert (got - expected).abs().max() < 1e-5
    assert traces.frame_count == 2


def test_it_cannot_be_recorded(unet):
    apply_todo(unet, FIRST)
    given = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 5, 8)
    with pytest.raises(ValueError, match="steps must hold all of 0 to 1 while"):
        torch.jit.trace(lambda *args: unet(*args, return_dict=False)[0], given)


def test_copies_have_runs_of_their_own(unet, call, acts):
    apply_todo(unet, FIRST)
    call(unet, (8, 8), timestep=TIMESTEPS[0])
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        log = acts(other)
        for timestep in TIMESTEPS:
            call(other, (8, 8), timestep=timestep)
        assert "".join(log) == "1111111..."


def test_nothing_is_left(unet, hooks):
    before = hooks(unet)
    apply_todo(unet, FIRST)
    remove_todo(unet)
    assert hooks(unet) == before
