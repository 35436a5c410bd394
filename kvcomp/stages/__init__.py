"""The stage families, for authors of methods: what a quantizer, a policy and a selector have to provide.

A stage is a frozen dataclass: its fields are the arguments of its spec, `metadata={"help": ...}` documents them. It
configures; the objects that hold tensors (`Codec`, `Index`) are made from it once per layer.
"""

from .policy import Chunk, Held, ModelPart, Policy
from .quantizer import Codec, PageShape, Quantizer
from .selector import Choice, Index, Selector, Summaries
from .stage import Stage, arg

__all__ = [
    "Choice",
    "Chunk",
    "Codec",
    "Held",
    "Index",
    "ModelPart",
    "PageShape",
    "Policy",
    "Quantizer",
    "Selector",
    "Stage",
    "Summaries",
    "arg",
]
