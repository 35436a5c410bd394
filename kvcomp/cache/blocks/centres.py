"""Centres of pages that are written token by token.

Such a page is read before its keys are known, so that its centre cannot be their mean. It is what a model adds to all
keys, a bias b, turned by the rotary embedding R as at the page's middle position p:

    c(p) = R(p) b = sum_i f_i(p) W_i,    f = (cos(p w_1), .., sin(p w_1), .., 1)

It depends on the position alone, as no block may depend on a request. A poor guess costs accuracy and nothing else:
what is subtracted from keys is given back to their logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp.finite import saturated
from kvcomp.layout import Field, PageLayout
from kvcomp.segments import centres
from kvcomp.stages import Codec


class Turned(NamedTuple):
    """The biases of a layer's H heads at any position: frequencies w float32 [w], weights W float32 [F, H, dim].

    F = 2 w + 1; or 0 where the model has no biases, and centres are 0.
    """

    frequencies: Tensor
    weights: Tensor

    @classmethod
    def nothing(cls, heads: int, dim: int, device: torch.device) -> Turned:
        return cls(*(torch.zeros(size, dtype=torch.float32, device=device) for size in ((0,), (0, heads, dim))))

    def of_rank(self, heads: int, rank: int, ranks: int) -> Turned:
        """Of the `heads` heads that a rank has; heads are repeated where there are more ranks."""
        held = self.weights.shape[1]
        first = rank * heads if held >= ranks * heads else rank * held // ranks
        return self._replace(weights=self.weights[:, first : first + heads])

    def to(self, device: torch.device) -> Turned:
        return Turned(*(x.to(device) for x in self))


def turned(heads: Tensor, frequencies: Tensor, factor: float) -> Turned:
    """Biases heads [H, dim], of which channels i and w + i turn with frequencies [w] and are multiplied by factor."""
    half = len(frequencies)
    cos, sin = (torch.zeros(half, *heads.shape, dtype=torch.float64, device="cpu") for _ in range(2))
    for i in range(half):
        a, b = heads[:, i] * factor, heads[:, half + i] * factor
        cos[i, :, i], cos[i, :, half + i] = a, b
        sin[i, :, i], sin[i, :, half + i] = -b, a
    rest = heads.double().clone()
    rest[:, : 2 * half] = 0
    return Turned(frequencies.float(), torch.cat([cos, sin, rest[None]]).float())


def turns(frequencies: Tensor, positions: Tensor) -> Tensor:
    """f float32 [t, F] of positions [t]."""
    if not len(frequencies):
        return frequencies.new_zeros(len(positions), 0)
    angles = positions.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin(), torch.ones_like(angles[:, :1])], -1)


def middle(page: Tensor, page_size: int) -> Tensor:
    """float32: the middle position of each page of `page_size` tokens."""
    return page.to(torch.float32) * page_size + (page_size - 1) / 2


class Centres:
    """Writes and reads the centres of a layer's pages.

    weights float32 [F, H, D]: of the keys that centres are, see `Turned`.
    """

    def __init__(self, codec: Codec, layout: PageLayout, weights: Tensor) -> None:
        self.codec, self.layout = codec, layout
        self.parts: list[tuple[Field, slice, Tensor]] = []  # channels, float64 weights of their coordinates
        sides, (count, heads, _) = codec.kernel_layouts(), weights.shape
        if not layout.centres or sides is None:
            return
        self.channels, self.v_dim = sides[0].channels, sides[1].channels
        streams, keys = torch.arange(heads, device=weights.device).repeat(count), weights.flatten(0, 1)[:, None]
        given = codec.kernel_input(keys, keys, streams)
        assert given is not None
        coordinates = given[0].unflatten(0, (count, heads))[:, :, 0]  # linear in keys
        where = centres(sides[0])
        for field in layout.centres:
            channels = where[field.name]
            self.parts.append((field, channels, coordinates[..., channels].flatten(1).double()))

    def begin(self, pool: Tensor, records: Tensor, factors: Tensor, begins: Tensor | None) -> None:
        """Write the centres of pages that begin: `records` int64 [b * H] of the pool, of positions whose `turns` are
        `factors` [b, F]; of them those that bool [b * H, 1] `begins`, None: all."""
        if not len(records):
            return
        for field, _, weights in self.parts:
            held = self.layout.view(pool, field)[:, 0]
            # products of float32 round by the number of rows: a page's centre would depend on who begins one with it
            made = saturated((factors.double() @ weights).view(len(records), -1), held.dtype)
            held[records] = made if begins is None else torch.where(begins, made, held[records])

    def of(self, pool: Tensor, records: Tensor, heads: Tensor) -> Tensor:
        """Keys float32 [m, 1, D] that are the centres of `records` int64 [m] of the pool, of these heads [m]."""
        if len(self.parts) == 1 and not self.codec.rotates:
            return self.layout.view(pool, self.parts[0][0])[records].float()
        found = torch.zeros(len(records), 1, self.channels, dtype=torch.float32, device=pool.device)
        for field, channels, _ in self.parts:
            found[..., channels] = self.layout.view(pool, field)[records].float()
        return self.codec.inverse(found, found.new_zeros(len(found), 1, self.v_dim), heads)[0]
