"""What the runtime does to its process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from trainer.distributed.process import ProcessInfo
from trainer.distributed.runtime import Runtime

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
with Runtime(ProcessInfo(), device="cpu"):
    print(before, min(faults() for _ in range(4)))  # the first of them let the heap grow
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_a_step_has_freed_is_reused_by_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 1000, "blocks of 64 MiB are no longer faulted in again: the setting is useless by now"
    assert after < before / 10
