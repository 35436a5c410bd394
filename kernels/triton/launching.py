"""Kernels launched with few steps on the host: what they are compiled for is looked up once, not in every call."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

ALIGNED = 16  # bytes of a pointer, and a divisor of a number, that compilers make use of


class Launch:
    """A kernel with the values of its last parameters, `constants`, and options to compile it.

    Triton binds all arguments of a call, and looks up a kernel by all of them. Here a kernel is found by what triton
    specializes on, the dtypes and alignments of pointers and which numbers are 1 or multiples of 16; then its compiled
    form is called.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants = kernel, constants
        names = kernel.arg_names
        self._last = tuple(constants[name] for name in names if name in constants)
        assert list(names[len(names) - len(self._last) :]) == [name for name in names if name in constants]
        free = set(getattr(kernel, "do_not_specialize", None) or ())
        self._special = tuple(name not in free and at not in free for at, name in enumerate(names))
        self._compiles = isinstance(kernel, triton.JITFunction)
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], device: torch.device, *args: Any) -> None:
        """Run so many programs, on arguments before the constants, whose tensors lie on `device`."""
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._call(grid, device, args)
        else:
            self._call(grid, device, args)

    def _call(self, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...]) -> None:
        if not self._compiles:
            self.kernel[grid](*args, **self.constants)
            return
        key = (device.index, *map(_special, args, self._special))
        found = self._known.get(key)
        if found is None:
            found = self.kernel[grid](*args, **self.constants)
            if found is not None:
                self._known[key] = found
            return
        found[(*grid, 1, 1)[:3]](*args, *self._last)


def _special(x: Any, counts: bool) -> Any:
    """What triton compiles another kernel for; counts: whether it specializes on the number x."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % ALIGNED
    if isinstance(x, int):
        return (x == 1, x % ALIGNED == 0, -(1 << 31) <= x < 1 << 31) if counts else -(1 << 31) <= x < 1 << 31
    return None
