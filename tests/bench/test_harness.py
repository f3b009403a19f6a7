"""The harness's order, arithmetic and rows, with a clock that runs only when a candidate is called."""

import json

import pytest
import torch

from todo_attn.bench import harness, jsonl, report
from todo_attn.bench.harness import Candidate, Meter, Rounds, Sample

CASE = {"model": "sd15", "height": 64, "width": 64, "batch": 1, "dtype": "fp32"}
ROW_KEYS = {"benchmark", "case", "baseline", "contender", "speedup", "measured", "machine"}
CANDIDATE_KEYS = {"name", "seconds", "samples", "peak_gib", "error"}


class Bench:
    """Candidates that take given seconds a call, on a clock of their own, and the order in which they were called."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def candidate(self, name, seconds, output=0, **info):
        times = iter(seconds)

        def call():
            self.order.append(name)
            self.now += next(times)
            return output

        return Candidate(name, lambda: call, info)

    def meter(self, call):
        start = self.now
        output = call()
        return Sample(output, self.now - start, len(self.order) * 2**30)

    def measure(self, candidates, rounds, check=None):
        return harness.measure(candidates, self.meter, rounds, check=check, clock=lambda: self.now)


def rows(results):
    return harness.compare("test", CASE, {"device": "none"}, results)


def failing(message="no such peer"):
    raise ModuleNotFoundError(message)


def test_rounds_alternate_in_mirrored_order():
    bench = Bench()
    candidates = [bench.candidate(name, [1.0] * 5) for name in "abc"]
    bench.measure(candidates, Rounds(warmup=2, rounds=3))
    assert "".join(bench.order) == "abcabcabccbaabc"


def test_warm_up_is_not_timed():
    bench = Bench()
    baseline, contender = bench.measure(
        [bench.candidate("a", [100.0, 4.0, 6.0]), bench.candidate("b", [100.0, 2.0, 2.0])], Rounds(warmup=1, rounds=2)
    )
    assert baseline.seconds == [4.0, 6.0]
    assert contender.seconds == [2.0, 2.0]


def test_speedup_is_the_ratio_within_each_round():
    bench = Bench()
    candidates = [
        bench.candidate("dense", [0, 2, 40, 6], kind="d"),
        bench.candidate("todo", [0, 1, 10, 2]),
        bench.candidate("x", [1] * 4),
    ]
    first, second = rows(bench.measure(candidates, Rounds(warmup=1, rounds=3)))
    assert (first["baseline"]["name"], first["contender"]["name"]) == ("dense", "todo")
    assert second["contender"]["name"] == "x"
    assert first["speedup"] == harness.quantiles([2, 4, 3])
    assert first["speedup"]["p50"] == 3
    assert first["baseline"]["seconds"] == harness.quantiles([2, 40, 6])
    assert first["baseline"]["kind"] == "d"


def test_quantiles_are_interpolated():
    assert harness.quantiles(range(11)) == {"p20": 2, "p50": 5, "p80": 8}
    assert harness.quantiles([1, 2]) == pytest.approx({"p20": 1.2, "p50": 1.5, "p80": 1.8})
    assert harness.quantiles([3]) == {"p20": 3, "p50": 3, "p80": 3}


@pytest.mark.parametrize(("budget", "expected"), [(0, 2), (7, 2), (9, 3), (float("inf"), 5)])
def test_the_budget_ends_the_rounds_but_leaves_two(budget, expected):
    bench = Bench()
    results = bench.measure([bench.candidate(name, [2.0] * 6) for name in "ab"], Rounds(1, 5, budget))
    assert [len(result.seconds) for result in results] == [expected, expected]


def test_peak_memory_is_the_largest_of_the_timed_samples():
    bench = Bench()
    baseline, contender = bench.measure([bench.candidate(name, [1.0] * 3) for name in "ab"], Rounds(warmup=1, rounds=2))
    assert (baseline.row()["peak_gib"], contender.row()["peak_gib"]) == (6.0, 5.0)  # of the order ab ab ba


def test_a_row_is_json_and_names_everything(tmp_path):
    bench = Bench()
    candidates = [bench.candidate("a", [1.0] * 3), bench.candidate("b", [1.0] * 3, factor=2)]
    (row,) = rows(bench.measure(candidates, Rounds(warmup=1, rounds=2)))
    assert set(row) == ROW_KEYS
    assert set(row["baseline"]) == CANDIDATE_KEYS
    assert set(row["contender"]) == CANDIDATE_KEYS | {"factor"}
    path = tmp_path / "deep" / "rows.jsonl"
    jsonl.append(path, [row])
    jsonl.append(path, [row, row])
    assert jsonl.read(path) == [json.loads(json.dumps(row))] * 3


def test_a_torn_line_costs_no_other_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.append(path, [{"a": 1}])
    with path.open("a") as file:
        file.write('{"b": [1, ')  # a run that was killed as it wrote
    jsonl.append(path, [{"c": 1}, {"d": 1}])
    jsonl.append(path, [{"e": 1}])
    with pytest.warns(UserWarning, match=r"rows.jsonl, line 2: not a row, skipped"):
        assert jsonl.read(path) == [{"a": 1}, {"c": 1}, {"d": 1}, {"e": 1}]


@pytest.mark.parametrize("line", [b"\0\0\0\n", b"\xff\n", b"[1]\n", b"7"])
def test_what_is_no_row_is_skipped_with_a_warning(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line)
    with pytest.warns(UserWarning, match="line 3: not a row"):
        assert jsonl.read(path) == [{"a": 1}]


def test_a_row_that_cannot_be_written_leaves_no_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="Out of range float"):
        jsonl.append(path, [{"a": 1}, {"b": float("nan")}])
    assert not path.exists()


def test_where_rows_can_be_added_to(tmp_path):
    (tmp_path / "rows").write_text("torn")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "rows")
    paths = [tmp_path / "rows", tmp_path / "new", tmp_path / "deep" / "er" / "new", tmp_path / "link"]
    for path in paths:
        jsonl.check_appendable(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "rows"]
    assert paths[0].read_text() == "torn"
    for path in paths:
        jsonl.append(path, [{}])


def test_where_rows_cannot_be_added_to(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in [
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "rows", "Not a directory"),
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "loop", ""),
    ]:
        with pytest.raises(ValueError) as refused:
            jsonl.check_appendable(path)
        start = f"out must be a file that can be written, got {str(path)!r}: "
        assert str(refused.value).startswith(start + reason)
    assert (tmp_path / "file").read_bytes() == b""


def test_a_side_that_cannot_be_built_ends_only_its_row():
    bench = Bench()
    candidates = [bench.candidate("a", [2.0] * 3), Candidate("absent", failing), bench.candidate("b", [1.0] * 3)]
    absent, row = rows(bench.measure(candidates, Rounds(warmup=1, rounds=2)))
    assert absent["contender"]["error"] == "ModuleNotFoundError: no such peer"
    assert absent["contender"]["seconds"] is None
    assert absent["speedup"] is None
    assert absent["baseline"]["samples"] == [2.0, 2.0]
    assert row["contender"]["error"] is None
    assert row["speedup"]["p50"] == 2


def test_a_side_that_fails_midway_keeps_what_it_measured():
    bench = Bench()
    candidates = [bench.candidate("a", [2.0] * 4), bench.candidate("b", [1.0] * 2), bench.candidate("c", [1.0] * 4)]
    broken, whole = rows(bench.measure(candidates, Rounds(warmup=1, rounds=3)))
    assert broken["contender"]["samples"] == [1.0]
    assert broken["contender"]["error"] == "StopIteration"
    assert broken["speedup"] is None
    assert whole["speedup"]["p50"] == 2


def test_a_failing_baseline_leaves_rows_that_say_so():
    bench = Bench()
    candidates = [
        Candidate("a", lambda: lambda: failing("out of memory\nTried to allocate")),
        bench.candidate("b", [1.0] * 3),
    ]
    (row,) = rows(bench.measure(candidates, Rounds(warmup=1, rounds=2), check=pytest.fail))
    assert row["baseline"]["error"] == "ModuleNotFoundError: out of memory"
    assert row["contender"]["samples"] == [1.0, 1.0]
    assert row["speedup"] is None
    assert "out of memory" in report.table([row])


def test_outputs_are_checked_before_anything_is_timed():
    def check(expected, output):
        seen.append((expected, output))
        if output != expected:
            raise ValueError(f"{output} is not {expected}")

    seen, bench = [], Bench()
    candidates = [
        bench.candidate("a", [1.0] * 4, 7),
        bench.candidate("wrong", [1.0] * 4, 8),
        bench.candidate("b", [1.0] * 4, 7),
    ]
    wrong, right = rows(bench.measure(candidates, Rounds(warmup=2, rounds=2), check))
    assert seen == [(7, 7), (7, 8), (7, 7)]
    assert wrong["contender"]["error"] == "ValueError: 8 is not 7"
    assert wrong["contender"]["samples"] == []
    assert right["speedup"] is not None
    assert bench.order.count("wrong") == 1


def test_what_cannot_be_compared_is_refused():
    bench = Bench()
    with pytest.raises(ValueError, match="candidates must be a baseline and at least one contender"):
        bench.measure([bench.candidate("alone", [1.0])], Rounds())
    with pytest.raises(ValueError, match="warmup must be at least 1"):
        bench.measure([bench.candidate(name, [1.0]) for name in "ab"], Rounds(warmup=0), check=print)


def test_an_interrupt_is_not_a_failing_side():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bench().measure([Candidate("a", lambda: interrupt), Candidate("b", lambda: interrupt)], Rounds())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_meter_calls_and_averages(device):
    calls = []

    def call():
        calls.append(None)
        return torch.ones(2**18, device=device)

    sample = Meter(torch.device(device), calls=3)(call)
    assert len(calls) == 3
    assert sample.seconds > 0
    assert sample.output.shape == (2**18,)
    assert sample.peak_bytes is None if device == "cpu" else sample.peak_bytes >= 2**20


def test_a_meter_takes_its_inputs_in_turn(monkeypatch):
    bench, seen = Bench(), []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: bench.now)

    def call(number):
        seen.append(number)
        bench.now += number
        return 10 * number

    sample = Meter(torch.device("cpu"), calls=2, inputs=(1, 2, 6), alone=True)(call)
    assert seen == [1, 2, 6, 1, 2, 6]
    assert sample.seconds == 3
    assert sample.output == 60


def test_a_device_is_held_for_a_few_calls_at_a_time(monkeypatch):
    """While it is held the host queues them; it would not be done with all of them, and a GPU's queue has an end."""
    done, ran = [], []
    monkeypatch.setattr(harness, "stamp", lambda device: float(len(ran)))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda ticks: done.append(len(ran)))
    sample = Meter(torch.device("cuda"), inputs=range(10), alone=True)(ran.append)
    assert done == [0, 4, 8]
    assert ran == list(range(10))
    assert sample.seconds == 1


@pytest.mark.gpu
def test_a_meter_counts_what_the_calls_take_alone():
    held = torch.ones(2**22, device="cuda")
    sample = Meter(held.device, inputs=(held, held), alone=True)(lambda x: x[: 2**18] + 1)
    assert 2**20 <= sample.peak_bytes < 2**22
    assert 0 < sample.seconds < 5e-3  # not the 10 ms for which the device is held


def test_a_side_checks_itself_before_it_is_timed():
    def check(output):
        seen.append(output)
        if output != 7:
            raise ValueError(f"{output} is not 7")

    seen, bench = [], Bench()
    candidates = [
        bench.candidate("a", [1.0] * 4, 7),
        bench.candidate("wrong", [1.0] * 4, 8),
        bench.candidate("b", [1.0] * 4, 9),
    ]
    candidates[0].check = candidates[1].check = check
    wrong, right = rows(bench.measure(candidates, Rounds(warmup=2, rounds=2)))
    assert seen == [7, 8]
    assert wrong["contender"]["error"] == "ValueError: 8 is not 7"
    assert wrong["contender"]["samples"] == []
    assert right["speedup"] is not None
    with pytest.raises(ValueError, match="warmup must be at least 1"):
        bench.measure(candidates, Rounds(warmup=0))
