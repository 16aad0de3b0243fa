"""Giving freed memory back, and knowing how much was used."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def release() -> None:
    """Return memory that is free inside the process to the system (glibc keeps it otherwise)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if trim := getattr(libc, "malloc_trim", None):  # absent in musl
            trim(0)


class PeakMemory:
    """The peak resident (and device) memory of this process since `restart`, in bytes.

    Linux can reset the kernel's own high-water mark. Where that is forbidden the mark is that of the whole process; on
    other systems it is what is resident when asked.
    """

    def restart(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        release()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if _CLEAR_REFS.exists():
            try:
                _CLEAR_REFS.write_text("5")
            except PermissionError:  # a sandbox may forbid it: the mark is then the process's own
                return

    @property
    def resident(self) -> int:
        """Peak resident bytes."""
        if _STATUS.exists():
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return int(psutil.Process().memory_info().rss)

    @property
    def device(self) -> int | None:
        """Peak bytes allocated on the CUDA device, `None` where there is none."""
        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
