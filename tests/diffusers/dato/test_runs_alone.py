"""A UNet without a pipeline: runs are recognised by their timesteps, whose values are not read."""

import pytest
import torch

from todo_attn.config.dato import DaToConfig
from todo_attn.diffusers.dato import apply_dato, reset_dato


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


def test_a_run_starts_at_the_first_timestep(unet, played):
    apply_dato(unet, DaToConfig(cache_schedule="1012"))
    timesteps = torch.tensor([981, 961, 951, 941, 1])
    assert played(timesteps) == "21012"
    assert played(timesteps) == "21012"
    assert played([*timesteps[:3], *timesteps]) == "21021012"
    reset_dato(unet)
    assert played(timesteps[1:3]) == "21"


def test_the_same_timestep_twice(unet, played, caplog):
    """Another image or a perturbed call: it and the next call are full, which is right for both."""
    apply_dato(unet, DaToConfig(cache_schedule="11111"))
    t = torch.tensor([981, 961, 941, 921, 901, 881])
    assert played([t[0], t[1], t[1], t[2], t[3], t[4]]) == "212211"
    messages = [r.getMessage() for r in caplog.records if r.name == "todo_attn"]
    assert len(messages) == 1
    assert "more than once at a timestep" in messages[0]


@pytest.mark.parametrize("form", [as_number, float, as_tensor, as_batch])
def test_an_image_after_one_that_was_broken_off_with_numbers_as_timesteps(unet, played, caplog, form):
    """It starts at a lower timestep with the same prompt embeddings, and looks like the next step of the first run."""
    apply_dato(unet, DaToConfig(cache_schedule="1111"))
    assert played([form(t) for t in (981, 781)]) == "22"
    assert played([form(t) for t in (581, 381, 181)]) == "222"
    messages = [r.getMessage() for r in caplog.records if r.name == "todo_attn"]
    assert len(messages) == 1
    assert "computed in full" in messages[0]
    assert messages[0].endswith("Pass the elements of scheduler.timesteps.")
    assert kept(unet) == 0


def test_rising_timesteps(unet, played):
    """An inversion: from the image to noise."""
    apply_dato(unet, DaToConfig(cache_schedule="1012"))
    timesteps = torch.tensor([1, 200, 400, 600, 800])
    assert played(timesteps) == "21012"
    assert played(timesteps) == "21012"


def test_one_tensor_written_in_place(unet, played):
    def written(values):
        for value in values:
            yield tensor.fill_(value)

    tensor = torch.tensor(0)
    apply_dato(unet, DaToConfig(cache_schedule="11"))
    assert played(written((900, 500, 100))) == "222"


def test_by_keyword(unet, inputs, kinds):
    log = kinds(unet)
    apply_dato(unet, DaToConfig(cache_schedule="01"))
    given = inputs(unet)
    with torch.no_grad():
        for t in torch.tensor([3, 2, 1]):
            unet(sample=given.sample, timestep=t, **given.kwargs)
    assert "".join(log) == "201"


class OnDevice(torch.Tensor):
    """A tensor that claims to be on a GPU, and must not be read."""

    LAYOUT = (
        "storage_offset", "untyped_storage", "element_size", "dim", "stride", "expand", "unbind", "as_subclass",
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

    def after_dato(config):
        apply_dato(unet, config)
        unet.register_forward_pre_hook(unveil)

    return after_dato


def test_a_device_timestep_is_the_next_element_of_the_same_tensor(device_unet, played):
    """The schedule is resampled to the elements that are left."""
    config = DaToConfig(cache_schedule="1012")
    short = "2" + config.schedule_for(3)
    device_unet(config)
    timesteps = on_device([981, 961, 961, 941, 1])
    assert played(timesteps) == "21012"
    assert played(timesteps) == "21012"
    assert played([*timesteps[:2], *timesteps]) == "2121012"
    assert played(timesteps[2:]) == short
    assert played(on_device([5, 4, 3])) == short
    assert played([timesteps[0], timesteps[2], timesteps[3]]) == "221"
    assert played([*timesteps[:2], 941, 921, *timesteps[:2]]) == "212221"


def test_a_batch_of_one_device_timestep(device_unet, played):
    """However large the batch is."""
    device_unet(DaToConfig(cache_schedule="101"))
    assert played([t.expand(8) for t in on_device([4, 3, 2, 1])], batch=8) == "2101"


def test_device_timesteps_that_cannot_be_placed(device_unet, played, caplog):
    device_unet(DaToConfig(cache_schedule="111"))
    assert played([on_device(t) for t in (9, 8, 7)]) == "222"
    assert played([on_device([t])[0] for t in (9, 8, 7)]) == "222"
    messages = [r.getMessage() for r in caplog.records if r.name == "todo_attn"]
    assert len(messages) == 1
    assert "Pass the elements of scheduler.timesteps" in messages[0]


def test_a_device_timestep_can_be_reset(device_unet, unet, played):
    device_unet(DaToConfig(cache_schedule="111"))
    timesteps = on_device([9, 8, 7, 6])
    assert played(timesteps[:2]) == "21"
    reset_dato(unet)
    assert played(timesteps[2:]) == "21"


def test_another_shape_batch_or_dtype_starts_a_run(unet, inputs, kinds):
    apply_dato(unet, DaToConfig(cache_schedule="1" * 9))
    log = kinds(unet)
    changes = [{}, {"size": (8, 10)}, {"size": (10, 8)}, {"size": (10, 8), "batch": 3}, {"size": (10, 8), "batch": 3}]
    timesteps = torch.arange(10, 0, -1)
    with torch.no_grad():
        for t, change in zip(timesteps, changes, strict=False):
            given = inputs(unet, **change)
            unet(given.sample, t, **given.kwargs)
        unet.double()
        unet(given.sample.double(), timesteps[5], given.kwargs["encoder_hidden_states"].double())
    assert "".join(log) == "222212"


def test_a_new_run_forgets_the_last(unet, inputs):
    """Not the noise, nor the difference of the outputs, nor the hidden state."""
    apply_dato(unet, DaToConfig(cache_schedule="21021", dynamics_weight=9.0))

    @torch.no_grad()
    def image(seed):
        outputs = []
        for i, t in enumerate(torch.arange(900, 894, -1)):
            given = inputs(unet, seed=seed + i)
            outputs.append(unet(given.sample, t, **given.kwargs).sample.clone())
        return outputs

    first = image(0)
    image(50)
    assert all(map(torch.equal, image(0), first))
    image(50)
    reset_dato(unet)
    assert all(map(torch.equal, image(0), first))


def kept(unet):
    """The number of streams of ``unet`` that DaTo keeps."""
    return len(unet._todo_attn_dato.run.streams)


def test_reset_frees_what_was_kept(unet, played):
    apply_dato(unet, DaToConfig(cache_schedule="11"))
    played(torch.tensor([900, 800, 700])[:2])
    assert kept(unet) == 1
    reset_dato(unet)
    assert kept(unet) == 0


def test_a_finished_run_keeps_nothing(unet, played):
    apply_dato(unet, DaToConfig(cache_schedule="1111"))
    timesteps = torch.tensor([9, 8, 7, 6, 5])
    assert played(timesteps[:4]) == "2111"
    assert kept(unet) == 1
    assert played(timesteps[4:]) == "1"
    assert kept(unet) == 0
    run = unet._todo_attn_dato.run
    assert not any(
        isinstance(x, torch.Tensor) and x.ndim == 4 for part in (run, run.stream) for x in vars(part).values()
    )


def test_runs_of_one_step(device_unet, unet, played):
    device_unet(DaToConfig(cache_schedule="0"))
    for _ in range(2):
        assert played(on_device([999])) == "2"
        assert kept(unet) <= 1
