"""Pages of latents (MLA): one stream, whose values are the first channels of its keys and share their bytes.

A latent c [R], or its first channels alone (`PageShape.kept`), and a rotary key r [Dr] are stored of each token, as K
and V are by the quantizer. Attention with queries that are absorbed sees keys [c, r] and values c.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.layout import Field
from kvcomp.segments import KVLayout, SideLayout, memo

from . import one_sided
from .quantizer import AroundCodec, Codec, PageShape, Quantizer


def stored(shape: PageShape) -> PageShape:
    """The shape whose keys and values are what is stored: of a latent c and r; the shape itself otherwise."""
    if not shape.latent:
        return shape
    rank = shape.v_dim if shape.kept is None else shape.kept
    return replace(shape, k_dim=rank, v_dim=shape.k_dim - shape.v_dim, latent=False, kept=None)


def make_codec(quantizer: Quantizer, shape: PageShape) -> Codec:
    """The quantizer's codec for pages of any shape."""
    codec = one_sided.make_codec(quantizer, stored(shape))
    return LatentCodec(codec, shape.v_dim, shape.kept) if shape.latent else codec


def page_fields(quantizer: Quantizer, shape: PageShape) -> tuple[Field, ...]:
    """The fields of `make_codec`'s pages, without a codec: nothing has to be loaded."""
    return one_sided.page_fields(quantizer, stored(shape))


class LatentCodec(AroundCodec):
    """A codec of keys [c, r] and values c [R], of one that stores c, or what is `kept` of it, as keys and r as values.

    What `encode`, `fit` and `kernel_input` get as values is not looked at: it is in the keys.
    """

    def __init__(self, codec: Codec, rank: int, kept: int | None = None) -> None:
        super().__init__(codec)
        self.rank, self.kept = rank, rank if kept is None else kept
        self.lossless = codec.lossless and self.kept == rank

    @property
    def rotates(self) -> bool:
        return self.codec.rotates or self.kept < self.rank

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.codec.fields

    def _parts(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [..., R + Dr] as what is stored of c, [..., kept], and r [..., Dr]."""
        return keys[..., : self.kept], keys[..., self.rank :]

    def _whole(self, latent: Tensor) -> Tensor:
        """c [..., R] of what is stored of it."""
        missing = self.rank - self.kept
        return F.pad(latent, (0, missing)) if missing else latent

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        return self.codec.encode(*self._parts(keys), streams)

    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.codec.kernel_input(*self._parts(keys), streams)

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        latent, rotary = self.codec.decode(page)
        return torch.cat([latent, rotary], -1), latent

    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        latent, rotary = self._parts(queries)
        (a, one), (b, other) = self.codec.read_query(latent), self.codec.read_value_query(rotary)
        bias = one if other is None else other if one is None else one + other
        return torch.cat([a, b], -1), bias

    def read_output(self, output: Tensor) -> Tensor:
        return self._whole(self.codec.read_key_output(output))

    def inverse(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        coordinates = values.shape[-1]
        latent, rotary = self.codec.inverse(values, keys[..., coordinates:], streams)
        latent = self._whole(latent)
        return torch.cat([latent, rotary], -1), latent

    def kernel_layouts(self) -> KVLayout | None:
        codec = self.codec
        if isinstance(codec, one_sided.OneSidedCodec):  # no rotary key
            inner = codec.present(codec.codec.kernel_layouts())
        else:
            inner = codec.kernel_layouts()
        if inner is None:
            return None
        known = memo(inner)
        found: KVLayout | None = known.get(LatentCodec)
        return known.setdefault(LatentCodec, _shared(inner)) if found is None else found

    def write_layouts(self) -> KVLayout | None:
        codec = self.codec
        if isinstance(codec, one_sided.OneSidedCodec):
            return codec.present(codec.codec.write_layouts())
        return codec.write_layouts()

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        """Queries, and as many directions as there are channels: the values' error counts like that of q . k."""
        latent = self._parts(queries)[0].float()
        size = latent.square().sum((1, 2), keepdim=True).div(self.kept).sqrt()  # [s, 1, 1]
        every = torch.eye(self.kept, device=latent.device, dtype=torch.float32) * size
        self.codec.observe(streams, torch.cat([latent, every], 1))

    def fit(self, streams: Tensor, keys: Tensor, values: Tensor, due: Tensor | None = None) -> None:
        self.codec.fit(streams, *self._parts(keys), due)


def _shared(inner: KVLayout) -> KVLayout:
    """K and V of which V's segments are the first of K's: the same bytes."""
    latent, rotary = (tuple(s for s in side.segments if s.channels) for side in inner)
    return SideLayout(latent + rotary), SideLayout(latent)
