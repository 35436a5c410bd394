"""Where there is no GPU, tests that launch Triton kernels run in processes of test_triton.py, interpreted."""

from __future__ import annotations

import os

import interpreted
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if item.path.name in interpreted.FILES:
            item.add_marker(pytest.mark.skip(reason="test_triton.py runs these with TRITON_INTERPRET=1"))
