"""Bit packing: codes of 1 to 8 bits as planes of 1, 2, 4 and 8 bits, so that no code straddles a byte."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvcomp.errors import SpecError
from kvcomp.layout import Field
from kvcomp.segments import Plane

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as so many bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] of 1, 2, 4 or 8 `bits` -> uint8 [..., n * bits / 8], the first code in the low bits."""
    per = 8 // bits
    if per == 1:
        return codes
    # as many codes at a time as share a byte, each shifted down to its place: little-endian, as in `unpack`
    words = codes.contiguous().view(WORDS[per])
    packed = words.clone()
    for i in range(1, per):
        packed |= words >> ((8 - bits) * i)
    return (packed & 255).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: [..., n] codes, int32 or uint8."""
    if bits == 8:
        return packed
    # a 32-bit word at a time where rows allow it: the same order on little-endian machines, and twice as fast
    words = packed.view(torch.int32) if packed.shape[-1] % 4 == 0 else packed
    shifts = torch.arange(0, 8 * words.itemsize, bits, dtype=words.dtype, device=packed.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def planes(bits: int) -> list[int]:
    """Widths that add up to `bits`, largest first: 3 -> [2, 1]."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def code_fields(name: str, bits: int, tokens: int, dim: int) -> tuple[Field, ...]:
    """The fields that hold `tokens` x `dim` codes of K or V (`name`), one for each plane.

    Raises:
        SpecError: a row of codes would not fill whole bytes.
    """
    multiple = 8 // planes(bits)[-1]
    if dim % multiple:
        raise SpecError(
            f"{name} has {dim} channels, which {bits}-bit codes do not fill whole bytes with: they need a multiple of "
            f"{multiple}; use other bits, or int8 or fp8"
        )
    return tuple(Field(f"{name}.codes{w}", (tokens, dim * w // 8), torch.uint8) for w in planes(bits))


def code_planes(name: str, bits: int) -> tuple[Plane, ...]:
    """Where kernels find the codes in the fields of `code_fields`."""
    return tuple(Plane(f"{name}.codes{w}", w) for w in planes(bits))


def pack_codes(name: str, codes: Tensor, bits: int) -> dict[str, Tensor]:
    """uint8 codes [M, P, D] -> the fields of `code_fields`; the largest plane has the highest bits."""
    fields, left = {}, bits
    for width in planes(bits):
        left -= width
        fields[f"{name}.codes{width}"] = pack((codes >> left) & ((1 << width) - 1), width)
    return fields


def unpack_codes(name: str, page: Mapping[str, Tensor], bits: int) -> Tensor:
    """Inverse of `pack_codes`: [M, P, D] codes, int32 or uint8."""
    first, *rest = planes(bits)
    codes = unpack(page[f"{name}.codes{first}"], first)
    for width in rest:
        codes = (codes << width) | unpack(page[f"{name}.codes{width}"], width)
    return codes
