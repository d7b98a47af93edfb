"""Reuse the memory of tensors on the CPU."""

import ctypes
import os

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors for the next ones; return whether this process does so now.

    By default, glibc returns large blocks to the kernel, which clears every page again at the next
    allocation: a fifth of a step of ResNet-50 at 224 pixels. In return, the peak grows by fragmentation,
    there by a tenth. See mallopt(3).

    False with a GPU, with another C library, and if the environment already sets one of
    `MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_MAX_` and `MALLOC_MMAP_THRESHOLD_`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or torch.cuda.is_available() or any(name in os.environ for name in _CHOICES):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, -1) and mallopt(_MMAP_MAX, 0))
