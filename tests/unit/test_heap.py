"""Freed memory is kept: by the page faults of buffers that come and go."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
if sys.argv[1] == "kept":
    from afd.heap import keep_freed_memory
    assert keep_freed_memory()
for _ in range(4):
    [bytearray(1 << 20) for _ in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    [bytearray(1 << 20) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: str) -> int:
    run = subprocess.run([sys.executable, "-c", FAULTS, kept], capture_output=True, text=True, timeout=60, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_buffers_of_a_megabyte_come_back_without_page_faults():
    assert faults("kept") < 256, "200 buffers together should fault less than a new one of 1 MiB does"
    assert faults("as it is") >= 50 * 256
