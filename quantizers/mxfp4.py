"""MXFP4: E2M1 codes, blocks of 32 with power-of-two scales (OCP Microscaling Formats 1.0, arXiv 2310.10537).

Rotations, which spread a block's outlier over it, help MXFP4 and not NVFP4 (MR-GPTQ, arXiv 2509.23202).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomp.stages import PageShape, Quantizer, arg
from kvcomp.stages.registry import register

from .basis import BASES
from .centred import centred
from .codecs import GridCodec
from .floats import MXGrid, e2m1_values


@register("mxfp4")
@dataclass(frozen=True)
class MXFP4(Quantizer):
    """MXFP4: E2M1 codes with an E8M0 scale, a power of two, per token and 32 channels: 4.25 effective bits,
    and 8 / P for K's centres.

    Where 32 does not divide D, the last block is shorter and has a scale of its own: 4 + 8 ceil(D / 32) / D effective
    bits, 4.3 at D = 80.

    Papers: arXiv 2310.10537, 2509.23202.
    """

    paper: ClassVar[str] = "arXiv:2310.10537, arXiv:2509.23202"

    basis: str = arg("identity", "identity, hadamard or random, as of `int`")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.basis in BASES, "basis", f"one of {', '.join(BASES)}")

    @property
    def implied(self) -> tuple[str, ...]:
        return ("basis",) if self.basis == "identity" else ()  # hashes of stacks that knew no basis stay theirs

    def codec(self, shape: PageShape) -> GridCodec:
        codebook = e2m1_values(shape.device)
        return GridCodec(
            centred(MXGrid("k", shape.page_size, shape.k_dim, codebook), shape),
            MXGrid("v", shape.page_size, shape.v_dim, codebook),
            BASES[self.basis](shape.k_dim, shape.device),
            BASES[self.basis](shape.v_dim, shape.device),
        )
