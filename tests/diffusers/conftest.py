"""The fixtures of this folder."""

from fixtures.unets import *  # noqa: F403
