"""The notes of a release, from CHANGELOG.md: ``python docs/release_notes.py v0.1.0`` prints them.

It refuses a tag that is not the version of the files that would be built, so a tag cannot publish another version.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = {"pyproject.toml": r'^version = "(.+)"$', "CITATION.cff": r"^version: (.+)$"}


def release_notes(tag: str, root: Path = ROOT) -> str:
    """The section of the version that ``tag`` names, in Markdown.

    Raises:
        SystemExit: for a tag that is not "v" and the version in pyproject.toml and CITATION.cff, or a version without
            a section.
    """
    for name, pattern in VERSIONS.items():
        (version,) = re.findall(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        if tag != f"v{version}":
            raise SystemExit(f"tag must be v{version}, for the version in {name}, got {tag}")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(rf"^## \[{re.escape(tag[1:])}\].*\n([\s\S]*?)(?=^## |\Z)", changelog, re.MULTILINE)
    if len(sections) != 1 or not sections[0].strip():
        raise SystemExit(f"CHANGELOG.md must have one section of {tag[1:]}, with notes")
    # GitHub shows every line break of a release: an item is one line.
    return re.sub(r"\n +(?=[^\s-])", " ", sections[0].strip()) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/release_notes.py TAG")
    sys.stdout.write(release_notes(sys.argv[1]))
