"""The allocator keeps freed memory: the next large tensor gets pages that are there already."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from fastloda.synthesis.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(15):
    torch.zeros(10 * 2**20)  # 40 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.zeros(10 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_freed_memory_is_used_again():
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True, text=True).stdout)
        for how in ("given back", "kept")
    )
    assert kept < 20 and given_back > 50, "page faults of five tensors, which have pages of 4 KiB or of 2 MiB"
