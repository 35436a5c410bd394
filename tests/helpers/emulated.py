"""A plugin of pytest: the C kernels as another architecture has them, compiled for it and run by QEMU.

`pytest -p emulated` replaces the library that kvcomp.kernels.cpu loads by one of the same functions, each of which runs
in a process of emulated.c, on the memory of this process. So the tests of the kernels run unchanged, on what that
architecture's instructions compute. Not emulated: threads; the kernels are compiled without OpenMP.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", ("qemu-aarch64", "qemu-aarch64-static")
NAME = "kernels-aarch64"
FUNCTIONS = (
    "level",
    "attend",
    "vector_dots",
    "encode",
    "code_dots",
    "choose",
    "append",
    "shares",
    "largest",
    "regroup",
)
FUNCTIONS += ("runs",)
ARGUMENTS, PAGE, MESSAGE = 24, 4096, struct.Struct("3Q")
WANTED, CHANGED, DONE, TAKEN, OUTSIDE = range(1, 6)
PROGRAM = "KVCOMP_EMULATED"  # the path of the program, for pytest in a process of its own
AWAY = "0x200000000000"  # where neither this process nor QEMU has anything


def emulator() -> str | None:
    """QEMU's program for aarch64 on this machine."""
    return next(filter(None, map(shutil.which, EMULATOR)), None)


def missing() -> str | None:
    """Why kernels for aarch64 cannot be run here; None: they can."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return f"kernels are emulated on Linux on x86-64 only, not on {sys.platform} on {platform.machine()}"
    wanted = {"gcc-aarch64-linux-gnu": shutil.which(COMPILER), "qemu-user": emulator()}
    absent = [package for package, found in wanted.items() if found is None]
    return f"not installed: {' and '.join(absent)} (packages of Debian)" if absent else None


def compiled(folder: Path) -> Path:
    """The kernels of this checkout for aarch64, as setup.py compiles them, and emulated.c: one program."""
    here = Path(__file__).with_suffix(".c")
    sources = sorted((here.parents[2] / "kernels" / "cpu").glob("*.c"))
    program = folder / NAME
    flags = ["-O3", "-g0", "-std=gnu99", "-Wno-psabi"]
    linked = ["-static", "-no-pie", f"-Wl,-Ttext-segment={AWAY}", "-lm"]
    subprocess.run([COMPILER, *flags, here, *sources, "-o", program, *linked], check=True)
    return program


class Emulated:
    """What `ctypes.CDLL` is to the kernels. Raises an OSError where a kernel reads or writes outside of memory."""

    def __init__(self, program: str) -> None:
        self.program, self.command = program, _command()
        self.lock = RLock()
        self.libc, self.probe = ctypes.CDLL(None, use_errno=True), os.pipe()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        for number, name in enumerate(FUNCTIONS):
            setattr(self, f"kvcomp_{name}", self._function(number))

    def _function(self, number: int) -> Callable[..., int]:
        def function(*arguments: Any) -> int:
            numbers = [_number(x) for x in arguments]
            with self.lock:
                for _ in range(20):  # until the addresses of this process are free in the other
                    code = self._call(number, numbers)
                    if code is not None:
                        return _checked(number, code)
                raise OSError("no emulator has this process's addresses free")

        return function

    def _call(self, number: int, numbers: list[int]) -> int | None:
        """What the function returns; None where the emulator has something at an address of this process."""
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(struct.pack(f"{1 + ARGUMENTS}Q", number, *numbers, *[0] * (ARGUMENTS - len(numbers))))
        while True:
            kind, what, size = MESSAGE.unpack(self._read(MESSAGE.size))
            if kind == WANTED:
                self._give(process.stdin.fileno(), what, size)
            elif kind == CHANGED:
                ctypes.memmove(what, self._read(size), size)
            elif kind == DONE:
                return int(what)
            else:
                self.stop()
                if kind == TAKEN:
                    return None
                raise OSError(f"the emulated kernel touched {what:#x}, where there is no memory")

    def _read(self, size: int) -> bytes:
        """So many bytes of the other process."""
        assert self.process is not None
        assert self.process.stdout is not None
        found = b""
        while len(found) < size:
            more = self.process.stdout.read(size - len(found))
            if not more:
                raise OSError(f"the emulator ended: {self.process.wait()}")
            found += more
        return found

    def _give(self, pipe: int, address: int, most: int) -> None:
        """As many pages from an address on as can be read, up to `most`; write() looks whether it can read them."""
        found: list[bytes] = []
        for i in range(most):
            place = ctypes.c_void_p(address + i * PAGE)
            if self.libc.write(self.probe[1], place, ctypes.c_size_t(PAGE)) != PAGE:
                break
            found.append(os.read(self.probe[0], PAGE))
        left = memoryview(b"".join([struct.pack("Q", len(found)), *found]))
        while left:
            left = left[os.write(pipe, left) :]

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.owner != os.getpid():
            command = [*self.command, self.program]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            self.owner = os.getpid()
        return self.process

    def stop(self) -> None:
        """End the other process, if it was started here."""
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
        self.process = None


def _command() -> list[str]:
    """QEMU at the addresses of this process, an instruction at a time: in longer blocks, QEMU 7.2 restores wrong
    registers where a load or store faults and is repeated."""
    program = str(emulator())
    told = subprocess.run([program, "-h"], capture_output=True, text=True).stdout
    return [program, "-one-insn-per-tb" if "one-insn-per-tb" in told else "-singlestep", "-B", "0"]


def _number(x: Any) -> int:
    """An argument, as 64 bits."""
    if isinstance(x, float):
        return int(struct.unpack("I", struct.pack("f", x))[0])
    if isinstance(x, bytes):
        return int(ctypes.cast(ctypes.c_char_p(x), ctypes.c_void_p).value or 0)
    return ctypes.addressof(x) if isinstance(x, ctypes.Array) else int(x or 0) & (1 << 64) - 1


def _checked(number: int, code: int) -> int:
    from kvcomp.kernels.cpu import loading

    if number:
        loading._checked(code)
    return code


def pytest_configure(config: pytest.Config) -> None:
    """Only where a program is named: pytest loads this module as a helper, too."""
    if PROGRAM not in os.environ:
        return
    from kvcomp.kernels.cpu import compiled as ours

    library = Emulated(os.environ[PROGRAM])
    ours._loaded = lambda: (library, None)  # type: ignore[assignment, return-value]
    ours.library.cache_clear(), ours.functions.cache_clear(), ours.level.cache_clear()
    config.add_cleanup(library.stop)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Instruction sets of x86-64 are left out: they would be the same one again."""
    if PROGRAM in os.environ:
        same = [item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("level", 0) > 0]
        config.hook.pytest_deselected(items=same)
        items[:] = [item for item in items if item not in same]
