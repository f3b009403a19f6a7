"""What a release says of itself: its notes, and the oldest Python and torch that its files are for."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("release_notes", ROOT / "docs" / "release_notes.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
release_notes = _module.release_notes

CHANGELOG = """# Changelog

## [Unreleased]

### Added
- Not yet.

## [0.2.0] - 2027-01-02

Two lines
of prose.

### Added
- An item that is
  wrapped:
  - and one within.
- `code`

## [0.1.0] - 2026-11-28
### Added
- The first.
"""


@pytest.fixture
def checkout(tmp_path):
    """checkout(version) has the files that the notes are made of."""

    def checkout(version, cited=None, changelog=CHANGELOG):
        (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "x"\nversion = "{version}"\n')
        (tmp_path / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited or version}\n")
        (tmp_path / "CHANGELOG.md").write_text(changelog)
        return tmp_path

    return checkout


def test_notes_are_the_section_with_each_item_on_a_line(checkout):
    notes = "Two lines\nof prose.\n\n### Added\n- An item that is wrapped:\n  - and one within.\n- `code`\n"
    assert release_notes("v0.2.0", checkout("0.2.0")) == notes
    assert release_notes("v0.1.0", checkout("0.1.0")) == "### Added\n- The first.\n"


@pytest.mark.parametrize(
    ("tag", "of_checkout", "message"),
    [
        ("v0.3.0", {"version": "0.2.0"}, "tag must be v0.2.0, for the version in pyproject.toml, got v0.3.0"),
        ("0.2.0", {"version": "0.2.0"}, "tag must be v0.2.0, for the version in pyproject.toml, got 0.2.0"),
        (
            "v0.2.0",
            {"version": "0.2.0", "cited": "0.1.0"},
            "tag must be v0.1.0, for the version in CITATION.cff, got v0.2.0",
        ),
        ("v0.3.0", {"version": "0.3.0"}, "CHANGELOG.md must have one section of 0.3.0, with notes"),
        ("v0.20", {"version": "0.20"}, "CHANGELOG.md must have one section of 0.20, with notes"),
        ("v1.0", {"version": "1.0", "changelog": "## [1.0]\n\n## [0.1]\n- x\n"}, "CHANGELOG.md must have one section"),
    ],
)
def test_a_tag_that_cannot_be_released(checkout, tag, of_checkout, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        release_notes(tag, checkout(**of_checkout))


def test_the_version_here_can_be_tagged():
    """pyproject.toml, CITATION.cff and the changelog agree."""
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert release_notes(f"v{version}").strip()


def test_the_compiled_libraries_are_for_the_oldest_python_and_torch():
    setup = (ROOT / "setup.py").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    (python,) = re.findall(r'^requires-python = ">=3\.(\d+)"$', project, re.MULTILINE)
    (major, minor) = re.search(r'^  "torch>=(\d+)\.(\d+)",$', project, re.MULTILINE).groups()
    assert f'PYTHON_TAG = "cp3{python}"' in setup
    assert f'("TORCH_TARGET_VERSION", "0x{int(major):02x}{int(minor):02x}000000000000")' in setup
    assert re.search(r'"Programming Language :: Python :: (3\.\d+)"', project)[1] == f"3.{python}"
