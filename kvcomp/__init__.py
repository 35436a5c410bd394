"""kvcomp: composable KV-cache compression for long-context inference.

cache = CompressedCache("snapkv(keep=0.25) + kivi(bits=2)", model)
model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24
print(cache.report())
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcomp.errors import KvcompError, KvcompWarning, SpecError, UnsupportedError

if TYPE_CHECKING:
    from kvcomp.integrations.huggingface.cache import CompressedCache
    from kvcomp.integrations.huggingface.prefill import prefill
    from kvcomp.ledger import Memory, Traffic
    from kvcomp.stages.stack import Stack

_FOLDERS = ("policies", "quantizers", "sparse", "kernels", "integrations", "benchmarks")


class _SourceTree(MetaPathFinder):
    """Finds `kvcomp.policies` and its like in a checkout, where those folders lie beside this one instead of in it.

    So whatever imports this `kvcomp` gets all of its own tree, also while another copy of kvcomp is installed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __name__ or name not in _FOLDERS:
            return None
        return PathFinder.find_spec(fullname, [str(self.root)], target)


_here = Path(__file__).resolve().parent
if not (_here / _FOLDERS[0]).is_dir() and (_here.parent / _FOLDERS[0]).is_dir():
    sys.meta_path.insert(0, _SourceTree(_here.parent))

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

# imported on first use: `kvcomp --help` needs no torch, and the core no transformers
_HOMES = {
    "CompressedCache": "kvcomp.integrations.huggingface",
    "Memory": "kvcomp.ledger",
    "PageShape": "kvcomp.stages",
    "Stack": "kvcomp.stages.stack",
    "Traffic": "kvcomp.ledger",
    "prefill": "kvcomp.integrations.huggingface",
    "roundtrip": "kvcomp.cache.layer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kvcomp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
