"""torch.compile(unet, fullgraph=True) with ToDo, applied before or after."""

import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.utils import counters

from todo_attn import ToDoConfig, ToDoProcessor, apply_todo, remove_todo

SIZE = (16, 12)
TODO = ToDoConfig(factor=2)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def unet(make_unet):
    return make_unet("small")


@pytest.fixture
def traces():
    """A backend that runs the traced graph as it is, and counts the graphs."""
    return torch._dynamo.testing.CompileCounter()


def close(actual, expected):
    return (actual - expected).abs().max() < 1e-5


def in_place(unet, **options):
    unet.compile(**options)
    return unet


@pytest.mark.parametrize("compile_it", [torch.compile, in_place], ids=["torch.compile", "module.compile"])
def test_applied_before_after_and_taken_off(make_unet, unet, call, traces, compile_it):
    eager = make_unet("small")
    dense = call(eager, SIZE)
    apply_todo(eager, TODO)
    todo = call(eager, SIZE)
    assert not close(todo, dense)

    compiled = compile_it(unet, fullgraph=True, backend=traces)
    assert close(call(compiled, SIZE), dense)
    apply_todo(compiled, TODO)  # after compiling, and after a call
    for timestep in (500, 500):
        assert close(call(compiled, SIZE, timestep=timestep), todo)
    assert traces.frame_count == 2
    remove_todo(compiled)
    assert close(call(compiled, SIZE), dense)


def test_the_state_is_on_the_model_and_not_on_its_wrapper(unet, hooks):
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    apply_todo(compiled, TODO)
    assert hooks(compiled) == hooks(unet) > 0
    remove_todo(unet)
    assert hooks(compiled) == 0


def test_applied_before_compiling_and_replaced(make_unet, unet, call, reference, traces):
    """One graph for each configuration, and the same one for every call."""
    apply_todo(unet, TODO)
    compiled = torch.compile(unet, fullgraph=True, backend=traces)
    actual = [call(compiled, SIZE, seed=seed) for seed in (0, 1)]
    assert traces.frame_count == 1
    apply_todo(compiled, ToDoConfig(factor=3, mode="mean"))
    replaced = call(compiled, SIZE)
    eager = make_unet("small")
    with reference(eager, SIZE, {1: 2, 2: 2}):
        assert all(close(a, call(eager, SIZE, seed=seed)) for seed, a in enumerate(actual))
    with reference(eager, SIZE, {1: 3, 2: 3}, "mean"):
        assert close(replaced, call(eager, SIZE))


def test_one_graph_for_several_sizes(make_unet, unet, call, reference, traces):
    apply_todo(unet, ToDoConfig(max_kv_tokens=50))
    compiled = torch.compile(unet, fullgraph=True, dynamic=True, backend=traces)
    eager = make_unet("small")
    for size in [(16, 12), (20, 10)]:
        with reference(eager, size, {1: 2}):
            assert close(call(compiled, size), call(eager, size)), size
    assert traces.frame_count == 1


@pytest.mark.parametrize(("mode", "factor"), [("nearest", 2), ("mean", 1.5)], ids=str)
def test_a_factor_at_several_sizes(make_unet, unet, call, reference, traces, mode, factor):
    apply_todo(unet, ToDoConfig(factor={1: factor}, mode=mode))
    compiled = torch.compile(unet, fullgraph=True, dynamic=True, backend=traces)
    eager = make_unet("small")
    for size in [(18, 12), (12, 24), (24, 18)]:
        with reference(eager, size, {1: factor}, mode):
            assert close(call(compiled, size), call(eager, size)), size
    assert traces.frame_count == 1


def test_a_narrow_timestep_range_has_two_graphs(make_unet, unet, call, traces):
    """The hook on the model runs outside of its graph, so even fullgraph may read the timestep there."""
    eager = make_unet("small")
    config = ToDoConfig(factor={1: 2, 2: 3}, timestep_range=(0, 500))
    dense = call(eager, SIZE, timestep=torch.tensor(700))
    apply_todo(unet, config)
    apply_todo(eager, config)
    compiled = torch.compile(unet, fullgraph=True, backend=traces)
    for timestep in (700, 300, 600, 200):
        timestep = torch.tensor(timestep)
        assert close(call(compiled, SIZE, timestep=timestep), call(eager, SIZE, timestep=timestep))
    assert traces.frame_count == 2
    assert close(call(compiled, SIZE, timestep=torch.tensor(700)), dense)


def test_inside_a_larger_compiled_function(make_unet, unet, call):
    eager = make_unet("small")
    apply_todo(unet, TODO)
    apply_todo(eager, TODO)
    step = torch.compile(lambda *args: unet(*args), fullgraph=True, backend="eager")
    assert close(call(step, SIZE), call(eager, SIZE))


def test_a_narrow_range_inside_a_larger_function_breaks_the_graph(make_unet, unet, call):
    eager = make_unet("small")
    for model in (unet, eager):
        apply_todo(model, ToDoConfig(factor=2, timestep_range=(0, 500)))
    step = torch.compile(lambda *args: unet(*args), backend="eager")
    for timestep in (torch.tensor(700), torch.tensor(300)):
        assert close(call(step, SIZE, timestep=timestep), call(eager, SIZE, timestep=timestep))
    step = torch.compile(lambda *args: unet(*args), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model itself"):
        call(step, SIZE, timestep=torch.tensor(300))


@pytest.mark.parametrize(
    "config",
    [ToDoConfig(1.5), ToDoConfig(max_kv_tokens=60), ToDoConfig(factor={1: 3, 2: 2}, timestep_range=(0, 600))],
    ids=["fraction", "auto", "levels"],
)
def test_compiled_blocks(make_unet, call, traces, config):
    """Regional compilation: the plan of a call is an argument of the block, so its numbers become dynamic."""
    unet, eager = make_unet("sd"), make_unet("sd")
    apply_todo(unet, config)
    apply_todo(eager, config)
    unet._repeated_blocks = ["BasicTransformerBlock"]
    unet.compile_repeated_blocks(fullgraph=True, backend=traces)
    for size in [(16, 16), (16, 24), (24, 16), (20, 32), (32, 32)]:
        for timestep in (500, 700):
            assert close(call(unet, size, timestep=timestep), call(eager, size, timestep=timestep)), size
    assert traces.frame_count <= 7


def test_the_bare_processor_traced_before_any_call_is_dense_and_says_so(make_unet, unet, call, caplog):
    dense = call(unet, (80, 72), batch=1)
    unet.set_attn_processor(ToDoProcessor())
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert torch.equal(call(compiled, (80, 72), batch=1), dense)
    records = [r for r in caplog.records if r.name == "todo_attn"]
    assert len(records) == 1
    assert "apply_todo" in records[0].getMessage()


def test_the_bare_processor_traced_after_a_call_acts(unet, call, caplog):
    unet.set_attn_processor(ToDoProcessor())
    expected = call(unet, (80, 72), batch=1)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert close(call(compiled, (80, 72), batch=1), expected)
    assert not [r for r in caplog.records if r.name == "todo_attn"]


def test_a_configuration_that_changes_nothing_is_logged_once(unet, call, caplog):
    apply_todo(unet)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for _ in range(2):
        call(compiled, SIZE)
    records = [r for r in caplog.records if r.name == "todo_attn"]
    assert len(records) == 1
    assert "changes nothing" in records[0].getMessage()


def test_gradients_through_a_compiled_model(make_unet, unet):
    def gradients(model):
        generator = torch.Generator().manual_seed(0)
        sample, text = torch.randn(1, 4, *SIZE, generator=generator), torch.randn(1, 5, 8, generator=generator)
        sample.requires_grad_()
        model(sample, 500, text).sample.square().mean().backward()
        return sample.grad

    eager = make_unet("small")
    apply_todo(unet, TODO)
    apply_todo(eager, TODO)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    assert close(gradients(compiled), gradients(eager))


def test_inductor(make_unet, unet, call):
    """The attention alone: a whole UNet takes inductor more than a minute on a CPU."""
    eager = make_unet("small")
    apply_todo(unet, TODO)
    apply_todo(eager, TODO)
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.compile(fullgraph=True)
    assert close(call(unet, SIZE), call(eager, SIZE))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TODO, ToDoConfig(factor={1: 2, 2: 3}, mode="mean")])
def test_cuda_graphs(make_unet, unet, config):
    """What a call leaves on the model is outside of the graph's memory, which the next call overwrites."""
    eager, unet = make_unet("small").cuda(), unet.cuda()
    apply_todo(unet, config)
    apply_todo(eager, config)
    compiled = torch.compile(unet, fullgraph=True, mode="reduce-overhead")
    generator = torch.Generator("cuda").manual_seed(0)
    counters.clear()
    for timestep in torch.arange(900, 0, -200, device="cuda"):
        sample = torch.randn(2, 4, *SIZE, device="cuda", generator=generator)
        text = torch.randn(2, 5, 8, device="cuda", generator=generator)
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            actual, expected = (model(sample, timestep, text).sample for model in (compiled, eager))
        assert (actual - expected).abs().max() < 1e-2 * expected.abs().max()
    assert counters["inductor"]["cudagraph_skips"] == 0
