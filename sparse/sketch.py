"""Sketch: a few coordinates of every key, in 4 bits, tell which tokens to read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.calibration.fitting import QueryMoments
from kvcomp.calibration.stage import FILE, Calibrated
from kvcomp.calibration.statistics import Statistics, weighted_directions
from kvcomp.stages import Choice, Index, PageShape, Summaries, arg
from kvcomp.stages.registry import register
from kvcomp.state import State

from .codes import TokenSelector, encode, step

DAMPING = 0.1  # share of the mean weight that every direction gets: queries to come are not quite those of the prompt


class Directions(Index):
    """Per stream, fitted when its first page is written: `write` [S, D, r] and `offset` [S, r] give the coordinates of
    keys in steps, `read` [S, D, r] those of queries, times the steps."""

    def __init__(self, selector: Sketch, shape: PageShape) -> None:
        super().__init__(selector)
        self.bits = selector.bits
        self.queries = QueryMoments(shape.k_dim, shape.device)
        self.write = torch.zeros(0, shape.k_dim, selector.rank, device=shape.device, dtype=torch.float32)
        self.read = self.write.clone()
        self.offset = torch.zeros(0, selector.rank, device=shape.device, dtype=torch.float32)

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        self.queries.add(streams, queries)

    def fit(self, streams: Tensor, keys: Tensor) -> None:
        new = self.queries.missing(streams)
        if not bool(new.any()):
            return
        ours, x = streams[new], keys[new].double()
        mean = x.mean(1, keepdim=True)
        x = x - mean
        weight = self.queries.take(ours).double()
        write, read = weighted_directions(x.mT @ x / x.shape[1], weight, DAMPING)
        write, read = (directions[..., : self.write.shape[-1]] for directions in (write, read))
        steps = step((x @ write).square().mean(1, keepdim=True).sqrt(), self.bits)  # [s, 1, r]
        self._room(int(streams.max()) + 1)
        self.write = self.write.index_put((ours,), (write / steps).float())  # forks share the old ones
        self.read = self.read.index_put((ours,), (read * steps).float())
        self.offset = self.offset.index_put((ours,), (mean @ (write / steps)).squeeze(1).float())

    def _room(self, streams: int) -> None:
        missing = streams - len(self.write)
        if missing > 0:
            self.write, self.read = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (self.write, self.read))
            self.offset = F.pad(self.offset, (0, 0, 0, missing))

    def summarize(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        return encode(torch.bmm(keys.float(), self.write[streams]) - self.offset[streams][:, None], self.bits)

    def choose(self, queries: Tensor, scale: float, held: Summaries) -> Choice:
        self._room(len(queries))
        return self.selector.select(torch.bmm(queries.float(), self.read), scale, held)

    def constants(self) -> list[Tensor]:
        return [self.write, self.read, self.offset, *self.queries.constants()]

    def adapted(self) -> list[Tensor]:
        return [self.read]

    def select(self, streams: Tensor) -> None:
        self._room(int(streams.max()) + 1 if len(streams) else 0)
        self.write, self.read, self.offset = self.write[streams], self.read[streams], self.offset[streams]
        self.queries.select(streams)

    def fork(self) -> Directions:
        twin = super().fork()
        assert isinstance(twin, Directions)
        twin.queries = self.queries.fork()
        return twin

    def state(self) -> dict[str, Tensor]:
        return {"write": self.write, "read": self.read, "offset": self.offset} | self.queries.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.write, self.read, self.offset = state["write"], state["read"], state["offset"]
        self.queries.restore(state)

    def lacks(self, paged: Tensor) -> str | None:
        return self.queries.lacks(paged, self.write, self.read, self.offset)


class HeadDirections(Index):
    """The same directions for all streams of a KV head, from a file: `write` and `read` [H, D, r], `offset` [H, r]."""

    def __init__(self, selector: Sketch, shape: PageShape) -> None:
        super().__init__(selector)
        file, dim, rank = selector.load(), shape.k_dim, selector.rank
        self.bits, self.heads = selector.bits, shape.heads
        steps = step(file.tensor("deviation", shape, dim)[:, None, :rank], self.bits)
        self.write = file.tensor("write", shape, dim, dim)[..., :rank] / steps
        self.read = file.tensor("read", shape, dim, dim)[..., :rank] * steps
        self.offset = torch.einsum("hd,hdr->hr", file.tensor("mean", shape, dim), self.write)

    def summarize(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        head = streams % self.heads
        return encode(torch.bmm(keys.float(), self.write[head]) - self.offset[head][:, None], self.bits)

    def choose(self, queries: Tensor, scale: float, held: Summaries) -> Choice:
        read = self.read.repeat(len(queries) // self.heads, 1, 1)
        return self.selector.select(torch.bmm(queries.float(), read), scale, held)

    def constants(self) -> list[Tensor]:
        return [self.write, self.read, self.offset]


@register("sketch")
@dataclass(frozen=True)
class Sketch(TokenSelector, Calibrated):
    """Sketch: a decode query reads the single tokens that a few coordinates of their keys promise most attention.

    A page holds `rank` coordinates of each key in `bits` bits: 8 bytes a token, where a key of 128 channels and its
    value are 512 in bfloat16. They lie along the directions that matter most to q . k, as in `klt`: per KV head, the
    eigenvectors of S^1/2 C S^1/2, S the second moment of the prompt's queries and C the covariance of its keys, fitted
    when the first page is written. So no calibration is needed, and the scan gives every token an estimate of its
    attention, where methods of pages mix near and far. Tokens are read one by one where the quantizer's fields are per
    token (none, int8, turboquant, klt, ...); else, as with kivi, whole pages by the sum of what their tokens promise.
    Cf. Loki (principal components of keys) and Double Sparsity (a few of their channels).

    Ours; compare arXiv 2406.02542 and 2408.07092.
    """

    paper: ClassVar[str] = "kvcomp; cf. arXiv:2406.02542, arXiv:2408.07092"
    required: ClassVar[bool] = False

    calibration: str | None = arg(None, f"{FILE}; None: fitted to the prompt")

    @classmethod
    def calibrate(cls, seen: Statistics) -> dict[str, Tensor]:
        """write and read [H, D, D] of keys and queries, the weightiest direction first; the keys' mean [H, D] and their
        deviation [H, D] along each."""
        write, read = weighted_directions(seen.key_covariance, seen.queries, DAMPING)
        variance = torch.einsum("hdr,hde,her->hr", write, seen.key_covariance, write)
        deviation = variance.clamp_min(0).sqrt()
        return {"write": write, "read": read, "mean": seen.key_mean, "deviation": deviation}

    @classmethod
    def check_layer(cls, layer: State) -> None:
        write = layer.finite("write", (None, None, None), torch.float32)
        heads, dim, _ = write.shape
        layer.finite("write", (heads, dim, dim), torch.float32)
        layer.finite("read", (heads, dim, dim), torch.float32)
        layer.finite("mean", (heads, dim), torch.float32)
        deviation = layer.finite("deviation", (heads, dim), torch.float32)
        layer.require(bool((deviation >= 0).all()), "deviation is negative")
        layer.require(bool(write.any()), "write is 0")

    @property
    def default(self) -> tuple[str, float]:
        return "keep", 0.1

    @property
    def needs_queries(self) -> bool:
        return self.calibration is None

    def index(self, shape: PageShape) -> Index:
        return Directions(self, shape) if self.calibration is None else HeadDirections(self, shape)

    def index_bytes(self, shape: PageShape) -> tuple[int, int]:
        if self.calibration is not None:
            return 0, 0
        directions = shape.k_dim * self.rank * torch.float32.itemsize
        return 2 * directions + self.rank * torch.float32.itemsize, directions
