"""Outlier channels: the few channels of a head that are louder than the rest, put first by its basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcomp.state import DamagedError

from .basis import Basis
from .codecs import GridCodec


@dataclass(frozen=True, kw_only=True)
class OutlierBasis(Basis):
    """A basis behind an order of channels per KV head: y = x[order] W, loudest channels first.

    The outlier channels of keys are the same for all tokens (QJL, 2406.03482, section 4.1), and nearly the same for all
    texts. So a head's order is settled once, by the energy of each channel in the first pages that the head encodes,
    and kept: it belongs to the head and not to a stream, so that beams may move and rows come and go.

    order: int64 [H, D], updated in place; stream s uses row s mod H.
    settled: bool [H], whether a head's order is final; until then it is that of the channels.
    """

    order: Tensor
    settled: Tensor

    @classmethod
    def unsettled(cls, heads: int, matrix: Tensor, dual: Tensor | None = None) -> OutlierBasis:
        """A basis of `heads` heads that all use W [D, R] and its dual, and have seen nothing yet."""
        order = torch.arange(len(matrix), device=matrix.device).repeat(heads, 1)
        settled = torch.zeros(heads, dtype=torch.bool, device=matrix.device)
        return cls(matrix, dual, order=order, settled=settled)

    def write(self, x: Tensor, streams: Tensor) -> Tensor:
        """Coordinates [M, P, R] of x [M, P, D], pages of `streams` [M]; settles the order of heads that are new."""
        self._settle(x, streams)
        return super().write(_arranged(x, self.order, streams), streams)

    def read(self, queries: Tensor) -> Tensor:
        return super().read(_arranged(queries, self.order, torch.arange(len(queries), device=queries.device)))

    def inverse(self, y: Tensor, streams: Tensor) -> Tensor:
        return _arranged(super().inverse(y, streams), self.order.argsort(-1), streams)

    def _settle(self, x: Tensor, streams: Tensor) -> None:
        """Order the channels of heads that are not settled by their energy in x [M, P, D]."""
        heads = len(self.order)
        own = streams % heads == torch.arange(heads, device=x.device)[:, None]  # [H, M]
        energy = own.float() @ x.float().square().sum(1)
        new = own.any(1) & ~self.settled
        loudest = energy.argsort(dim=-1, descending=True, stable=True)
        self.order.copy_(torch.where(new[:, None], loudest, self.order))
        self.settled.logical_or_(new)

    def fork(self) -> OutlierBasis:
        """A basis that settles by itself from here."""
        return replace(self, order=self.order.clone(), settled=self.settled.clone())

    def state(self) -> dict[str, Tensor]:
        """What data decided, by name."""
        return {"order": self.order, "settled": self.settled}

    @property
    def tensors(self) -> list[Tensor]:
        return [*super().tensors, self.order, self.settled]


@dataclass(frozen=True)
class OutlierCodec(GridCodec):
    """A `GridCodec` whose bases may be `OutlierBasis`: what they settled travels with a saved cache."""

    def fork(self) -> OutlierCodec:
        k, v = (b.fork() if isinstance(b, OutlierBasis) else b for b in (self.k_basis, self.v_basis))
        return replace(self, k_basis=k, v_basis=v)

    def state(self) -> dict[str, Tensor]:
        bases = {"k": self.k_basis, "v": self.v_basis}
        outliers = {side: basis for side, basis in bases.items() if isinstance(basis, OutlierBasis)}
        return {f"{side}.{name}": tensor for side, basis in outliers.items() for name, tensor in basis.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            given = state[name]
            channels = torch.arange(given.shape[-1], device=given.device)
            if name.endswith(".order") and not given.is_meta and bool((given.sort(-1).values != channels).any()):
                raise DamagedError(f"{name} does not name every channel once")
            tensor.copy_(given)


def _arranged(x: Tensor, order: Tensor, streams: Tensor) -> Tensor:
    """The channels of x [M, P, D] in the order [H, D] of the heads of `streams` [M]."""
    return x.take_along_dim(order[streams % len(order)][:, None], -1)
