"""Memory that a step frees serves the next one."""

import platform
import subprocess
import sys

import pytest

_CODE = """
import resource, sys, torch
from dist_transformer.engine.allocator import keep_freed_memory

def n_page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(n * 2**18) for n in (1, 8, 64)]  # 1, 8 and 64 MiB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

n_page_faults()
before = n_page_faults()
assert keep_freed_memory()
n_page_faults()
print(before, n_page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_is_used_again() -> None:
    """10 x 73 MiB are 186,880 pages of 4 KiB, or 365 of 2 MiB."""
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 300
    assert after < before / 10
