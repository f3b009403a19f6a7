"""What the benchmarks set on the machine."""

import subprocess
import sys

import pytest

PAGES_TAKEN = """
import resource
import torch
from todo_attn import machine
if {keep}:
    assert machine.keep_freed_memory()

def fill():
    torch.ones(64 * 2**20, dtype=torch.uint8)

for _ in range(24):  # the first few may find no room where the last one was, because of alignment
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt")
def test_freed_memory_is_kept():
    """A buffer as large as one that was freed takes no page from the system; without the setting it takes them all."""

    def taken(keep):
        code = PAGES_TAKEN.format(keep=keep)
        run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        return int(run.stdout)

    assert taken(keep=True) <= 8
    assert taken(keep=False) > 100  # huge pages or small ones
