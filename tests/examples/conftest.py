"""The fixtures of this folder."""

from fixtures.pipelines import *  # noqa: F403
