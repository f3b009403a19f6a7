"""The fixtures of this folder."""

from fixtures.chromium import *  # noqa: F403
from fixtures.comparisons import *  # noqa: F403
from fixtures.pipelines import *  # noqa: F403
