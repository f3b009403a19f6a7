"""The fixtures of this folder."""

from fixtures.comfyui import *  # noqa: F403
from fixtures.unets import *  # noqa: F403
