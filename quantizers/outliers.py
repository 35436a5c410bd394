"""Outlier channels: the few channels of a stream that are louder than the rest, put first by its basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvcomp.segments import ReadMap

from .basis import Basis, each_page
from .centred import without_centres
from .codecs import GridCodec
from .per_stream import PerStream, weights

ORDER = torch.int16


@dataclass(frozen=True, kw_only=True)
class OutlierBasis(Basis):
    """A basis after an order of channels per stream: y = x[order] W, loudest channels first.

    The outlier channels of keys are the same for all tokens (QJL, 2406.03482, section 4.1). So a stream's order is
    settled once, by the energy of each channel in the first tokens that it encodes, and kept. It depends on that stream
    alone: rows of a batch do not change each other.

    orders: int16 [S, D]. centred: tokens of a page, where those are coded without their centre; None: they are not.
    """

    orders: PerStream
    centred: int | None = None

    @classmethod
    def unsettled(cls, matrix: Tensor, dual: Tensor | None = None, centred: int | None = None) -> OutlierBasis:
        """A basis with W [D, R] and its dual, that has seen nothing yet."""
        return cls(matrix, dual, orders=PerStream(len(matrix), ORDER, matrix.device, counted=True), centred=centred)

    def fit(self, streams: Tensor, x: Tensor, due: Tensor | None) -> None:
        """Settle the order of new streams by the energy of their channels in x [s, n, D]."""
        new = self.orders.new(streams, due)
        if new is not None:
            x = x.float() if self.centred is None else without_centres(x, self.centred)
            weight, unit = weights(x)
            energy = (x * weight / unit).square().sum(1)
            self.orders.settle(streams, new, energy.argsort(dim=-1, descending=True, stable=True))

    def write(self, x: Tensor, streams: Tensor) -> Tensor:
        return super().write(_arranged(x, self.orders.of(each_page(streams, len(x)))), streams)

    def read(self, queries: Tensor) -> Tensor:
        return super().read(_arranged(queries, self.orders.all(len(queries))))

    def inverse(self, y: Tensor, streams: Tensor) -> Tensor:
        return _arranged(super().inverse(y, streams), self.orders.of(each_page(streams, len(y))).argsort(-1))

    def map(self, streams: int) -> ReadMap:
        self.orders.reserve(streams)
        order = self.orders.values  # of n heads, where those share them
        known = self._made.get("map")
        if known is None or known.order is not order:
            plain = super().map(streams)
            assert plain.matrix is not None
            known = plain._replace(matrix=plain.matrix.expand(len(order), -1, -1), order=order)
            self._made["map"] = known
        return known

    @cached_property
    def _made(self) -> dict[str, ReadMap]:
        """The `map` of the orders that it was last asked for with."""
        return {}

    def fork(self) -> OutlierBasis:
        """A basis that settles by itself from here."""
        return replace(self, orders=self.orders.fork())

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, *self.orders.tensors]


@dataclass(frozen=True)
class OutlierCodec(GridCodec):
    """A `GridCodec` whose bases may be `OutlierBasis`."""

    @property
    def _outliers(self) -> dict[str, OutlierBasis]:
        bases = {"k": self.k_basis, "v": self.v_basis}
        return {side: basis for side, basis in bases.items() if isinstance(basis, OutlierBasis)}

    @property
    def adapts(self) -> bool:
        return bool(self._outliers)

    def fit(self, streams: Tensor, keys: Tensor, values: Tensor, due: Tensor | None = None) -> None:
        given = {"k": keys, "v": values}
        for side, basis in self._outliers.items():
            basis.fit(streams, given[side], due)

    def reserve(self, streams: int) -> None:
        for basis in self._outliers.values():
            basis.orders.reserve(streams)

    def read_output(self, output: Tensor) -> Tensor:
        self.reserve(len(output))
        return super().read_output(output)

    def read_value_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        self.reserve(len(queries))
        return super().read_value_query(queries)

    def read_maps(self, streams: int) -> tuple[ReadMap, ReadMap]:
        return self.k_basis.map(streams), self.v_basis.map(streams)

    def select(self, streams: Tensor) -> None:
        for basis in self._outliers.values():
            basis.orders.select(streams)

    def fork(self) -> OutlierCodec:
        k, v = (b.fork() if isinstance(b, OutlierBasis) else b for b in (self.k_basis, self.v_basis))
        return replace(self, k_basis=k, v_basis=v)

    def adapted(self) -> list[Tensor]:
        return [tensor for basis in self._outliers.values() for tensor in basis.orders.tensors]

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for side, basis in self._outliers.items():
            orders = basis.orders
            if orders.shared:
                state |= {f"{side}.order": orders.values, f"{side}.settled": orders.settled}
            else:
                state |= orders.state(f"{side}.order")
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for side, basis in self._outliers.items():
            if f"{side}.order" in state:  # saved when a head had one order for all rows: [H, D]
                basis.orders.share(state[f"{side}.order"].to(ORDER), state[f"{side}.settled"])
            else:
                basis.orders.restore(f"{side}.order", state)


def _arranged(x: Tensor, order: Tensor) -> Tensor:
    """The channels of x [M, P, D] in the order [M, D]."""
    return x.take_along_dim(order.long()[:, None], -1)
