"""Cache schedules: the published ones, files that are none, and resampling."""

import itertools
import json
import random
from fractions import Fraction
from pathlib import Path

import pytest

from todo_attn.config import schedule
from todo_attn.config.schedule import Schedule
from todo_attn.config.todo import ToDoConfig

COCO = "11110110110112100011010200000010101200000010120101"


def published():
    return [name for name in schedule.names() if schedule.load(name).published_speedup]


def test_the_published_schedules():
    names = published()
    assert schedule.names()[: len(names)] == names
    schedules = [schedule.load(name) for name in names]
    assert len(schedules) == len(set(names)) == len({s.digits for s in schedules}) == 115
    for name, found in zip(names, schedules, strict=True):
        assert found.name == name and found.source and found.published_speedup > 1
        assert (found.steps, found.scheduler, found.calls) == (50, "PNDM", 51)
        assert found.full + found.shallow + found.reuse == 51


@pytest.mark.parametrize(
    ("name", "digits", "speedup"),
    [
        ("coco", COCO, 7.31),
        ("search", "01111121111111002111021011111200111111112111111111", 5.33),
        ("run7-fast", "01000000110201102110020100011100101011111200100111", 7.22),
        ("run7-careful", "11111111111221111112111111111111110212111211111121", 4.27),
        ("v0", "11111121111111111201010120101111110211110101101111", 6.02),
        ("v1", "11110121111110120101101120100101101201110111111111", 6.23),
        ("v2", "11111120211111201001011010201101011111101010111111", 6.30),
        ("v3", "11120111211111120111111111120101111111111111111111", 5.70),
        ("v4", "11110120201111110201110111111120110101110111111111", 6.09),
        ("v5", "11111211100201210111010201101102011101111101101001", 5.78),
        ("v7", "11011110202101120011110111012111111111000111110111", 6.23),
    ],
)
def test_schedules_with_a_name_of_their_own(name, digits, speedup):
    assert schedule.names().index(name) < 11
    found = schedule.load(name)
    assert found.digits == digits
    assert found.published_speedup == pytest.approx(speedup, abs=0.006)


def test_published_costs_are_those_of_the_published_code():
    """Of Stable Diffusion 1.5 at 512 px, in units of 1e9: its shallow calls compute the middle block too."""
    full, shallow, reuse = 1606.55, 126.50 + 24.20, 0.19
    for name in published():
        s = schedule.load(name)
        counted = 51 * full / (s.full * full + s.shallow * shallow + s.reuse * reuse)
        assert s.published_speedup == pytest.approx(counted, abs=0.006), name


@pytest.mark.parametrize(("name", "calls"), [("landscapes-25", 25), ("landscapes-20", 20), ("landscapes-8", 8)])
def test_the_schedules_that_were_found_here(name, calls):
    """They say how, and name no level that another UNet may lack."""
    assert name in schedule.named()
    found = schedule.load(name)
    assert (found.name, found.calls, found.steps, found.scheduler) == (name, calls, calls, "DDIM")
    assert found.prune_ratio is not None and set(found.todo.factor) == {"finest"}
    assert found.source.startswith("todo-attn search on landscapes; speed-up by operations: ")
    search = found.provenance["search"]
    assert (search["steps"], search["metric"], search["calls"]) == (calls, "psnr", calls)
    assert found.provenance["figures"]["dense_cost"] > 2 * found.provenance["figures"]["cost"]


def test_counts():
    found = Schedule("2110")
    assert (found.calls, found.full, found.shallow, found.reuse) == (5, 2, 2, 1)


FULL_SCHEDULE = Schedule("0212", "mine", "by hand", 5, "DDIM", 1.5)
FOUND = Schedule(
    "01", prune_ratio=(0.0, 0.2, 0.4), todo=ToDoConfig({1: 2, 2: 4}), provenance={"metric": "psnr", "seeds": [0, 1]}
)


@pytest.mark.parametrize("given", [Schedule("1"), FULL_SCHEDULE, FOUND], ids=["digits-only", "all", "found"])
def test_file_round_trip(given, tmp_path):
    assert Schedule.from_dict(given.to_dict()) == given == schedule.loads(schedule.dumps(given))
    schedule.save(given, tmp_path / "x.json")
    assert schedule.load(tmp_path / "x.json") == schedule.load(str(tmp_path / "x.json")) == given
    assert len({given, schedule.load(tmp_path / "x.json")}) == 1


def test_a_file_is_readable_json():
    assert json.loads(schedule.dumps(FULL_SCHEDULE)) == {
        "version": 1,
        "digits": "0212",
        "name": "mine",
        "source": "by hand",
        "steps": 5,
        "scheduler": "DDIM",
        "published_speedup": 1.5,
    }


NOT_SCHEDULES = {
    "no-json": (b"11110110", "it must be a JSON object, got int"),
    "empty": (b"", "it must be JSON"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00", "codec can't decode"),
    "cut-off": (b'{"version": 1, "digits": "11', "it must be JSON"),
    "deep": (b"[" * 200_000, "it must be JSON"),
    "list": (b"[]", "it must be a JSON object, got list"),
    "text": (b'"1120"', "it must be a JSON object, got str"),
    "null": (b"null", "it must be a JSON object, got NoneType"),
    "no-version": (b'{"digits": "11"}', "version must be 1, got None"),
    "other-version": (b'{"version": 2, "digits": "11"}', "version must be 1, got 2"),
    "true-version": (b'{"version": true, "digits": "11"}', "version must be 1, got True"),
    "no-digits": (b'{"version": 1, "name": "x"}', r"data must have digits, got only \['name'\]"),
    "no-schedule-digits": (b'{"version": 1, "digits": ""}', "digits must have .*, got an empty string"),
    "other-digits": (b'{"version": 1, "digits": "1103"}', "digits must be of .*, got '3' at position 3"),
    "number": (b'{"version": 1, "digits": 1102}', "digits must be a string of .*, got 1102"),
    "unknown-key": (b'{"version": 1, "digits": "1", "depth": 2}', r"only the keys .*, got \['depth'\]"),
    "name": (b'{"version": 1, "digits": "1", "name": 3}', "name must be a string, got 3"),
    "steps": (b'{"version": 1, "digits": "1", "steps": 0}', "steps must be an integer .*, got 0"),
    "scheduler": (b'{"version": 1, "digits": "1", "scheduler": 3}', "scheduler must be a string or None, got 3"),
    "speedup": (b'{"version": 1, "digits": "1", "published_speedup": -1}', "published_speedup must .*, got -1"),
    "nan": (b'{"version": 1, "digits": "1", "published_speedup": NaN}', "published_speedup must .*, got nan"),
    "collection": (b'{"version": 1, "schedules": []}', r"only the keys .*, got \['schedules'\]"),
}


@pytest.mark.parametrize(("content", "message"), NOT_SCHEDULES.values(), ids=NOT_SCHEDULES)
def test_a_file_that_is_no_schedule_is_named_with_what_was_wrong(content, message, tmp_path):
    path = tmp_path / "odd name.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"odd name.json is not a schedule: .*({message})"):
        schedule.load(path)


def test_what_is_not_there_or_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"gone.json cannot be read: No such file"):
        schedule.load(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        schedule.load(tmp_path)
    with pytest.raises(ValueError, match=r"schedule must be a file or a name such as 'search'.*, got 'serch'"):
        schedule.load("serch")
    with pytest.raises(ValueError, match=r"got 'gone\.json'"):
        schedule.load("gone.json")


def test_a_name_comes_before_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule.save(Schedule("1"), "coco")
    assert schedule.load("coco").digits == COCO
    assert schedule.load(Path("coco")).digits == "1"


# Every short schedule, and long ones.
SHORT = ["".join(digits) for length in (1, 2, 3, 4) for digits in itertools.product("012", repeat=length)]
LONG = [COCO, "2" * 9, "12" * 25, "0" * 20 + "2" + "1" * 29]


@pytest.mark.parametrize("digits", LONG)
def test_the_same_length_is_the_same_schedule(digits):
    assert schedule.resample(digits, len(digits)) == digits


def test_the_same_length_is_the_same_schedule_for_all_short_ones():
    assert all(schedule.resample(digits, len(digits)) == digits for digits in SHORT)


def owed(digits, kind, moment):
    """How many calls of ``kind`` the schedule has had at ``moment``, from 0 to 1 of the run, in calls of its own."""
    calls, rest = divmod(moment * len(digits), 1)
    return digits[: int(calls)].count(kind) + (rest if digits[int(calls) : int(calls) + 1] == kind else 0)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 10, 20, 25, 49, 51, 77, 100, 1000])
def test_shares_hold_at_every_moment(length):
    draw = random.Random(length)
    drawn = ["".join(draw.choices("012", k=draw.randint(1, 60))) for _ in range(8)]
    for digits in LONG + drawn + SHORT[length % 7 :: 7]:
        resampled = schedule.resample(digits, length)
        assert len(resampled) == length and set(resampled) <= set(digits), digits
        scale = Fraction(length, len(digits))
        for calls in range(length + 1) if length < 200 else (length,):
            for kind, bound in (("2", Fraction(1, 2)), ("1", Fraction(5, 4)), ("0", Fraction(5, 4))):
                share = owed(digits, kind, Fraction(calls, length)) * scale
                assert abs(resampled[:calls].count(kind) - share) <= bound, (digits, resampled, kind)


def test_full_calls_are_as_many_as_their_share_rounds_to():
    for length in range(1, 120):
        resampled = schedule.resample(COCO, length)
        assert resampled.count("2") == int(Fraction(4 * length, 50) + Fraction(1, 2))


def test_examples():
    assert schedule.resample("12", 4) == "1122"
    assert schedule.resample("1122", 2) == "12"
    assert schedule.resample("1111", 2) == "11"
    assert schedule.resample("0012", 2) == "02"
    assert schedule.resample("1", 3) == "111"
    assert schedule.resample("2", 0) == ""


@pytest.mark.parametrize("length", [-1, 2.0, True, None])
def test_a_length_must_be_one(length):
    with pytest.raises(ValueError, match=r"^length must be an integer of at least 0, got"):
        schedule.resample("1", length)


def test_resampling_takes_only_schedules():
    with pytest.raises(ValueError, match=r"^digits must "):
        schedule.resample("13", 2)
