"""Pages of layers whose keys or values have no channels: latents (MLA) without a rotary key, as in GLM-5-Next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvcomp.layout import Field

from .quantizer import AroundCodec, Codec, PageShape, Quantizer

STAND_IN = 32  # channels of zeros in place of none: every quantizer takes so many


def filled(shape: PageShape) -> PageShape:
    """The shape that a quantizer is asked for: a side without channels has `STAND_IN` of them."""
    return replace(shape, k_dim=shape.k_dim or STAND_IN, v_dim=shape.v_dim or STAND_IN)


def make_codec(quantizer: Quantizer, shape: PageShape) -> Codec:
    """The quantizer's codec, for pages that may have keys or values of 0 channels."""
    if shape.k_dim and shape.v_dim:
        return quantizer.codec(shape)
    codec = quantizer.codec(filled(shape))
    return quantizer.codec(shape) if codec.lossless else OneSidedCodec(codec, shape)


def page_fields(quantizer: Quantizer, shape: PageShape) -> tuple[Field, ...]:
    """The fields of `make_codec`'s pages, without a codec: nothing has to be loaded."""
    if shape.k_dim and shape.v_dim:
        return quantizer.fields(shape)
    fields = quantizer.fields(filled(shape))
    return tuple(field for field in fields if _stored(field, shape))


def _stored(field: Field, shape: PageShape) -> bool:
    return bool({"k": shape.k_dim, "v": shape.v_dim}.get(field.name.partition(".")[0], 1))


class OneSidedCodec(AroundCodec):
    """A codec whose keys or values have 0 channels, of one whose have `STAND_IN`: zeros, which are not stored."""

    def __init__(self, codec: Codec, shape: PageShape) -> None:
        super().__init__(codec)
        self.shape = shape
        self._fields = tuple(field for field in codec.fields if _stored(field, shape))
        self._missing = tuple(field for field in codec.fields if not _stored(field, shape))

    @property
    def fields(self) -> tuple[Field, ...]:
        return self._fields

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        encoded = self.codec.encode(_fill(keys), _fill(values), streams)
        return {field.name: encoded[field.name] for field in self._fields}

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        some = next(iter(page.values()))
        blank = {f.name: _zeros((len(some), *f.shape), f.dtype, some.device) for f in self._missing}
        return self.codec.decode({**page, **blank})

    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.codec.read_query(_fill(queries))

    def read_output(self, output: Tensor) -> Tensor:
        return self.codec.read_output(output)[..., : self.shape.v_dim]

    def read_value_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.codec.read_value_query(_fill(queries))

    def read_key_output(self, output: Tensor) -> Tensor:
        return self.codec.read_key_output(output)[..., : self.shape.k_dim]

    def inverse(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.codec.inverse(keys, values, streams)
        return k[..., : self.shape.k_dim], v[..., : self.shape.v_dim]

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        self.codec.observe(streams, _fill(queries))

    def fit(self, streams: Tensor, keys: Tensor, values: Tensor, due: Tensor | None = None) -> None:
        self.codec.fit(streams, _fill(keys), _fill(values), due)


def _fill(x: Tensor) -> Tensor:
    """x [..., D], or zeros [..., STAND_IN] where D is 0."""
    return x if x.shape[-1] else x.new_zeros(*x.shape[:-1], STAND_IN)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zero bytes: torch makes no zeros of every 8-bit float."""
    return torch.zeros(*shape[:-1], shape[-1] * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype)
