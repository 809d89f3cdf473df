"""glibc's allocator, told to keep what the tensors of one pass free for those of the next."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
INT_MAX = 2**31 - 1
LARGEST_MMAP_THRESHOLD = 1 << 30
OLD_MMAP_THRESHOLD = 1 << 25
"""The most that glibc before 2.35 takes."""
TOP_PAD = 1 << 27
"""Twice a thread's heap of 64 MiB: what makes glibc keep empty heaps. Address space, no memory, until it is written."""


def keep_freed_memory() -> bool:
    """Makes this process keep the memory that it frees; True if it does from now on.

    By default glibc asks the kernel for each large tensor afresh and gives it back when the tensor dies, and the kernel
    fills every page with zeros again: tens of thousands of page faults for one image or prompt.

    What it costs: resident memory stays at the largest that was ever in use at once, plus what fragmentation wastes; it
    does not grow from pass to pass. A tensor above 64 MiB made outside the main thread still comes from the kernel.

    One thing undoes it: protobuf's C implementation calls malloc_trim(0) after every 10,000 arenas that it frees, which
    gives all free memory back, whatever is set here; the next pass faults it in again. A message takes an arena, and so
    does its serialisation: a served replica comes there every 3,000 token events or so. Only a library that is
    preloaded could keep protobuf from it.

    Only Linux with glibc is changed. With another libc nothing happens, and with another allocator preloaded (jemalloc,
    tcmalloc) nothing that matters. MALLOC_TRIM_THRESHOLD_ and the like in the environment are overruled.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt")):
        return False
    mapped = libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) or libc.mallopt(
        M_MMAP_THRESHOLD, OLD_MMAP_THRESHOLD
    )
    return bool(mapped and libc.mallopt(M_TRIM_THRESHOLD, INT_MAX) and libc.mallopt(M_TOP_PAD, TOP_PAD))
