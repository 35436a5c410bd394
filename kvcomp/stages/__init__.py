"""What the author of a method needs: bases of policies, quantizers and selectors, and `register`, which names them.

A stage is a frozen dataclass: its fields are the arguments of its spec, `arg(default, help)` documents them. It
configures; the objects that hold tensors (`Codec`, `Index`) are made from it once per layer. Most methods are short:

- an eviction policy is a score: a `ScoredPolicy` with `scores(chunk) -> [b, Hkv, n]`;
- a quantizer is a `Grid` for K and one for V, over a `Basis`: a `Quantizer` whose `codec(shape)` is a `GridCodec`;
- a selector is a summary of pages and its logits: a `RankedSelector`, or a `VectorSelector`.

`examples/methods` has one of each. Shapes: b rows, Hq query heads, Hkv KV heads, G = Hq / Hkv, n tokens, D channels;
M pages of P tokens, S = b x Hkv streams. Keys and queries are post-RoPE.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcomp.attention import Part
from kvcomp.layout import SUMMARY, Field, PageLayout
from kvcomp.segments import Codebook, Dense, Floats, KVLayout, Plane, SideLayout, Uniform

from .arguments import Alias, dropped_share
from .joint import JointMaps, LatentStage
from .policy import Chunk, Held, ModelPart, Policy
from .quantizer import Codec, PageShape, Quantizer
from .registry import register
from .selector import Choice, Index, Selector, Summaries
from .stage import Stage, arg

if TYPE_CHECKING:
    from kvcomp.calibration.file import Calibration
    from kvcomp.calibration.stage import Calibrated
    from kvcomp.calibration.statistics import Statistics
    from kvcomp.kernels.received import received
    from kvcomp.policies.scored import ScoredPolicy
    from kvcomp.quantizers.basis import Basis
    from kvcomp.quantizers.calibrated import CalibratedQuantizer
    from kvcomp.quantizers.codecs import Grid, GridCodec
    from kvcomp.quantizers.packing import code_fields, pack_codes, unpack_codes
    from kvcomp.sparse.ranked import RankedSelector
    from kvcomp.sparse.summaries import VectorSelector

    from .plan import LayerPlan
    from .stack import Stack, StackLike
    from .window import Window

__all__ = [
    "SUMMARY",
    "Alias",
    "Basis",
    "Calibrated",
    "CalibratedQuantizer",
    "Calibration",
    "Choice",
    "Chunk",
    "Codebook",
    "Codec",
    "Dense",
    "Field",
    "Floats",
    "Grid",
    "GridCodec",
    "Held",
    "Index",
    "JointMaps",
    "KVLayout",
    "LatentStage",
    "LayerPlan",
    "ModelPart",
    "PageLayout",
    "PageShape",
    "Part",
    "Plane",
    "Policy",
    "Quantizer",
    "RankedSelector",
    "ScoredPolicy",
    "Selector",
    "SideLayout",
    "Stack",
    "StackLike",
    "Stage",
    "Statistics",
    "Summaries",
    "Uniform",
    "VectorSelector",
    "Window",
    "arg",
    "code_fields",
    "dropped_share",
    "pack_codes",
    "received",
    "register",
    "unpack_codes",
]

# imported on first use: these are built on what is above
_HOMES = {
    "Basis": "kvcomp.quantizers.basis",
    "Calibrated": "kvcomp.calibration.stage",
    "CalibratedQuantizer": "kvcomp.quantizers.calibrated",
    "Calibration": "kvcomp.calibration.file",
    "Grid": "kvcomp.quantizers.codecs",
    "GridCodec": "kvcomp.quantizers.codecs",
    "LayerPlan": "kvcomp.stages.plan",
    "RankedSelector": "kvcomp.sparse.ranked",
    "ScoredPolicy": "kvcomp.policies.scored",
    "Stack": "kvcomp.stages.stack",
    "StackLike": "kvcomp.stages.stack",
    "Statistics": "kvcomp.calibration.statistics",
    "VectorSelector": "kvcomp.sparse.summaries",
    "Window": "kvcomp.stages.window",
    "code_fields": "kvcomp.quantizers.packing",
    "pack_codes": "kvcomp.quantizers.packing",
    "received": "kvcomp.kernels.received",
    "unpack_codes": "kvcomp.quantizers.packing",
}


if not TYPE_CHECKING:  # which would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            found = globals()[name] = getattr(import_module(_HOMES[name]), name)
            return found
        raise AttributeError(f"module 'kvcomp.stages' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
