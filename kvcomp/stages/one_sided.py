"""Pages of layers whose keys or values have no channels: latents (MLA) without a rotary key, as in GLM-5-Next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvcomp.layout import Field
from kvcomp.segments import KVLayout, SideLayout, memo

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

    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor] | None:
        found = self.codec.kernel_input(_fill(keys), _fill(values), streams)
        if found is None:
            return None
        return found[0] if self.shape.k_dim else keys, found[1] if self.shape.v_dim else values

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        some = next(iter(page.values()))
        blank = {f.name: _zeros((len(some), *f.shape), f.dtype, some.device) for f in self._missing}
        k, v = self.codec.decode({**page, **blank})
        return k if self.shape.k_dim else k[..., :0], v if self.shape.v_dim else v[..., :0]

    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.codec.read_query(queries) if self.shape.k_dim else (queries, None)

    def read_output(self, output: Tensor) -> Tensor:
        return self.codec.read_output(output) if self.shape.v_dim else output

    def read_value_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.codec.read_value_query(queries) if self.shape.v_dim else (queries, None)

    def read_key_output(self, output: Tensor) -> Tensor:
        return self.codec.read_key_output(output) if self.shape.k_dim else output

    def inverse(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        none = keys.new_zeros(1, 1, STAND_IN)
        if not self.shape.k_dim:  # as many coordinates as the codec has of the channels of zeros
            keys = keys.new_zeros(*keys.shape[:-1], self.codec.read_query(none)[0].shape[-1])
        if not self.shape.v_dim:
            values = values.new_zeros(*values.shape[:-1], self.codec.read_value_query(none)[0].shape[-1])
        k, v = self.codec.inverse(keys, values, streams)
        return k[..., : self.shape.k_dim], v[..., : self.shape.v_dim]

    def present(self, sides: KVLayout | None) -> KVLayout | None:
        """Those of K and V of the codec that it is of, without segments where there are no channels. Kernels do not
        read such pages as they are; those of latents are another matter, see `latent`."""
        if sides is None:
            return None
        known, key = memo(sides), (OneSidedCodec, bool(self.shape.k_dim), bool(self.shape.v_dim))
        found: KVLayout | None = known.get(key)
        if found is None:
            k, v = (
                SideLayout(side.segments, side.gain) if dim else SideLayout(())
                for side, dim in zip(sides, (self.shape.k_dim, self.shape.v_dim), strict=True)
            )
            found = known.setdefault(key, (k, v))
        return found

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
