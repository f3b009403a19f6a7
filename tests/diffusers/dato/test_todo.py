"""DaTo with ToDo, in either order: the kept queries read the keys of the coarse grid."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0

from todo_attn import ToDoConfig, ToDoProcessor, apply_todo, remove_todo
from todo_attn.config.dato import DaToConfig
from todo_attn.diffusers.dato import apply_dato, remove_dato

TODO = ToDoConfig(factor=2)
SIZE = (12, 8)


def attention_by_hand(attn, x, kept, grid, factor):
    """Queries of the ``kept`` tokens of ``x`` (B, N, C), keys and values of every ``factor``-th row and column."""
    image = x.transpose(1, 2).unflatten(2, grid)
    coarse = F.interpolate(image, size=(grid[0] // factor, grid[1] // factor)).flatten(2).transpose(1, 2)

    def heads(y):
        return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    query = heads(attn.to_q(torch.stack([row[k] for row, k in zip(x, kept, strict=True)])))
    key, value = heads(attn.to_k(coarse)), heads(attn.to_v(coarse))
    weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
    return attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2))


ORDERS = {
    "todo=": lambda unet: apply_dato(unet, DaToConfig(todo=TODO)),
    "before": lambda unet: (apply_todo(unet, TODO), apply_dato(unet, DaToConfig())),
    "after": lambda unet: (apply_dato(unet, DaToConfig()), apply_todo(unet, TODO)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_kept_queries_read_the_coarse_grid(make_unet, inputs, order, batch):
    """The choice of tokens is DaTo's own (tested elsewhere); the attention is computed by hand here."""
    unet = make_unet("small")
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    given, seen = inputs(unet, SIZE, batch), []
    block.attn1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # all tokens: before DaTo's hook
    ORDERS[order](unet)
    pruning = next(hook.__self__ for hook in block._forward_pre_hooks.values())
    block.attn1.register_forward_pre_hook(lambda *_: seen.append(pruning.pruned))
    block.attn1.register_forward_hook(lambda _, args, output: seen.append(output))  # after it
    with torch.no_grad():
        unet(given.sample, 900, **given.kwargs)
        x, (kept, source), actual = seen
        assert x.shape[1] == 96
        assert kept.shape == (batch, 96 - int(0.4 * 96))
        y = attention_by_hand(block.attn1, x, kept, SIZE, 2)
    expected = torch.stack([row[s] for row, s in zip(y, source, strict=True)])
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_order_is_the_same(make_unet, calls, kind):
    outputs = {}
    for order, apply in ORDERS.items():
        unet = make_unet(kind)
        apply(unet)
        outputs[order] = calls(unet, 4)
    for other in ("before", "after"):
        assert all(map(torch.equal, outputs["todo="], outputs[other]))
    for alone in (lambda u: apply_todo(u, TODO), lambda u: apply_dato(u, DaToConfig())):
        unet = make_unet(kind)
        alone(unet)
        assert not torch.equal(calls(unet, 1)[0], outputs["todo="][0])


def test_with_nothing_pruned_it_is_todo(make_unet, calls):
    unet, todo = make_unet("sd"), make_unet("sd")
    apply_todo(todo, TODO)
    apply_dato(unet, DaToConfig(prune_ratio=0.0, todo=TODO))
    assert all(map(torch.equal, calls(unet, 3), calls(todo, 3)))


@pytest.mark.parametrize("todo", [ToDoConfig(), ToDoConfig(factor=2, timestep_range=(0, 2))])
@pytest.mark.parametrize("kind", ["small", "sdxl"])
def test_with_todo_idle_it_is_dato(make_unet, calls, kind, todo, caplog):
    """The kept tokens read each other, as without ToDo, and no warning says that a grid is not known."""
    unet, dato = make_unet(kind), make_unet(kind)
    apply_dato(unet, DaToConfig(todo=todo))
    apply_dato(dato, DaToConfig())
    assert all(map(torch.equal, calls(unet, 3), calls(dato, 3)))
    assert not any("not known" in record.getMessage() for record in caplog.records)


def test_the_processor_set_by_hand(make_unet, calls, caplog):
    """Its grid is found at the first call, even if DaTo has pruned tokens before."""
    size = (72, 68)  # above 4096 tokens, so that it has something to do
    unet, expected = make_unet("small"), make_unet("small")
    apply_dato(expected, DaToConfig(todo=ToDoConfig()))
    apply_dato(unet, DaToConfig())
    unet.set_attn_processor(ToDoProcessor())
    assert all(map(torch.equal, calls(unet, 2, size=size), calls(expected, 2, size=size)))
    assert not any("not known" in record.getMessage() for record in caplog.records)


def test_another_processor_set_after_todo(make_unet, calls):
    """It has no coarse grid, and is given the kept tokens."""
    unet, dato = make_unet("sd"), make_unet("sd")
    apply_todo(unet, TODO)
    apply_dato(unet, DaToConfig())
    unet.set_attn_processor(AttnProcessor2_0())
    apply_dato(dato, DaToConfig())
    assert all(map(torch.equal, calls(unet, 3), calls(dato, 3)))


def test_removing_one_leaves_the_other(make_unet, calls):
    unet, todo, dato, dense = (make_unet("sd") for _ in range(4))
    apply_todo(todo, TODO)
    apply_dato(dato, DaToConfig())
    apply_todo(unet, TODO)
    apply_dato(unet, DaToConfig())
    calls(unet, 2)
    remove_todo(unet)
    assert torch.equal(calls(unet, 1)[0], calls(dato, 1)[0])
    apply_todo(unet, TODO)
    remove_dato(unet)
    assert torch.equal(calls(unet, 1)[0], calls(todo, 1)[0])
    remove_todo(unet)
    assert torch.equal(calls(unet, 1)[0], calls(dense, 1)[0])


def test_todo_of_the_configuration_goes_with_it(pipe, make_controlnet, calls):
    dense = calls(pipe.unet, 1)[0]
    pipe.controlnet = make_controlnet()
    apply_dato(pipe, DaToConfig(todo=TODO))
    assert has_todo(pipe.controlnet)
    apply_dato(pipe, DaToConfig(todo=ToDoConfig(factor=3)))  # replaces
    apply_dato(pipe, DaToConfig(prune_ratio=0.0))
    assert torch.equal(calls(pipe.unet, 1)[0], dense)
    apply_dato(pipe, DaToConfig(todo=TODO))
    remove_dato(pipe.unet)
    for model in (pipe.unet, pipe.controlnet):
        assert not has_todo(model)
    assert torch.equal(calls(pipe.unet, 1)[0], dense)


def has_todo(model):
    return any(isinstance(processor, ToDoProcessor) for processor in model.attn_processors.values())


@pytest.mark.parametrize("forget", [False, True], ids=["the pipeline is there", "the pipeline is gone"])
def test_todo_on_controlnets_goes_with_the_configuration_it_came_with(pipe, make_controlnet, forget):
    """No matter whether the UNet or the pipeline is given the next time."""
    unet, controlnet = pipe.unet, make_controlnet()
    nexts = [
        (False, lambda: apply_dato(unet, DaToConfig(todo=ToDoConfig(factor=3)))),
        (False, lambda: apply_dato(unet, DaToConfig())),
        (False, lambda: remove_dato(unet)),
        (True, lambda: apply_dato(pipe, DaToConfig(todo=ToDoConfig(factor=3)))),
    ]
    for stays, following in nexts:
        shell = copy.copy(pipe)
        shell.controlnet = pipe.controlnet = controlnet
        apply_dato(shell, DaToConfig(todo=TODO))
        assert has_todo(controlnet)
        if forget:
            del shell
        following()
        assert has_todo(controlnet) == stays
    remove_dato(unet)
    assert not has_todo(controlnet)
    assert not has_todo(unet)
