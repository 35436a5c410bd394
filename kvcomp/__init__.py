"""kvcomp: composable KV-cache compression for long-context inference.

cache = CompressedCache("snapkv(keep=0.25) + kivi(bits=2)", model)
model.generate(**inputs, past_key_values=cache)
print(cache.report())
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kvcomp.errors import KvcompError, KvcompWarning, SpecError, UnsupportedError
from kvcomp.ledger import Memory, Traffic
from kvcomp.stack import Stack

if TYPE_CHECKING:
    from kvcomp.integrations.huggingface import CompressedCache, prefill

try:
    __version__ = version("kvcomp")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "CompressedCache",
    "KvcompError",
    "KvcompWarning",
    "Memory",
    "SpecError",
    "Stack",
    "Traffic",
    "UnsupportedError",
    "prefill",
]


def __getattr__(name: str) -> Any:
    """`CompressedCache` and `prefill` bring transformers in only when they are asked for."""
    if name in ("CompressedCache", "prefill"):
        from kvcomp.integrations import huggingface

        return getattr(huggingface, name)
    raise AttributeError(f"module 'kvcomp' has no attribute {name!r}")
