"""The C library's allocator on the CPU: memory that is freed is kept for the next tensors."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters, in malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep the memory that this process frees; with another C library, do nothing.

    Otherwise large blocks go back to the system, which clears every page of the next tensor. Where tensors exceed 32 MiB, the
    largest blocks that glibc keeps by itself, that can be nearly half the time of a step (bench/NOTES.md, section 26).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**28)  # larger blocks are too few to matter, and too large to keep
