"""Tables of the rows within Markdown files; those of this repository are what their rows say."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.fidelity import __main__ as command
from benchmarks.fidelity.insert import inserted
from todo_attn.config.checks import ArgumentError

ROOT = Path(__file__).parents[3]


def row(case, seconds, psnr):
    columns = {"psnr": psnr and {"value": psnr, "low": psnr - 0.5, "high": psnr + 0.5}}
    columns["kid"] = {"value": 0.5, "low": None, "high": None}
    about = {"height": 256, "width": 256, "images": 4, "operations_saved": 0.25, "versus": None, "differences": None}
    return {"case": case, "seconds": seconds, "columns": columns, "same_as_dense": 4 * (case == "dense"), **about}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    made = [row("dense", 8.0, None), row("todo:factor=2", 4.0, 40.0), row("tome:0.5", 5.0, 30.0)]
    path.write_text("".join(json.dumps(one) + "\n" for one in made))
    return tmp_path


def test_a_block_is_filled_and_the_rest_stays(rows):
    block = "<!-- fidelity rows.jsonl --case 'to*:*' --case dense --metric psnr -->\n{}<!-- /fidelity -->\nafter\n"
    text = inserted("before\n" + block.format("old\n"), rows)
    lines = text.splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in text and "KID" not in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-2]]
    assert cells[0] == ["case", "s", "speed", "operations saved", "PSNR, dB"]
    assert cells[2] == ["`todo:factor=2`", "4", "2.00x", "25.0%", "40.00 ±0.50"]
    assert [row[0] for row in cells[3:]] == ["`tome:0.5`", "dense"] and cells[4][-1] == "same"
    assert inserted(text, rows) == text


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("other.jsonl", "other.jsonl"),
        ("rows.jsonl --case deepcache:3", "deepcache:3"),
        ("rows.jsonl --metric fid", "fid"),
        ("rows.jsonl --size 256", "--size"),
        ("rows.jsonl --case", "--case"),
    ],
)
def test_what_a_block_cannot_name(rows, options, what):
    with pytest.raises(ArgumentError, match=what):
        inserted(f"<!-- fidelity {options} -->\n<!-- /fidelity -->", rows)


def test_a_table_without_times(rows):
    filled = inserted("<!-- fidelity rows.jsonl --no-seconds --metric psnr -->\n<!-- /fidelity -->\n", rows)
    heading, _, dense = filled.splitlines()[1:4]
    assert [cell.strip() for cell in heading.split("|")[1:-1]] == ["case", "operations saved", "PSNR, dB"]
    assert [cell.strip() for cell in dense.split("|")[1:-1]] == ["dense", "25.0%", "same"]


def test_the_command_changes_no_file_if_one_cannot_be_filled(rows):
    good, bad = rows / "good.md", rows / "bad.md"
    good.write_text("<!-- fidelity rows.jsonl -->\n<!-- /fidelity -->\n")
    bad.write_text("<!-- fidelity none.jsonl -->\n<!-- /fidelity -->\n")
    ran = CliRunner().invoke(command.app, ["insert", str(good), str(bad), "--root", str(rows)])
    assert ran.exit_code == 2 and "none.jsonl" in ran.output
    assert "todo" not in good.read_text()
    ran = CliRunner().invoke(command.app, ["insert", str(good), "--root", str(rows)])
    assert ran.exit_code == 0 and "`todo:factor=2`" in good.read_text()


@pytest.mark.parametrize("name", ["README.md", "docs/quality.md", "docs/search.md"])
def test_the_tables_of_this_repository_are_what_their_rows_say(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- fidelity benchmarks/results/" in text
    assert inserted(text, ROOT) == text
