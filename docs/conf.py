"""Sphinx: README.md, docs/*.md and the API reference as one site. ``make docs`` builds it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["TODO_ATTN_LIBRARIES"] = "0"  # the compiled libraries add nothing to the docstrings

import todo_attn  # noqa: E402

project = "todo_attn"
copyright = "its authors, Apache-2.0"
version = release = todo_attn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The pages link to each other as they lie in the repository, so that is the source folder.
root_doc = "README"
include_patterns = [
    "*.md",
    "docs/*.md",
    "benchmarks/README.md",
    "examples/lora/README.md",
    "examples/landscapes/README.md",
]
exclude_patterns = [
    ".venv",
    "build",
    "dist",
    "todo_attn",
    "tests",
    "benchmarks/results",
    "examples/landscapes/pipeline",
]
CONTENTS = """
```{toctree}
:hidden:

docs/usage
docs/recipes
docs/search
docs/comfyui
docs/api
docs/compatibility
docs/troubleshooting
docs/quality
docs/figures
benchmarks/README
docs/design
docs/kernel-notes
examples/lora/README
examples/landscapes/README
CONTRIBUTING
CHANGELOG
```
"""

myst_heading_anchors = 4
smartquotes_action = "D"  # dashes; the quotes of "auto" are code
nitpicky = True
nitpick_ignore_regex = [("py:mod", r"todo_attn\.predict\..*")]  # not public: no page

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the Args lists have shapes and dtypes; the signatures stay short
napoleon_numpy_docstring = False
napoleon_use_rtype = False
RETURNS_SEVERAL = "Returns a tuple"
napoleon_custom_sections = [(RETURNS_SEVERAL, "params_style")]

html_theme = "furo"
html_title = f"todo_attn {release}"
html_extra_path = ["site"]  # index.html, which leads to README.html
html_static_path, html_css_files = ["static"], ["wide.css"]
html_copy_source = False


def adapt_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """What GitHub shows otherwise: it has no table of contents, and it alone can link to a folder."""
    folder = (ROOT / docname).parent

    def linked(match: re.Match[str]) -> str:
        return match["text"] if (folder / match["target"]).is_dir() else match[0]

    source[0] = re.sub(r"\[(?P<text>[^][]*)\]\((?P<target>[^()#:]+)\)", linked, source[0])
    if docname == root_doc:
        source[0] += CONTENTS


def name_returns(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """napoleon expects one return value; "Returns:" followed by ``name: text`` lists several."""
    for number, line in enumerate(lines[:-1]):
        if line == "Returns:" and re.match(r" +\w+: ", lines[number + 1]):
            lines[number] = f"{RETURNS_SEVERAL}:"


def setup(app: Sphinx) -> None:
    app.connect("source-read", adapt_page)
    app.connect("autodoc-process-docstring", name_returns, priority=100)  # before napoleon
