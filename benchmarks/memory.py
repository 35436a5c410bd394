"""The most by which memory grows for a while, as the device or the operating system tells it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
KIB = 2**10


def watch(device: torch.device) -> Callable[[], int | None]:
    """Watch the memory of `device` from now on; what is returned says the most bytes it grew by since, or None.

    CUDA: what PyTorch allocated on the device. CPU: resident memory of the whole process, in whole pages, after
    free memory went back to the system; its peak (VmHWM) starts anew. None where that cannot be had: other devices,
    other systems than Linux, no permission.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - allocated
    if device.type == "cpu":
        _trim()
        try:
            RESET.write_text("5")  # the peak of resident memory, see proc(5)
            resident = _status("VmRSS")
        except (OSError, LookupError):
            return lambda: None
        return lambda: max(_status("VmHWM") - resident, 0)
    return lambda: None


def _trim() -> None:
    """Give free memory back to the system, where the C library can: else growth would hide in what is free already."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """Bytes of a line such as `VmRSS: 123 kB`."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * KIB
    raise LookupError(f"{STATUS} has no {name}")
