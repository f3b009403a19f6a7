"""The small pipeline that comes with the package."""

from __future__ import annotations

from pathlib import Path


def example_pipeline() -> Path:
    """The folder of the small Stable Diffusion pipeline that comes with the package, for tests and demos.

    ``StableDiffusionPipeline.from_pretrained(example_pipeline())`` loads it, in float32 unless ``dtype`` says
    otherwise. Nothing is downloaded, and diffusers is not needed to ask. The weights (20 MB) are in half precision.

    Returns:
        an absolute path, in the installed package or the checkout.
    """
    return Path(__file__).resolve().parent / "landscapes"
