"""kvcomp: composable KV-cache compression for long-context inference.

cache = CompressedCache(SnapKV(keep=0.5) + KIVI(bits=4), model)  # or "snapkv(keep=0.5) + kivi(bits=4)"
model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24
print(cache.report())

Stage classes are exported under their papers' names; `kvcomp.stages` is what the author of a method needs.
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
    from kvcomp.cache.layer import roundtrip as roundtrip
    from kvcomp.integrations.huggingface.accounting import memory_of
    from kvcomp.integrations.huggingface.ask import Answers, ask
    from kvcomp.integrations.huggingface.cache import CompressedCache
    from kvcomp.integrations.huggingface.compact import Compaction
    from kvcomp.integrations.huggingface.prefill import Prefilled, prefill
    from kvcomp.ledger import Memory, Traffic
    from kvcomp.policies.expected import ExpectedAttention
    from kvcomp.policies.h2o import H2O, TOVA
    from kvcomp.policies.keys import KeyDiff, KNorm, LagKV, Random
    from kvcomp.policies.kvzap import KVzap
    from kvcomp.policies.kvzip import KVzip
    from kvcomp.policies.leverage import Compactor, CurDKV
    from kvcomp.policies.rkv import RKV
    from kvcomp.policies.simlayer import SimLayerKV
    from kvcomp.policies.snapkv import AdaKV, ChunkKV, CriticalKV, PyramidKV, SnapKV
    from kvcomp.policies.streaming import StreamingLLM
    from kvcomp.quantizers.fp8 import FP8
    from kvcomp.quantizers.int import Int
    from kvcomp.quantizers.int8 import Int8
    from kvcomp.quantizers.kivi import KIVI
    from kvcomp.quantizers.klt import KLT
    from kvcomp.quantizers.latent import Latent
    from kvcomp.quantizers.mxfp4 import MXFP4
    from kvcomp.quantizers.none import NoQuantizer
    from kvcomp.quantizers.nvfp4 import NVFP4
    from kvcomp.quantizers.oscar import OSCAR
    from kvcomp.quantizers.svd import SVD
    from kvcomp.quantizers.think import ThinK
    from kvcomp.quantizers.turboquant import TurboQuant
    from kvcomp.sparse.dsa import DSA
    from kvcomp.sparse.moba import MoBA
    from kvcomp.sparse.nsa import NSA
    from kvcomp.sparse.quest import Quest
    from kvcomp.sparse.sketch import Sketch
    from kvcomp.stages.stack import Stack, StackLike
    from kvcomp.stages.stage import Stage
    from kvcomp.stages.window import Window

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
    "DSA",
    "FP8",
    "H2O",
    "KIVI",
    "KLT",
    "MXFP4",
    "NSA",
    "NVFP4",
    "OSCAR",
    "RKV",
    "SVD",
    "TOVA",
    "AdaKV",
    "Answers",
    "ChunkKV",
    "Compaction",
    "Compactor",
    "CompressedCache",
    "CriticalKV",
    "CurDKV",
    "ExpectedAttention",
    "Int",
    "Int8",
    "KNorm",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "KvcompError",
    "KvcompWarning",
    "LagKV",
    "Latent",
    "Memory",
    "MoBA",
    "NoQuantizer",
    "Prefilled",
    "PyramidKV",
    "Quest",
    "Random",
    "SimLayerKV",
    "Sketch",
    "SnapKV",
    "SpecError",
    "Stack",
    "StackLike",
    "Stage",
    "StreamingLLM",
    "ThinK",
    "Traffic",
    "TurboQuant",
    "UnsupportedError",
    "Window",
    "__version__",
    "ask",
    "memory_of",
    "prefill",
]

# imported on first use: `kvcomp --help` needs no torch, and the core no transformers
_HOMES = {
    "AdaKV": "kvcomp.policies.snapkv",
    "Answers": "kvcomp.integrations.huggingface",
    "ChunkKV": "kvcomp.policies.snapkv",
    "Compaction": "kvcomp.integrations.huggingface",
    "Compactor": "kvcomp.policies.leverage",
    "CompressedCache": "kvcomp.integrations.huggingface",
    "CriticalKV": "kvcomp.policies.snapkv",
    "CurDKV": "kvcomp.policies.leverage",
    "DSA": "kvcomp.sparse.dsa",
    "ExpectedAttention": "kvcomp.policies.expected",
    "FP8": "kvcomp.quantizers.fp8",
    "H2O": "kvcomp.policies.h2o",
    "Int": "kvcomp.quantizers.int",
    "Int8": "kvcomp.quantizers.int8",
    "KIVI": "kvcomp.quantizers.kivi",
    "KLT": "kvcomp.quantizers.klt",
    "KNorm": "kvcomp.policies.keys",
    "KVzap": "kvcomp.policies.kvzap",
    "KVzip": "kvcomp.policies.kvzip",
    "KeyDiff": "kvcomp.policies.keys",
    "LagKV": "kvcomp.policies.keys",
    "Latent": "kvcomp.quantizers.latent",
    "MXFP4": "kvcomp.quantizers.mxfp4",
    "Memory": "kvcomp.ledger",
    "MoBA": "kvcomp.sparse.moba",
    "NSA": "kvcomp.sparse.nsa",
    "NVFP4": "kvcomp.quantizers.nvfp4",
    "NoQuantizer": "kvcomp.quantizers.none",
    "OSCAR": "kvcomp.quantizers.oscar",
    "Prefilled": "kvcomp.integrations.huggingface",
    "PyramidKV": "kvcomp.policies.snapkv",
    "Quest": "kvcomp.sparse.quest",
    "RKV": "kvcomp.policies.rkv",
    "Random": "kvcomp.policies.keys",
    "SVD": "kvcomp.quantizers.svd",
    "SimLayerKV": "kvcomp.policies.simlayer",
    "Sketch": "kvcomp.sparse.sketch",
    "SnapKV": "kvcomp.policies.snapkv",
    "Stack": "kvcomp.stages.stack",
    "StackLike": "kvcomp.stages.stack",
    "Stage": "kvcomp.stages.stage",
    "StreamingLLM": "kvcomp.policies.streaming",
    "TOVA": "kvcomp.policies.h2o",
    "ThinK": "kvcomp.quantizers.think",
    "Traffic": "kvcomp.ledger",
    "TurboQuant": "kvcomp.quantizers.turboquant",
    "Window": "kvcomp.stages.window",
    "ask": "kvcomp.integrations.huggingface",
    "memory_of": "kvcomp.integrations.huggingface",
    "prefill": "kvcomp.integrations.huggingface",
    "roundtrip": "kvcomp.cache.layer",
}


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            found = globals()[name] = getattr(import_module(_HOMES[name]), name)
            return found
        raise AttributeError(f"module 'kvcomp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
