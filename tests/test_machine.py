"""What a process does with memory that a training step has freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import numpy as np
from emonb.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    return sum(block.sum() for block in [np.ones(2_000_000) for _ in range(12)])
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_memory_of_one_step_is_kept_for_the_next():
    """Page faults in ten steps of 190 MB each: the system does not lend the same memory again and again."""
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("plain", "keep")
    )
    assert plain > 10_000
    assert kept < plain / 20
