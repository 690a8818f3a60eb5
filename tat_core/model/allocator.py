"""Keep glibc's allocator from giving large temporaries back to the kernel after every operation."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 256 * 2**20


def tune_allocator() -> bool:
    """Tell glibc to serve large blocks from a heap that it keeps, instead of mapping and faulting each anew.

    Every tensor of more than 128 KiB is otherwise a fresh ``mmap`` whose pages are faulted in and zeroed, which costs a
    training step two thirds of its time at batch 4 (docs/performance.md). The price is a higher resident peak. Call it
    once per process, before the first tensor; calling it again is harmless.

    Returns
    -------
    bool
        True where it took effect (glibc), False elsewhere.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl and others have no mallopt
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return sum(mallopt(name, value) for name, value in settings) == len(settings)
