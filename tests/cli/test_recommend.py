"""``todo-attn recommend``: from a wish to lines of Python, and what it refuses."""

import json
from dataclasses import replace

import pytest

from todo_attn.config.dato import DaToConfig


@pytest.fixture
def recommend(run, sd_folder, tmp_path, monkeypatch):
    """recommend(*options): on an image of 32 x 32 pixels in 3 calls, by operations, one generation."""
    pytest.importorskip("pymoo")
    from todo_attn import search

    plan = search.short_plan
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        search, "short_plan", lambda *given: replace(plan(*given), generations=1, minutes=None, todo_factors=(1, 2))
    )

    def recommend(*options):
        given = ("--prompt", "a hill", "--steps", 3, "--height", 32, "--width", 32, "--device", "cpu")
        return run("recommend", sd_folder, *given, "--cost", "operations", *options)

    return recommend


def test_from_a_wish_to_code_and_a_page(recommend, tmp_path):
    done = recommend("--speedup", 1.05, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["search"]["speedup"] >= 1.05 and result["search"]["psnr"] > 0
    config = DaToConfig.from_dict(result["config"])
    assert "(pipe, " in result["python"] and result["python"].replace("\n", "") in done.err.replace("\n", "")
    method = result["comparison"]["methods"][1]
    options = {name: value for name, value in method["options"].items() if name != "schedule"}
    assert options == (config.todo.to_dict() if method["method"] == "todo" else config.to_dict())
    assert result["comparison"]["settings"]["seeds"] != [0]
    assert result["method"] == method["method"]
    assert result["fulfilled"] is True  # operations do not depend on seeds
    first = tmp_path / "recommend" / "speedup-1.05" / "report.html"
    page = first.read_bytes()
    # Other wishes, in the same folder.
    other = recommend("--psnr", 1)
    assert other.code == 0, other.err
    assert "from todo_attn import" in other.out
    assert (tmp_path / "recommend" / "psnr-1" / "report.html").exists() and first.read_bytes() == page
    unreached = recommend("--speedup", 1000)
    assert unreached.code == 1 and not unreached.out
    assert "--speedup must be in reach: the fastest is" in unreached.err and "got 1000x" in unreached.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--speedup or --psnr must be given, and none is"),
        (("--speedup", 2, "--psnr", 30), "--speedup or --psnr must be given, and only one"),
        (("--speedup", 0), "--speedup must be a number above 0, got 0"),
        (("--speedup", "inf"), "--speedup must be a number above 0, got inf"),
        (("--speedup", 2, "--folder", "."), "--folder must be new, empty or of an earlier recommend, got '.'"),
        (("--speedup", 2, "--folder", "letter.txt"), "--folder must be a folder, got 'letter.txt'"),
        (("--psnr", "nan"), "--psnr must be a number above 0, got nan"),
        (("--speedup", 2, "--minutes", 0), "--minutes must be a number above 0, got 0"),
        (("--speedup", 2, "--cost", "joules"), "--cost must be one of operations, seconds"),
        (("--speedup", 2, "--prompts", "absent.txt"), "--prompts and --prompt cannot both be given"),
    ],
)
def test_what_is_refused(recommend, tmp_path, options, words):
    (tmp_path / "letter.txt").write_text("dear")
    done = recommend(*options)
    assert done.code == 2 and not done.out
    assert words in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "recommend").exists()
