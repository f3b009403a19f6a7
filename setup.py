"""Package layout only; the metadata lives in pyproject.toml.

``kernels/`` is installed as ``todo_attn.kernels`` (the top-level name ``kernels`` belongs to another package, which
diffusers imports) and the shipped demo pipeline as data in ``todo_attn/tiny_sd``.
"""

from setuptools import setup

setup(
    packages=["todo_attn", "todo_attn.ops", "todo_attn.diffusers", "todo_attn.kernels", "todo_attn.tiny_sd"],
    package_dir={
        "todo_attn": "todo_attn",
        "todo_attn.kernels": "kernels",
        "todo_attn.tiny_sd": "examples/tiny_sd/pipeline",
    },
)
