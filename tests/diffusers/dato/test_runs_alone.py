"""A UNet without its pipeline: runs are told from the timesteps that it is given, which are read on the CPU only."""

import pytest
import torch

from todo_attn.dato_config import DaToConfig
from todo_attn.diffusers.dato import apply_dato, reset_dato
from todo_attn.diffusers.dato.run import Run


def as_number(t):
    return t


def as_tensor(t):
    return torch.tensor(t)


def as_batch(t):
    return torch.full((2,), t)


@pytest.fixture
def played(unet, inputs, kinds):
    """played(timesteps) -> the kinds of those calls."""
    log = kinds(unet)

    @torch.no_grad()
    def played(timesteps, **size):
        log.clear()
        given = inputs(unet, **{"size": (8, 8), **size})
        for t in timesteps:
            unet(given.sample, t, **given.kwargs)
        return "".join(log)

    return played


@pytest.mark.parametrize("form", [as_number, float, as_tensor, as_batch])
def test_a_run_starts_where_the_timestep_rises(unet, played, form):
    apply_dato(unet, DaToConfig(cache_schedule="1012"))
    falling = [form(t) for t in (981, 961, 961, 941, 1)]
    assert played(falling) == "21012"
    assert played(falling) == "21012"
    assert played(falling[:3] + falling) == "21021012"
    reset_dato(unet)
    assert played([form(0), form(0)]) == "21"


def test_one_tensor_written_in_place(unet, played):
    def written(values):
        for value in values:
            yield tensor.fill_(value)

    tensor = torch.tensor(0)
    apply_dato(unet, DaToConfig(cache_schedule="11"))
    assert played(written((900, 500, 100, 900, 500))) == "21121"


def test_by_keyword(unet, inputs, kinds):
    log = kinds(unet)
    apply_dato(unet, DaToConfig(cache_schedule="01"))
    given = inputs(unet)
    with torch.no_grad():
        for t in (3, 2, 1, 3):
            unet(sample=given.sample, timestep=t, **given.kwargs)
    assert "".join(log) == "2012"


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU, and that nobody may read."""

    LAYOUT = (
        "storage_offset", "untyped_storage", "numel", "element_size", "dim", "unbind", "as_subclass",
        "__len__", "__iter__", "__getitem__", "__get__",
    )  # fmt: skip
    device = property(lambda self: torch.device("cuda"))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func.__name__ in cls.LAYOUT, f"{func.__name__} of a timestep on a device"
        return super().__torch_function__(func, types, args, kwargs or {})


def on_device(values):
    return torch.tensor(values).as_subclass(OnDevice)


@pytest.fixture
def device_unet(unet):
    """A UNet that hands its layers the timestep of the CPU, after DaTo has seen that of the device."""

    def unveil(unet, args):
        return (args[0], args[1].as_subclass(torch.Tensor), *args[2:]) if isinstance(args[1], OnDevice) else None

    def after_dato(config, pipe=None):
        apply_dato(unet if pipe is None else pipe, config)
        unet.register_forward_pre_hook(unveil)

    return after_dato


def test_a_device_timestep_is_the_next_element_of_the_same_tensor(device_unet, played):
    device_unet(DaToConfig(cache_schedule="1012"))
    timesteps = on_device([981, 961, 961, 941, 1])
    assert played(timesteps) == "21012"
    assert played(timesteps) == "21012"
    assert played([*timesteps[:2], *timesteps]) == "2121012"
    assert played(timesteps[2:]) == "210"
    assert played(on_device([5, 4, 3])) == "210"
    assert played([timesteps[0], timesteps[2], timesteps[3]]) == "221"
    assert played([on_device(t) for t in (9, 8, 7)]) == "222"
    assert played([*timesteps[:2], 941, 921, *timesteps[:2]]) == "212121"


def test_a_device_timestep_can_be_reset(device_unet, unet, played):
    device_unet(DaToConfig(cache_schedule="111"))
    timesteps = on_device([9, 8, 7, 6])
    assert played(timesteps[:2]) == "21"
    reset_dato(unet)
    assert played(timesteps[2:]) == "21"


def test_a_device_timestep_with_a_pipeline(pipe, device_unet, played):
    device_unet(DaToConfig(cache_schedule="111"), pipe)
    for _ in range(2):
        pipe.scheduler.timesteps = timesteps = on_device([9, 8, 7, 6])
        assert played(timesteps) == "2111"
        assert played(timesteps) == "2111"
    pipe.scheduler.timesteps = on_device([9, 8, 7, 6])
    assert played([on_device([t])[0] for t in (9, 8, 7, 6)]) == "2111"  # copies: only set_timesteps tells
    pipe.scheduler.timesteps = on_device([9, 8, 7, 6])
    assert played(pipe.scheduler.timesteps[2:]) == "21"


def test_another_shape_batch_or_dtype_starts_a_run(unet, inputs, kinds):
    apply_dato(unet, DaToConfig(cache_schedule="1" * 9))
    log = kinds(unet)
    changes = [{}, {"size": (8, 10)}, {"size": (10, 8)}, {"size": (10, 8), "batch": 3}, {"size": (10, 8), "batch": 3}]
    with torch.no_grad():
        for i, change in enumerate(changes):
            given = inputs(unet, **change)
            unet(given.sample, 900 - i, **given.kwargs)
        unet.double()
        unet(given.sample.double(), 1, given.kwargs["encoder_hidden_states"].double())
    assert "".join(log) == "222212"


def test_longer_than_its_schedule(unet, played, caplog):
    apply_dato(unet, DaToConfig(cache_schedule="11"))
    for _ in range(2):
        assert played(range(20, 14, -1)) == "211222"
    messages = [r.getMessage() for r in caplog.records if r.name == "todo_attn"]
    assert len(messages) == 1
    assert "longer than its schedule of 2" in messages[0]


def test_a_new_run_forgets_the_last(unet, inputs):
    """Not the noise, nor the difference of the outputs, nor the hidden state."""
    apply_dato(unet, DaToConfig(cache_schedule="21021", dynamics_weight=9.0))

    @torch.no_grad()
    def image(seed):
        outputs = []
        for i in range(6):
            given = inputs(unet, seed=seed + i)
            outputs.append(unet(given.sample, 900 - i, **given.kwargs).sample.clone())
        return outputs

    first = image(0)
    image(50)
    assert all(map(torch.equal, image(0), first))
    image(50)
    reset_dato(unet)
    assert all(map(torch.equal, image(0), first))


def test_reset_frees_what_was_kept():
    run = Run(DaToConfig())
    sample = torch.zeros(1, 4, 2, 2)
    run.begin(sample, 5)
    run.hidden = run.end(sample)
    assert any(isinstance(x, torch.Tensor) for x in vars(run).values())
    run.reset()
    assert not any(isinstance(x, torch.Tensor) for x in vars(run).values())


def test_a_loop_over_another_schedulers_timesteps_on_a_device(pipe, device_unet, played):
    device_unet(DaToConfig(cache_schedule="111"), pipe)
    other = on_device([9, 8, 7, 6])
    assert played(other) == "2111"
    assert played(other) == "2111"


def test_runs_of_one_step_with_a_pipeline(pipe, device_unet, played):
    device_unet(DaToConfig(cache_schedule="0"), pipe)
    pipe.scheduler.timesteps = on_device([999])
    assert played(pipe.scheduler.timesteps) == "2"
    assert played(pipe.scheduler.timesteps) == "2"
