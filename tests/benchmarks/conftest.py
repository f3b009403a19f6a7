"""The benchmarks belong to a checkout and are not installed: make them importable wherever pytest was started.

At the end of the path: the checkout's ``kernels`` must not shadow the package of that name.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
