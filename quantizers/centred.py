"""Centred keys: each stream's mean key is subtracted before coding, and comes back as a bias on the logits of pages."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from kvcomp.layout import Field
from kvcomp.segments import Sides
from kvcomp.stages import Codec, PageShape

from .per_stream import TINY, PerStream, weights

MEAN = torch.float32
STATE = "k.centre"  # in saved caches
NOTABLE = 1 / 8
LARGEST = 1e30  # of a mean: a finite key minus it is finite


def centre(keys: Tensor) -> Tensor:
    """Mean key m [s, D] of keys [s, n, D], float32, in which single loud tokens count for little (`weights`).

    0 where |m|^2 is less than NOTABLE of the variance, summed over channels: there is little to gain, and keys that are
    centred are coded as they are.
    """
    weight, unit = weights(keys := keys.float())
    y = keys * weight / unit  # in units of a stream's median token: no square overflows
    mean = y.sum(1) / weight.sum(1).clamp_min(TINY)
    variance = (y - weight * mean[:, None]).square().sum((1, 2)) / weight.square().sum((1, 2)).clamp_min(TINY)
    notable = mean.square().sum(-1) > NOTABLE * variance
    return (mean * unit[:, 0] * notable[:, None]).clamp(-LARGEST, LARGEST)


class CentredCodec(Codec):
    """A codec of keys minus a mean m of their stream: q . k ~ q . decode(encode(k - m)) + q . m.

    Some models (Qwen2 and others with large key biases) have keys that are nearly constant over a text. A grid that
    spans a token, or a norm, then resolves the constant and not what differs. Softmax does not see what all tokens
    share; as exact tokens keep their full logits, q . m is added to those of pages.

    m is settled by the first tokens that a stream encodes and never changes, so that a row depends on nothing but
    itself; or it is fixed, given or none at all.
    """

    def __init__(self, inner: Codec, dim: int, device: torch.device) -> None:
        self.inner = inner
        self.means: PerStream | None = PerStream(dim, MEAN, device)

    # -- the mean -------------------------------------------------------------------------------------------------

    def fix(self, mean: Tensor | None) -> None:
        self.inner.fix(None)
        if mean is None:
            self.means = None
        elif self.means is not None:
            mean = mean.to(self.means.values)
            self.means.share(mean, mean.new_ones(len(mean), dtype=torch.bool))

    def room(self, streams: int) -> None:
        if self.means is not None:
            self.means.room(streams)
        self.inner.room(streams)

    def fit(self, streams: Tensor, keys: Tensor, values: Tensor, due: Tensor | None = None) -> None:
        if self.means is not None and (new := self.means.new(streams, due)) is not None:
            self.means.settle(streams, new, centre(keys))
        if type(self.inner).fit is not Codec.fit:
            self.inner.fit(streams, self._minus(keys, streams), values, due)

    def _minus(self, keys: Tensor, streams: Tensor) -> Tensor:
        return keys if self.means is None else keys.float() - self.means.of(streams)[:, None]

    # -- the codec ------------------------------------------------------------------------------------------------

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return self.inner.lossless

    @property
    def hosted(self) -> bool:  # type: ignore[override]
        return self.inner.hosted

    @property
    def rotates(self) -> bool:
        return self.inner.rotates

    @property
    def biased(self) -> bool:
        return self.means is not None or self.inner.biased

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.inner.fields

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        return self.inner.encode(self._minus(keys, streams), values, streams)

    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.inner.kernel_input(self._minus(keys, streams), values, streams)

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.inner.decode(page)

    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        rotated, bias = self.inner.read_query(queries)
        if self.means is None or not len(self.means.settled):
            return rotated, bias
        shift = torch.bmm(queries.float(), self.means.all(len(queries))[..., None]).squeeze(-1)
        return rotated, shift if bias is None else bias + shift

    def read_output(self, output: Tensor) -> Tensor:
        return self.inner.read_output(output)

    def inverse(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.inner.inverse(keys, values, streams)
        return (k if self.means is None else k + self.means.of(streams)[:, None]), v

    def kernel_sides(self) -> Sides | None:
        return self.inner.kernel_sides()

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        self.inner.observe(streams, queries)

    # -- what it holds --------------------------------------------------------------------------------------------

    @property
    def _settles(self) -> PerStream | None:
        """The means, where streams have their own."""
        return None if self.means is None or self.means.shared else self.means

    def constants(self) -> list[Tensor]:
        return [*self.inner.constants(), *(() if self.means is None else self.means.tensors)]

    def adapted(self) -> list[Tensor]:
        return [*self.inner.adapted(), *(() if self._settles is None else self._settles.tensors)]

    def select(self, streams: Tensor) -> None:
        self.inner.select(streams)
        if self._settles is not None:
            self._settles.select(streams)

    def fork(self) -> CentredCodec:
        twin = copy(self)
        twin.inner, twin.means = self.inner.fork(), None if self.means is None else self.means.fork()
        return twin

    def state(self) -> dict[str, Tensor]:
        return self.inner.state() | ({} if self._settles is None else self._settles.state(STATE))

    def lacks(self, paged: Tensor) -> str | None:
        return self.inner.lacks(paged)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.inner.restore(state)
        if f"{STATE}.values" not in state:  # saved before keys were centred: its pages have no mean
            self.means = None
        elif self.means is not None:
            self.means.restore(STATE, state)


def centred(codec: Codec, shape: PageShape) -> CentredCodec:
    """The codec, of keys without their stream's mean."""
    return CentredCodec(codec, shape.k_dim, shape.device)


def centre_bytes(shape: PageShape) -> int:
    """Bytes per stream of what `centred` adds, as in `Quantizer.adapted_bytes`."""
    return shape.k_dim * MEAN.itemsize + torch.bool.itemsize
