"""What bandwidth instruction issue allows the decode kernel on an H200: compiled for one, and counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

LEAST = {  # of a copy's bandwidth
    **dict.fromkeys(["int(bits=4)", "kivi(bits=4)", "turboquant(bits=4)", "fp8", "int8", "nvfp4", "mxfp4"], 0.85),
    **dict.fromkeys(["int(bits=2)", "kivi(bits=2)", "turboquant(bits=2)", "klt(bits=2)"], 0.6),
    "klt(bits=4)": 0.8,
}
NARROW = {"int(bits=2)": 0.58, "turboquant(bits=2)": 0.6, "klt(bits=2)": 0.6, "klt(bits=4)": 0.7}  # of 64 channels


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "least"), [(128, LEAST), (64, NARROW)])
def test_issue_leaves_the_bandwidth_to_memory(dim: int, least: dict[str, float]) -> None:
    """In a process in which triton compiles."""
    command = [sys.executable, "-m", "kvcomp.kernels.triton.issue", *least, "--dim", str(dim), "--rows", "8", "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {line["stack"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == least.keys()
    assert {stack: line["share"] for stack, line in found.items() if line["share"] < least[stack]} == {}
    assert {stack: line["spilled"] for stack, line in found.items() if line["spilled"]} == {}
