"""The C kernels on aarch64: compiled by a cross compiler and run by QEMU, under the tests that they have here."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

from kvcomp.kernels import cpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing())),
    pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed: no compiler"),
]
# Tests, and which of them. Written pages are compared with the specification bit for bit; threads are not emulated.
FILES = dict.fromkeys(("cpu", "cpu_encode", "doors", "ends", "many_queries", "select"), "")
FILES["skipped"] = "-9-None or -1-1.5 or not first_tokens"  # a third of the cases of each: they take minutes
FILES["ends"] = "80 or cannot or chosen"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels for aarch64, compiled once for all processes of this run."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with open(folder / "aarch64.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = folder / emulated.NAME
        return found if found.exists() else emulated.compiled(folder)


def run(program: Path, *arguments: str) -> str:
    """What pytest prints of tests whose kernels are emulated."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulated", "-p", "no:cacheprovider", "-p", "no:xdist"]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "tests" / "helpers"), *sys.path])
    environment = os.environ | {emulated.PROGRAM: str(program), "PYTHONPATH": path}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, cwd=root)
    return done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES)
def test_kernels(program: Path, file: str) -> None:
    told = run(program, str(Path(__file__).with_name(f"test_{file}.py")), "-k", FILES[file])
    assert " passed" in told
    assert " failed" not in told, told[-8000:]


def test_they_are_those_of_aarch64(program: Path) -> None:
    """An ELF program for that machine, which computes with vectors of four numbers."""
    assert int.from_bytes(program.read_bytes()[18:20], "little") == 183
    assembly = subprocess.run(
        [emulated.COMPILER.replace("gcc", "objdump"), "-d", str(program)], capture_output=True, text=True, check=True
    ).stdout
    assert assembly.count(".4s") > 10_000
    assert emulated.Emulated(str(program)).kvcomp_level() == 0


def test_what_they_compute_is_looked_at(program: Path, tmp_path: Path) -> None:
    """A kernel that writes where there is no memory, or another number, fails its test here, too."""
    library = emulated.Emulated(str(program))
    with pytest.raises(OSError, match="where there is no memory"):
        library.kvcomp_runs(16, 1, 16, 1, 1, 1, 16)
    library.stop()
