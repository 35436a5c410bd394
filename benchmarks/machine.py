"""What figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvcomp.benchmarks.settings import VLLM


def versions(engine: str) -> dict[str, str]:
    """Of Python and the packages that a figure depends on, with an engine's own."""
    found = {"python": platform.python_version()}
    for package in ("kvcomp", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if engine == VLLM:
        from kvcomp.integrations.vllm.plugin import installed

        found[engine] = installed()
    return found


def machine() -> dict[str, Any]:
    """The processor, its cores, the threads that torch uses and the GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
