"""torch.compile: a graph for each kind of call, whatever the run; and nothing kept in the memory of a graph."""

import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.utils import counters

from todo_attn import ToDoConfig
from todo_attn.config.dato import DaToConfig
from todo_attn.diffusers.dato import apply_dato, remove_dato

# One run of 50 calls, which pipelines give as many timesteps.
DIGITS = ("210110120" * 6)[:49]
CALLS = 50
SIZE = (8, 12)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def traces():
    """A backend that runs the traced graph as it is, and counts the graphs."""
    return torch._dynamo.testing.CompileCounter()


class GraphMemory:
    """A backend like CUDA graphs: a graph returns the same memory every time, which its next call overwrites."""

    def __init__(self):
        self.outputs = []

    def __call__(self, graph, inputs):
        memory = []
        self.outputs.append(memory)

        def replay(*args):
            for tensor in (tensor for outputs in self.outputs for tensor in outputs):
                tensor.fill_(torch.nan)
            outputs = graph(*args)
            if not memory:
                memory.extend(torch.empty_like(output) for output in outputs)
            for tensor, output in zip(memory, outputs, strict=True):
                tensor.copy_(output)
            return memory

        return replay


def close(actual, expected):
    return all((a - b).abs().max() < 1e-5 for a, b in zip(actual, expected, strict=True))


def in_place(unet, **options):
    unet.compile(**options)
    return unet


CONFIGS = {
    "pruned": {},
    "cache": {"prune_ratio": 0.0},
    "everything": {"prune_cross_attention": True, "prune_feed_forward": True, "todo": ToDoConfig(factor=2)},
}
COMPILED = {
    "torch.compile, then DaTo": (torch.compile, "after"),
    "DaTo, then torch.compile": (torch.compile, "before"),
    "module.compile, then DaTo": (in_place, "after"),
    "DaTo, then module.compile": (in_place, "before"),
}
RUNS = [
    ("sd", "everything", "DaTo, then torch.compile"),
    ("small", "pruned", "torch.compile, then DaTo"),
    ("small", "pruned", "module.compile, then DaTo"),
    ("small", "cache", "DaTo, then module.compile"),
]


@pytest.mark.parametrize(("kind", "options", "order"), RUNS)
def test_a_run_compiles_three_graphs(make_unet, calls, traces, kind, options, order):
    """One for each kind of call, and no more for the next image."""
    config = DaToConfig(cache_schedule=DIGITS, **CONFIGS[options])
    unet, eager = make_unet(kind), make_unet(kind)
    apply_dato(eager, config)
    compile_it, when = COMPILED[order]
    if when == "before":
        apply_dato(unet, config)
    compiled = compile_it(unet, fullgraph=True, backend=traces)
    if when == "after":
        apply_dato(compiled, config)
    for n in (CALLS, 9):
        assert close(calls(compiled, n, size=SIZE), calls(eager, n, size=SIZE))
        assert traces.frame_count == 3


@pytest.mark.parametrize("compile_it", [torch.compile, in_place])
def test_taken_off_again(make_unet, calls, traces, compile_it):
    """The model is dense again, and reuses its earlier graph if it was compiled before."""
    unet, eager = make_unet("small"), make_unet("small")
    compiled = compile_it(unet, fullgraph=True, backend=traces)
    dense = calls(eager, 1, size=SIZE)
    assert close(calls(compiled, 1, size=SIZE), dense)
    apply_dato(compiled, DaToConfig(cache_schedule="1"))
    assert not close(calls(compiled, 2, size=SIZE)[:1], dense)
    remove_dato(compiled)
    assert close(calls(compiled, 1, size=SIZE), dense)


def test_without_a_schedule_there_is_one_graph(make_unet, calls, traces):
    config = DaToConfig()
    unet, eager = make_unet("small"), make_unet("small")
    apply_dato(eager, config)
    apply_dato(unet, config)
    compiled = torch.compile(unet, fullgraph=True, backend=traces)
    for _ in range(2):
        assert close(calls(compiled, 5, size=SIZE), calls(eager, 5, size=SIZE))
    assert traces.frame_count == 1


@pytest.mark.parametrize(("kind", "options"), [("sd", "everything"), ("small", "cache")])
def test_nothing_kept_is_in_the_memory_of_a_graph(make_unet, calls, kind, options):
    """A full call returns its output and the start of shallow calls, and no other tensor leaves a graph."""
    config, memory = DaToConfig(cache_schedule="101202110", **CONFIGS[options]), GraphMemory()
    unet, eager = make_unet(kind), make_unet(kind)
    apply_dato(eager, config)
    expected = calls(eager, 10, size=SIZE)
    apply_dato(unet, config)
    compiled = torch.compile(unet, fullgraph=True, backend=memory)
    for _ in range(2):
        assert close(calls(compiled, 10, size=SIZE), expected)
    assert [len(outputs) for outputs in memory.outputs] == [2, 1, 1]


def test_another_configuration_after_compiling(make_unet, calls, traces):
    unet, eager = make_unet("small"), make_unet("small")
    compiled = torch.compile(unet, fullgraph=True, backend=traces)
    for config in (DaToConfig(cache_schedule="1"), DaToConfig(prune_ratio=0.7)):
        apply_dato(compiled, config)
        apply_dato(eager, config)
        assert close(calls(compiled, 2, size=SIZE), calls(eager, 2, size=SIZE))


def test_no_graph_a_size_where_sizes_are_dynamic(make_unet, calls, traces):
    """Shapes reach a graph as tensors: a number on a hook would be a constant of the graph."""
    config = DaToConfig(cache_schedule="10")
    unet, eager = make_unet("small"), make_unet("small")
    apply_dato(eager, config)
    apply_dato(unet, config)
    compiled = torch.compile(unet, fullgraph=True, dynamic=True, backend=traces)
    for size in [(18, 26), (28, 14)]:
        assert close(calls(compiled, 3, size=size), calls(eager, 3, size=size)), size
        assert traces.frame_count == 3


@pytest.mark.parametrize(
    ("digits", "todo", "graphs"),
    [(None, None, 1), ("210110120", None, 3), ("210110120", ToDoConfig(factor=2), 3)],
    ids=["pruned", "cache", "todo"],
)
def test_a_ratio_for_each_call(make_unet, calls, traces, digits, todo, graphs):
    """The number of kept tokens is a dynamic size from the first call on: as many graphs as with one ratio."""
    ratios = tuple(0.7 - i / 50 for i in range(10))
    config = DaToConfig(prune_ratio=ratios, cache_schedule=digits, todo=todo)
    unet, eager = make_unet("small"), make_unet("small")
    apply_dato(eager, config)
    apply_dato(unet, config)
    compiled = torch.compile(unet, fullgraph=True, backend=traces)
    for _ in range(2):
        assert close(calls(compiled, 10, size=SIZE), calls(eager, 10, size=SIZE))
    assert traces.frame_count == graphs


@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_blocks(make_unet, calls, traces, order):
    """Regional compilation: blocks of one shape share a graph, pruned or not."""
    config = DaToConfig(cache_schedule="1012", **CONFIGS["everything"])
    unet, eager = make_unet("sd"), make_unet("sd")
    apply_dato(eager, config)
    if order == "before":
        apply_dato(unet, config)
    unet._repeated_blocks = ["BasicTransformerBlock"]
    unet.compile_repeated_blocks(fullgraph=True, backend=traces)
    if order == "after":
        apply_dato(unet, config)
    expected, graphs = calls(eager, 5, size=SIZE), []
    for _ in range(2):
        assert close(calls(unet, 5, size=SIZE), expected)
        graphs.append(traces.frame_count)
    assert graphs[1] == graphs[0] <= 8


def test_inside_a_larger_compiled_function(make_unet, calls):
    """The graph ends before the UNet, which is compiled on its own."""
    config = DaToConfig(cache_schedule="102")
    unet, eager = make_unet("small"), make_unet("small")
    apply_dato(eager, config)
    apply_dato(unet, config)
    step = torch.compile(lambda *args, **kwargs: unet(*args, **kwargs), backend="eager")
    step.config = unet.config
    assert close(calls(step, 4, size=SIZE), calls(eager, 4, size=SIZE))


def test_functional_graphs(make_unet, calls):
    """As inductor gets them: no writing in place, no views among the outputs."""
    config = DaToConfig(cache_schedule="1021", **CONFIGS["everything"])
    unet, eager = make_unet("small"), make_unet("small")
    for model in (eager, unet):
        model.enable_freeu(0.9, 0.2, 1.1, 1.2)
        apply_dato(model, config)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    assert close(calls(compiled, 5, size=SIZE), calls(eager, 5, size=SIZE))


@pytest.mark.gpu
@pytest.mark.parametrize("options", CONFIGS)
def test_cuda_graphs(make_unet, inputs, options):
    config = DaToConfig(cache_schedule="101202110", **CONFIGS[options])
    unet, eager = make_unet("small").cuda(), make_unet("small").cuda()
    timesteps = torch.arange(900, 0, -50, device="cuda")
    apply_dato(eager, config)
    apply_dato(unet, config)
    compiled = torch.compile(unet, fullgraph=True, mode="reduce-overhead")

    @torch.no_grad()
    def image(model):
        outputs = []
        for i in range(10):
            given = inputs(unet, (16, 12), seed=i)
            kwargs = {name: x.cuda() for name, x in given.kwargs.items()}
            torch.compiler.cudagraph_mark_step_begin()
            outputs.append(model(given.sample.cuda(), timesteps[i], **kwargs).sample.clone())
        return outputs

    counters.clear()
    images = [image(compiled) for _ in range(4)]  # the first two warm up and record
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert all(output.isfinite().all() for output in images[0])
    for again in images[1:]:
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(again, images[0], strict=True))
    if options == "cache":  # tokens that are equally like each other may be chosen otherwise on another kernel's input
        assert all((a - b).abs().max() < 1e-2 for a, b in zip(images[-1], image(eager), strict=True))
