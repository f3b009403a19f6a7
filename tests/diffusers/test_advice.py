"""What is said of a model as ToDo or DaTo is applied: the shapes' count against the real one, and the log's lines."""

import logging

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel

from todo_attn import (
    DaToConfig,
    ToDoConfig,
    ToDoProcessor,
    apply_dato,
    apply_todo,
    logs,
    remove_dato,
    remove_todo,
    schedule,
)
from todo_attn.compare_settings import CompareSettings
from todo_attn.diffusers import advice, gains, probes, timing
from todo_attn.diffusers.architectures import CONFIGS, Architecture
from todo_attn.diffusers.cost import count_work
from todo_attn.roofline import Rates, Work

SIZE = (12, 17)
CPU_RATES = Rates(attention=125e9, other=203e9, launch=2e-5)


@pytest.fixture(autouse=True)
def no_rates_known(monkeypatch):
    monkeypatch.setattr(advice, "_RATES", {})


@pytest.fixture(scope="module")
def shells():
    with torch.device("meta"):
        return {name: UNet2DConditionModel.from_config(config) for name, config in CONFIGS.items()}


def real(unet, config, batch=1):
    """As counted while the UNet runs."""
    return count_work(unet, *SIZE, [config], batch=batch, pixels_per_latent=1)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "small"])
@pytest.mark.parametrize("factor", [2, {"finest": 3}], ids=str)
def test_shapes_tell_what_todo_costs(make_unet, kind, factor):
    unet, config = make_unet(kind), ToDoConfig(factor=factor)
    dense, todo = (works.full for works in real(unet, config, batch=2))
    for counted, shape in ((dense, None), (todo, config)):
        work = advice.call_work(unet, SIZE, shape, batch=2)
        assert (work.attention, work.other) == (counted.attention, counted.other)


def test_shapes_tell_where_a_level_only_cross_attends(unet):
    """As in the upscaler of Stable Diffusion 2."""
    changed = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel(**changed | {"only_cross_attention": (True, False, False), "num_class_embeds": 3})
    dense = real(unet, ToDoConfig())[0].full
    work = advice.call_work(unet, SIZE)
    assert (work.attention, work.other) == (dense.attention, dense.other)


def test_shapes_tell_self_attention(unet):
    """What a factor takes away of it grows with its products, and projections of keys and values."""
    work = advice.self_attention_work(unet, SIZE)
    modules = advice.operations_by_module(unet, SIZE)
    own = {name: n for name, n in modules.items() if ".attn1" in name}
    assert work.operations == sum(own.values())
    assert work.attention == sum(n for name, n in own.items() if name.endswith(".attn1"))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "config",
    [
        DaToConfig(cache_schedule="10"),
        DaToConfig(prune_ratio=0.6, patch=(3, 2), cache_schedule="1021"),
        DaToConfig(cache_schedule="12", todo=ToDoConfig(max_kv_tokens=20)),
        DaToConfig(),
    ],
    ids=["default", "patch", "todo", "no-cache"],
)
def test_shapes_tell_what_dato_costs(make_unet, kind, config):
    unet = make_unet(kind)
    kinds = "2" + (config.cache_schedule or "")
    dense, of_kind = real(unet, config)
    shapes_dense, works = advice.run_work(unet, SIZE, config)
    assert counts([shapes_dense, *works]) == counts([dense.full, *(of_kind.of(kind) for kind in kinds)])


def counts(works):
    return [(work.attention, work.other) for work in works]


def test_a_ratio_per_call(unet):
    config = DaToConfig(prune_ratio=(0.4, 0.0, 0.2), cache_schedule="21")
    works = {ratio: real(unet, DaToConfig(prune_ratio=ratio))[1] for ratio in config.prune_ratio}
    _, run = advice.run_work(unet, SIZE, config)
    assert counts(run) == counts([works[0.4].full, works[0.0].full, works[0.2].shallow])


@pytest.mark.parametrize(
    ("side", "cap", "factor"), [(64, 4096, "auto"), (65, 4096, "auto"), (64, 100, 1), (8, 63, "auto")]
)
def test_shapes_tell_whether_anything_is_downsampled(shells, side, cap, factor):
    expected = {(64, "auto"): False, (65, "auto"): True, (64, 1): False, (8, "auto"): True}[side, factor]
    config = ToDoConfig(factor=factor, max_kv_tokens=cap)
    assert advice.downsamples(shells["sd15"], (side, side), config) == expected
    dense, (todo,) = advice.run_work(shells["sd15"], (side, side), config)
    assert (todo != dense) == expected


def said(caplog):
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "todo_attn"]


def by_size(text):
    """What a line of the log says of each size."""
    found = text.partition(": ")[2].removesuffix(text[text.rindex(". Operations are counted") :])
    return dict(one.split(": ", 1) for one in found.split("; "))


def test_todo_says_what_it_gains_in_one_line(shells, caplog):
    caplog.set_level(logging.INFO, "todo_attn")
    apply_todo(shells["sd15"])
    ((level, text),) = said(caplog)
    remove_todo(shells["sd15"])
    assert level == "INFO" and text.startswith("ToDo, by width x height in latents: ")
    assert by_size(text) == {
        "64 x 64": "this will not help here: nothing is downsampled, no level having more than max_kv_tokens=4096 "
        "tokens at this size (1.00 times fewer operations)",
        "128 x 128": "1.39 times fewer operations",
        "256 x 256": "3.10 times fewer operations",
    }
    assert "nothing is timed: todo-attn doctor --model MODEL" in text


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("todo", ToDoConfig(max_kv_tokens=16)),
        ("todo", ToDoConfig(max_kv_tokens=64)),
        ("todo", ToDoConfig(max_kv_tokens=10**6)),
        ("dato", DaToConfig.preset("coco")),
        ("todo+dato", DaToConfig.preset("coco", todo=ToDoConfig(max_kv_tokens=200))),
        ("todo+dato", DaToConfig.preset("v1", todo=ToDoConfig(max_kv_tokens=20), prune_ratio=0.0)),
    ],
    ids=["todo-16", "todo-64", "todo-never", "dato", "both", "both-unpruned"],
)
def test_the_log_says_what_doctor_says(unet, advise, caplog, method, config):
    """On a machine where every operation takes as long as any other, word by word but for the prediction."""
    caplog.set_level(logging.INFO, "todo_attn")
    (apply_todo if method == "todo" else apply_dato)(unet, config)
    ((_, text),) = said(caplog)
    todo = config if method == "todo" else config.todo
    settings = {"max_kv_tokens": 4096 if todo is None else todo.max_kv_tokens}
    if method != "todo":
        settings |= {"schedule": "v1" if config.prune_ratio == 0 else "coco", "prune_ratio": config.prune_ratio}
    assert len(by_size(text)) == 3
    for size, verdict in by_size(text).items():
        side = 8 * int(size.split(" x ")[0])
        _, rows = advise(tiny(unet), Rates(1, 1), methods=f"dense,{method}", height=side, width=side, **settings)
        row = rows[method]
        gain = f"{row['operations_gain']:.2f}"
        operations = f"{gain} times fewer operations"
        expected = row["verdict"].replace(f"{gain}x predicted ({operations})", operations)
        expected = expected.replace(f"({gain}x predicted)", f"({operations})")
        assert verdict == expected.replace("of the time", "of the operations")
        assert ("this will not help here" in verdict) == (not row["helps"])


def test_each_size_is_said_where_it_never_helps(shells, caplog):
    caplog.set_level(logging.INFO, "todo_attn")
    apply_todo(shells["sdxl"], ToDoConfig(factor=1))
    remove_todo(shells["sdxl"])
    ((_, text),) = said(caplog)
    found = by_size(text)
    assert list(found) == ["128 x 128", "256 x 256", "512 x 512"]
    assert all(one.startswith("this will not help here: the factor is 1 at every level") for one in found.values())


def test_a_pipelines_sizes_are_pixels(pipe, caplog):
    caplog.set_level(logging.INFO, "todo_attn")
    apply_todo(pipe)
    ((_, text),) = said(caplog)
    assert text.startswith("ToDo, by width x height in pixels: 32 x 32: this will not help here: ")


def test_a_range_of_timesteps_is_said(shells, caplog):
    caplog.set_level(logging.INFO, "todo_attn")
    apply_todo(shells["sd15"], ToDoConfig(timestep_range=(200, 1000)))
    remove_todo(shells["sd15"])
    assert said(caplog)[0][1].startswith("ToDo, in a call at a timestep of its range, by width x height in latents: ")


def test_dato_says_what_a_run_gains(shells, caplog):
    caplog.set_level(logging.INFO, "todo_attn")
    apply_dato(shells["sd15"], DaToConfig.preset("coco"))
    remove_dato(shells["sd15"])
    ((level, text),) = said(caplog)
    assert level == "INFO"
    assert text.startswith("DaTo, in a run of 51 calls (5 full, 21 shallow, 25 reused), by width x height in latents: ")
    assert by_size(text)["64 x 64"] == "8.50 times fewer operations"


def test_both_together_are_one_line(shells, caplog):
    """Which says where ToDo has no part in it."""
    caplog.set_level(logging.INFO, "todo_attn")
    apply_dato(shells["sd15"], DaToConfig.preset("coco", todo=ToDoConfig()))
    remove_dato(shells["sd15"])
    ((_, text),) = said(caplog)
    found = by_size(text)
    assert found["64 x 64"].startswith(
        "8.50 times fewer operations, to which ToDo adds nothing: nothing is downsampled"
    )
    assert found["128 x 128"] == "10.41 times fewer operations"


@pytest.mark.parametrize("attention", [1e9, 1e15])
def test_rates_that_are_known_are_used(unet, caplog, attention):
    """Nothing is run for them: another machine's, or those of another kind of attention, do not count."""
    caplog.set_level(logging.INFO, "todo_attn")
    heads = advice.finest_heads(unet)
    rates = Rates(attention, 1e9)
    advice.remember_rates(torch.device("cpu"), torch.float16, *heads, rates)
    advice.remember_rates(torch.device("cpu"), torch.float32, heads[0] + 1, heads[1], rates)
    apply_todo(unet, ToDoConfig(factor=2))
    assert "predicted" not in said(caplog)[0][1].lower()
    advice.remember_rates(torch.device("cpu"), torch.float32, *heads, rates)
    apply_todo(unet, ToDoConfig(factor=2))
    text = said(caplog)[1][1]
    side = unet.config.sample_size
    dense, (todo,) = advice.run_work(unet, (side, side), ToDoConfig(factor=2))
    predicted = rates.seconds(dense) / rates.seconds(todo)
    assert (predicted >= 1.05) == (attention == 1e9)
    verdict = text.partition("latents: ")[2].partition("; ")[0]
    assert f"{predicted:.2f}x predicted" in verdict
    assert ("this will not help here: self-attention takes only" in verdict) == (attention == 1e15)
    assert "Predicted by rates measured before" in text


def test_nothing_is_run_to_say_it(unet, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "todo_attn")
    monkeypatch.setattr(type(unet), "forward", None)
    monkeypatch.setattr(probes, "measure_rates", None)
    apply_todo(unet)
    apply_dato(unet)
    assert len(said(caplog)) == 2


def test_by_default_the_first_call_alone_warns(unet, caplog):
    apply_todo(unet)
    assert not said(caplog)
    for _ in range(2):
        unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 8))
    ((level, text),) = said(caplog)
    assert level == "WARNING" and "changes nothing at this size" in text


def test_dato_that_does_nothing_warns(unet, caplog):
    apply_dato(unet, DaToConfig(prune_ratio=0, cache_schedule="22"))
    ((level, text),) = said(caplog)
    assert level == "WARNING" and "this will not help here" in text
    apply_dato(unet, DaToConfig(prune_ratio=(0.0, 0.1)))
    assert len(said(caplog)) == 1


def test_without_the_level_nothing_is_counted(unet, monkeypatch, caplog):
    monkeypatch.setattr(advice, "operations_by_module", None)
    apply_todo(unet)
    apply_dato(unet, DaToConfig())
    assert not said(caplog)


def test_a_model_that_does_not_say_its_size(make_controlnet, caplog):
    caplog.set_level(logging.INFO, "todo_attn")
    apply_todo(make_controlnet())
    assert not said(caplog)


def test_of_a_video_model_nothing_is_said(caplog):
    """Its frames are in no layer's shape; and what is said must never keep ToDo from being applied."""
    video = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    caplog.set_level(logging.INFO, "todo_attn")
    apply_todo(video)
    assert not said(caplog)
    assert any(isinstance(module, ToDoProcessor) for module in video.attn_processors.values())


# doctor --model


@pytest.fixture
def advise(monkeypatch):
    """advise(model, height=..., ...) -> what is found, on a machine of ``CPU_RATES`` or of ``rates``."""

    def advise(model, rates=CPU_RATES, measured=False, **settings):
        monkeypatch.setattr(gains, "measure_rates", lambda *args: rates)
        settings = CompareSettings(**{"methods": "dense,todo,dato,todo+dato", "steps": 50, "device": "cpu", **settings})
        found = gains.build_advice(model, settings, measured=measured)
        return found, {row["method"]: row for row in found["methods"]}

    return advise


def known(name):
    return Architecture(name, CONFIGS[name])


def test_stable_diffusion_at_512(advise):
    found, rows = advise(known("sd15"), methods="dense,todo")
    assert (found["height"], found["width"], found["calls"]) == (512, 512, 51)
    todo = rows["todo"]
    assert todo["predicted_gain"] == todo["operations_gain"] == pytest.approx(1, abs=0.001)
    assert not todo["helps"] and todo["verdict"].startswith(
        "this will not help here: nothing is downsampled, no level having more than max_kv_tokens=4096 tokens"
    )
    _, rows = advise(known("sd15"), methods="dense,todo", max_kv_tokens=1024)
    assert rows["todo"]["helps"] and rows["todo"]["predicted_gain"] > 1.1


@pytest.mark.parametrize(("size", "cap", "measured"), [(1024, 4096, 1.614), (1024, 1024, 2.047), (2048, 4096, 3.707)])
def test_the_prediction_is_near_what_was_measured(advise, size, cap, measured):
    """On two cores of an EPYC (benchmarks/results), with the rates that its dense call at 1024 x 1024 tells."""
    _, rows = advise(known("sd15"), methods="dense,todo", height=size, width=size, max_kv_tokens=cap)
    assert rows["todo"]["predicted_gain"] == pytest.approx(measured, rel=0.1)


def test_sdxl_at_its_normal_size(advise):
    found, rows = advise(known("sdxl"), methods="dense,todo")
    assert (found["height"], found["width"]) == (1024, 1024)
    assert not rows["todo"]["helps"] and "nothing is downsampled" in rows["todo"]["verdict"]


def tiny(unet):
    return Architecture("tiny", unet.config, pixels_per_latent=8)


def test_a_small_share_is_said(advise, unet):
    _, rows = advise(tiny(unet), Rates(1e15, 1e9), height=128, width=128, methods="dense,todo", factor="2")
    assert not rows["todo"]["helps"]
    assert "this will not help here: self-attention takes only " in rows["todo"]["verdict"]


def test_a_machine_that_cannot_start_operations_fast_enough(advise, unet):
    rates = Rates(1e15, 1e15, launch=1e-3, overlaps=True)
    _, rows = advise(tiny(unet), rates, height=256, width=256, methods="dense,todo", factor="2")
    assert not rows["todo"]["helps"]
    assert "starting the operations one by one takes longer than computing them" in rows["todo"]["verdict"]


def test_pruning_next_to_nothing(advise, unet, tmp_path):
    schedule.save(schedule.Schedule(name="full", digits="2"), tmp_path / "full.json")
    settings = {"schedule": str(tmp_path / "full.json"), "prune_ratio": 0.01, "height": 128, "width": 128}
    _, rows = advise(tiny(unet), **settings, methods="dense,dato")
    assert not rows["dato"]["helps"]
    assert "this will not help here: choosing tokens takes more operations than it saves" in rows["dato"]["verdict"]


def test_both_where_todo_adds_nothing(advise):
    """At the model's normal size; above it, it does."""
    _, rows = advise(known("sd15"))
    assert rows["todo+dato"]["helps"] and rows["todo+dato"]["todo_helps"] is False
    assert rows["dato"]["verdict"] in rows["todo+dato"]["verdict"]
    assert rows["todo+dato"]["verdict"].endswith(
        ", to which ToDo adds nothing: nothing is downsampled, no level having more than max_kv_tokens=4096 tokens at "
        "this size"
    )
    assert rows["dato"]["todo_helps"] is rows["todo"]["todo_helps"] is None
    _, rows = advise(known("sd15"), height=1024, width=1024)
    assert rows["todo+dato"]["todo_helps"] and "ToDo" not in rows["todo+dato"]["verdict"]


def test_both_where_todo_alone_is_faster(advise):
    """Above some size DaTo's search, which compares tokens in pairs, costs more than all that is left to save."""
    _, rows = advise(known("sd15"), height=16384, width=16384)
    assert rows["todo+dato"]["predicted_gain"] < rows["todo"]["predicted_gain"]
    assert rows["todo+dato"]["dato_helps"] is False and rows["dato"]["dato_helps"] is None
    less = "less than ToDo alone: at this size choosing tokens takes more than it saves"
    assert rows["todo+dato"]["verdict"].endswith(less)
    _, rows = advise(known("sd15"), height=1024, width=1024)
    assert rows["todo+dato"]["dato_helps"] and "ToDo" not in rows["todo+dato"]["verdict"]


def test_a_call_that_finds_no_memory_is_no_fault_of_the_option(advise, unet, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    unet.save_pretrained(tmp_path / "unet")
    model = Architecture(str(tmp_path), unet.config, pixels_per_latent=8)
    monkeypatch.setattr(timing._Calls, "__call__", full)
    with pytest.raises(MemoryError, match="DefaultCPUAllocator"):
        advise(model, measured=True, height=128, width=128)


def test_both_without_dato_alone(advise):
    """It is counted beside them, and not told."""
    _, rows = advise(known("sd15"), methods="dense,todo+dato")
    assert list(rows) == ["todo+dato"]
    assert "ToDo adds nothing" in rows["todo+dato"]["verdict"]


def test_measured(advise, unet, tmp_path, caplog):
    unet.save_pretrained(tmp_path / "unet")
    model = Architecture(str(tmp_path), unet.config, pixels_per_latent=8)
    found, rows = advise(model, measured=True, height=128, width=128)
    assert found["dense"]["measured_seconds"] > 0
    for row in rows.values():
        assert row["measured_gain"] == pytest.approx(found["dense"]["measured_seconds"] / row["measured_seconds"])
        assert "x measured" in row["verdict"]
        # A clock may say anything of what changes nothing.
        assert row["helps"] == (row["measured_gain"] >= 1.05 and row["operations_gain"] > 1)
    # ToDo at its default cap changes nothing here, and that is no warning: it is the answer.
    assert not said(caplog)


def test_measured_once_where_it_takes_long(advise, unet, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_LONG", 0)
    unet.save_pretrained(tmp_path / "unet")
    model = Architecture(str(tmp_path), unet.config, pixels_per_latent=8)
    calls = []
    medians = timing._Calls.medians
    monkeypatch.setattr(
        timing._Calls, "medians", lambda self, warmup: calls.append(self.seconds) or medians(self, warmup)
    )
    _, rows = advise(model, measured=True, height=128, width=128)
    assert [{kind: len(times) for kind, times in each.items()} for each in calls] == [
        {"2": 1},
        {"2": 1},
        {"2": 1, "1": 1, "0": 1},
        {"2": 1, "1": 1, "0": 1},
    ]
    assert rows["dato"]["measured_gain"] > 0


def test_rates_of_this_machine(monkeypatch):
    monkeypatch.setattr(probes, "_SECONDS", 0)
    monkeypatch.setattr(probes, "_CPU_SIDE", 8)
    state = torch.get_rng_state()
    rates = probes.measure_rates(torch.device("cpu"), torch.float32, heads=2, head_dim=8, batch=1)
    assert rates.attention > 1e6 and rates.other > 1e6 and 1e-7 < rates.launch < 1 and not rates.overlaps
    assert list(advice._RATES.values()) == [rates]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_few_launches_are_counted(unet):
    """Each attention is one, and so is each convolution; views are none."""
    dense = real(unet, ToDoConfig())[0].full
    modules = [m for m in unet.modules() if not list(m.children())]
    assert 0.5 * len(modules) < dense.launches < 4 * len(modules)
    assert dense == Work(dense.attention, dense.other, dense.launches)


def test_silence_ends():
    with logs.silent():
        assert logs.logger.disabled
    assert not logs.logger.disabled
