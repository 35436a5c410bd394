"""The Triton kernels where there is no GPU: their tests, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import interpreted
import pytest
import torch

from kvcomp import Stack
from kvcomp.errors import KvcompWarning
from kvcomp.kernels import backends, dispatch, triton_backend
from kvcomp.stages import PageShape

TESTS = [
    *(("test_triton_kernels.py", which) for which in ("reference", "not reference")),
    *((file, "") for file in interpreted.FILES if file != "test_triton_kernels.py"),
]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them as they are")
@pytest.mark.parametrize(("file", "which"), TESTS)
def test_interpreted(file: str, which: str) -> None:
    """In processes of their own: triton can be interpreted or not from its first import on, and others import it."""
    tests = Path(__file__).with_name(file)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        which,
        str(tests),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tests.parents[2])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.mark.parametrize(
    ("capability", "spec", "installed", "words"),
    [
        ((7, 5), "kivi", True, "compute capability 7.5"),
        ((9, 0), "kivi", False, "triton is not installed"),
        ((9, 0), "int(bits=3, group=4)", True, "no multiple of 8"),
    ],
)
def test_why_a_gpu_reads_pages_in_pytorch(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], spec: str, installed: bool, words: str
) -> None:
    backends._warn.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(triton_backend, "find_spec", lambda _: object() if installed else None)
    stack = Stack.parse(spec).plan(0, 1)
    codec, layout = stack.build(PageShape(stack.page_size, 64, 64, 1, torch.float32, torch.device("cpu"), 0))
    if installed:
        assert words in dispatch.explain(codec, layout, torch.device("cuda"))
    else:
        with pytest.warns(KvcompWarning, match="several times slower"):
            assert words in dispatch.explain(codec, layout, torch.device("cuda"))
