"""Which tests of Triton kernels run interpreted where there is no GPU."""

from __future__ import annotations

from pathlib import Path

COMPILED = {"test_triton_assembly.py", "test_triton_compile.py", "test_triton_issue.py"}  # these launch nothing
FILES = sorted(
    path.name for path in (Path(__file__).parents[1] / "kernels").glob("test_triton_*.py") if path.name not in COMPILED
)
