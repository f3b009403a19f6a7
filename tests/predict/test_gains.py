"""What ToDo and DaTo gain on a machine: ``doctor --model``, and what is counted for it."""

import pytest
import torch

from todo_attn import ToDoConfig, logs
from todo_attn.config import schedule
from todo_attn.models.architectures import CONFIGS, Architecture
from todo_attn.options.methods import SettingError
from todo_attn.options.settings import CompareSettings
from todo_attn.predict import gains, timing
from todo_attn.predict import rates as probes
from todo_attn.predict.count import count_self_attention, count_work
from todo_attn.predict.model import Rates, Work

SIZE = (12, 17)
COUNTED: dict = {}
CPU_RATES = Rates(attention=125e9, other=203e9, launch=2e-5)


def said(caplog):
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "todo_attn"]


def test_self_attention_is_counted_with_its_projections(unet):
    """Of every level, by hand: two products of all scores, four projections of all tokens."""
    work = count_self_attention(unet.config, *SIZE, batch=2, pixels_per_latent=1)
    attention = other = 0
    for name, attn in unet.named_modules():
        if not name.endswith(".attn1"):
            continue
        block, number = name.split(".")[0], int(name.split(".")[1]) if name[0] != "m" else 0
        level = {"down_blocks": 2**number, "up_blocks": 4 // 2**number, "mid_block": 4}[block]
        tokens = -(-SIZE[0] // level) * -(-SIZE[1] // level)
        attention += 2 * 4 * tokens**2 * attn.inner_dim
        other += 2 * 4 * 2 * tokens * attn.query_dim * attn.inner_dim
    assert (work.attention, work.other) == (attention, other)


@pytest.fixture
def advise(monkeypatch):
    """advise(model, height=..., ...) -> what is found, on a machine of ``CPU_RATES`` or of ``rates``."""

    def counted(config, height, width, configs, *rest):
        """Counting a large UNet takes seconds, so each question is asked once."""
        key = id(config), height, width, tuple(configs), *rest
        if key not in COUNTED:
            COUNTED[key] = config, count_work(config, height, width, configs, *rest)
        return COUNTED[key][1]

    def advise(model, rates=CPU_RATES, measured=False, **settings):
        monkeypatch.setattr(gains, "measure_rates", lambda *args: rates)
        monkeypatch.setattr(gains, "count_work", counted)
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


def test_a_ratio_for_each_call_is_refused(advise, unet, tmp_path):
    schedule.save(schedule.Schedule("12", prune_ratio=(0.1, 0.2, 0.3)), tmp_path / "mine.json")
    settings = {"schedule": str(tmp_path / "mine.json"), "height": 128, "width": 128, "methods": "dense,dato"}
    with pytest.raises(SettingError, match="schedule must have one prune ratio for all calls"):
        advise(tiny(unet), **settings)
    _, rows = advise(tiny(unet), **settings, prune_ratio=0.3)
    assert rows["dato"]


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
    monkeypatch.setattr(timing.Run, "__call__", full)
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
    medians = timing.CallTimes.medians

    def counted(self, skip):
        calls.append((self.kinds, len(self.runs) - skip))
        return medians(self, skip)

    monkeypatch.setattr(timing.CallTimes, "medians", counted)
    _, rows = advise(model, measured=True, height=128, width=128)
    assert calls == [("2", 1), ("2", 1), ("210", 1), ("210", 1)]
    assert rows["dato"]["measured_gain"] > 0


def test_rates_of_this_machine(monkeypatch):
    monkeypatch.setattr(probes, "_SECONDS", 0)
    monkeypatch.setattr(probes, "_CPU_SIDE", 8)
    state = torch.get_rng_state()
    rates = probes.measure_rates(torch.device("cpu"), torch.float32, heads=2, head_dim=8, batch=1)
    assert rates.attention > 1e6 and rates.other > 1e6 and 1e-7 < rates.launch < 1 and not rates.overlaps
    assert torch.equal(torch.get_rng_state(), state)


def test_a_few_launches_are_counted(unet):
    """Each attention is one, and so is each convolution; views are none."""
    dense = count_work(unet, *SIZE, [ToDoConfig()], batch=1, pixels_per_latent=1)[0].full
    modules = [m for m in unet.modules() if not list(m.children())]
    assert 0.5 * len(modules) < dense.launches < 4 * len(modules)
    assert dense == Work(dense.attention, dense.other, dense.launches)


def test_silence_ends():
    with logs.silent():
        assert logs.logger.disabled
    assert not logs.logger.disabled
