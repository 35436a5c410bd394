"""NSA: what a query does not read is still there, compressed (arXiv 2502.11089)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from kvcomp.attention import Part, attend
from kvcomp.kernels.select import vector_dots, vectors
from kvcomp.layout import SUMMARY, Field
from kvcomp.stages import Alias, Choice, Index, PageShape, Summaries, arg
from kvcomp.stages.registry import register

from .summaries import VectorSelector, encode, vector_fields

KEY, VALUE = f"{SUMMARY}key", f"{SUMMARY}value"
KEY_SCALE, VALUE_SCALE = f"{KEY}.scale", f"{VALUE}.scale"
PAGE = 64


class Branches(Index):
    """The compressed branch over all that the selected one does not read."""

    def rest(
        self, queries: Tensor, scale: float, held: Summaries, choice: Choice, softcap: float | None
    ) -> Part | None:
        keys, values = vectors(held.fields, KEY, KEY_SCALE), vectors(held.fields, VALUE, VALUE_SCALE)
        streams, pages, blocks, _ = keys.shape
        read = torch.arange(choice.positions.shape[1], device=keys.device) < choice.valid[:, None]
        left = torch.arange(pages, device=keys.device) < held.counts[:, None]  # [S, n]
        taken = torch.zeros_like(left, dtype=torch.int64).scatter_add(1, choice.positions, read.long())
        left = left & (taken == 0)
        if left.is_cpu and not bool(left.any()):  # on a GPU the question costs more than attention to nothing
            return None
        weight = log(held.page_size // blocks)
        bias = torch.full((streams, pages), weight, device=keys.device, dtype=torch.float32)
        bias = bias.masked_fill(~left, -torch.inf)
        values = values.masked_fill(~left[..., None, None], 0)
        keys = keys.masked_fill(~left[..., None, None], 0)
        bias = bias.repeat_interleave(blocks, 1)
        return attend(queries, keys.flatten(1, 2), values.flatten(1, 2), scale, None, softcap, key_bias=bias)


@register("nsa")
@dataclass(frozen=True)
class NSA(VectorSelector):
    """NSA without its training: selected pages and a window exactly, everything else by the means of short blocks.

    A summary holds the mean key and the mean value of each block of `block` tokens. A page is chosen by the attention
    that its blocks draw, as published; a block of a page that is not chosen stands for its tokens with its mean value
    and the weight of so many keys at its mean key. The published gate is learned; here the log-sum-exp of the three
    branches weighs them, and no token counts twice, so that reading everything is attention itself. Published blocks
    overlap (stride 16) and are compressed by a small network; those of a page are disjoint.

    Defaults as published: pages of 64, 16 of them with the first and the two newest, blocks of 32, a window of 512.

    Paper: arXiv 2502.11089.
    """

    paper: ClassVar[str] = "arXiv:2502.11089"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"block_counts": "pages"}

    pages: int | None = arg(None, "pages that a query reads (none of the five: 16)")
    first: int = arg(1, "oldest pages, read in any case")
    last: int = arg(2, "newest pages, read in any case")
    block: int = arg(32, "tokens that a mean stands for: a divisor of 64")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.block > 0 and PAGE % self.block == 0, "block", f"a divisor of {PAGE}")
        self.check(self.share == 1, "share", "1: every layer has its own compressed branch")

    @property
    def default(self) -> tuple[str, float]:
        return "pages", 16

    @property
    def page_multiple(self) -> int:
        return PAGE

    @property
    def default_window(self) -> tuple[int, int]:
        return 0, 512

    def index(self, shape: PageShape) -> Branches:
        return Branches(self)

    def summary_fields(self, shape: PageShape) -> tuple[Field, ...]:
        each = (shape.page_size // self.block,)
        return (
            *vector_fields((KEY,), shape.k_dim, self.summary_bits, each, KEY_SCALE),
            *vector_fields((VALUE,), shape.v_dim, self.summary_bits, each, VALUE_SCALE),
        )

    def summarize(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        k, v = (x.float().unflatten(1, (-1, self.block)).mean(2) for x in (keys, values))
        bits = self.summary_bits
        return encode({KEY: (k, 0)}, bits, KEY_SCALE) | encode({VALUE: (v, 0)}, bits, VALUE_SCALE)

    def logits(self, queries: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        return vector_dots(queries, summary, (KEY,), KEY_SCALE)
