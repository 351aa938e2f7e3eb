"""How the C library's allocator treats freed memory, for a process whose buffers come and go by the megabyte.

glibc gives large freed pieces back to the kernel, and trims what lies free at the end of a heap.
The next message or activation of that size then takes a page fault, and a zeroed page, for every 4 KiB it touches: over
gRPC that is more than half of a megabyte's way (tests/bench/RESULTS.md).
"""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names, from malloc.h
_MIB = 1 << 20
KEPT_BYTES = 256 * _MIB  # what may lie free at a heap's end
LARGEST_BYTES = 32 * _MIB  # larger pieces still come from the kernel: glibc's own limit


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees, for its next buffers, up to the sizes above; whether the C library
    can do that. A user's MALLOC_ variables set the same before, and lose."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_MMAP_THRESHOLD, LARGEST_BYTES) and mallopt(_TRIM_THRESHOLD, KEPT_BYTES)):
        log.debug("this C library cannot be told to keep freed memory")
        return False
    return True
