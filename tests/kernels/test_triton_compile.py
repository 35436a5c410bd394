"""The Triton kernels compiled for chips that are not here: they fit, and nothing is spilled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

COMMAND = [sys.executable, "-m", "kvcomp.benchmarks.resources", "--json"]
KERNELS = {
    "attend",
    "merge",
    "rotate",
    "choose",
    "append",
    "advance",
    "shift",
    "scores",
    "encode",
    "code_dots",
    "regroup",
    "lse",
    "received",
}
OURS = {  # among others: shapes and variants that are easily spilled or left out
    ("attend", "int(bits=4), 80 channels"),
    ("attend", "mxfp4, filled in part"),
    ("attend", "int(bits=4), latents"),
    ("encode", "klt(bits=2)"),
    ("encode", "turboquant(bits=4), one token"),
    ("received", "64 queries"),
    ("received", "most of 64 queries"),
}
LIMITS = {80: 163, 90: 227, 100: 227}  # KiB of shared memory that a program can have


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    """What the command says, in a process in which triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", LIMITS)
def test_kernels_fit_a_chip(kernels: list[dict[str, Any]], capability: int) -> None:
    ours = [found for found in kernels if found["capability"] == capability]
    assert {found["kernel"] for found in ours} == KERNELS
    assert {(found["kernel"], found["stack"]) for found in ours} >= OURS
    assert not [found for found in ours if found["spilled"]]
    assert max(found["shared"] for found in ours) <= LIMITS[capability] * 1024
    assert min(found["programs"] for found in ours) >= 1
