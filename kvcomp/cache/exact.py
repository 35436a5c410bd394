"""The exact buffer: the sinks and the recent window of every stream, in the model's dtype or fewer bits.

It is no ring, as the window in an engine's blocks is (`geometry.slot`). Kernels read a stream's first tokens,
[:counts], in place. A ring whose oldest page has left begins and ends anywhere: every kernel (C, Triton, PyTorch) would
need a start per stream and a second run of tokens, or a gather of the window in each step, as blocks do it. Sums would
have another order, so that results would no longer be equal to the bit; crops, beams and saved caches, which have the
oldest token first, would have to turn it. What a ring would save is the move of `recent` tokens once in P steps: of
recent / P tokens a step, beside sinks + recent + P / 2 that attention reads in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.attention import Tokens
from kvcomp.kernels.dispatch import append
from kvcomp.stages.plan import COUNTER, LayerPlan
from kvcomp.state import State

from .rows import Rows


class ExactBuffer:
    """Sinks and window of S streams: k [S, room, Dk], v [S, room, Dv], of which a stream's first counts [S] are tokens.

    k and v are `Rows`, as wide as those are. mean [S, 1, Dk]: the median of the keys that came first to a stream, which
    those of 8 bits are less; [S, 0, Dk] otherwise. Where the plan is latent, values are the first `width` channels of
    keys, and v holds none.

    A stream's first `plan.sinks` tokens stay where they are. When it is full (sinks + recent + one page), the oldest
    page after the sinks leaves, and the window moves up: a copy of the window every P tokens, never of the cache.
    """

    def __init__(self, plan: LayerPlan, keys: Tensor, values: Tensor) -> None:
        """Empty, for streams, dimensions, dtype and device of keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv]."""
        streams = keys.shape[0] * keys.shape[1]
        dims, width, rows = (keys.shape[-1], values.shape[-1]), values.shape[-1], Rows(plan.exact_bits, keys.dtype)
        k = keys.new_zeros(streams, 0, rows.width(dims[0]), dtype=rows.stored)
        v = values.new_zeros(streams, 0, 0 if plan.latent else rows.width(width), dtype=rows.stored)
        self._hold(plan, k, v, torch.zeros(streams, dtype=COUNTER, device="cpu"), rows, dims)

    @classmethod
    def over(cls, plan: LayerPlan, k: Tensor, v: Tensor, counts: Tensor, dtype: torch.dtype) -> ExactBuffer:
        """In tensors that somebody else owns, k [S, slots, Dk] and v [S, slots, Dv], which are no codes, for a model's
        `dtype`; counts [S] on the host."""
        made = cls.__new__(cls)
        made._hold(plan, k, v, counts, Rows(plan.exact_bits, dtype), (k.shape[-1], v.shape[-1]))
        return made

    def _hold(self, plan: LayerPlan, k: Tensor, v: Tensor, counts: Tensor, rows: Rows, dims: tuple[int, int]) -> None:
        self.plan, self.k, self.v, self.counts = plan, k, v, counts
        self.rows, self.dims, self.width = rows, dims, dims[1]
        self.mean = k.new_zeros(len(counts), int(rows.coded), dims[0], dtype=rows.dtype)
        self._forget()

    def _forget(self) -> None:
        """Counts have changed, by more than one for all."""
        self._bounds: tuple[int, int] | None = None
        self._placed: Tensor | None = None

    @property
    def placed(self) -> Tensor:
        """The counts on the keys' device, where a kernel counts along with the host."""
        if self.k.is_cpu:
            return self.counts
        if self._placed is None:
            self._placed = self.counts.to(self.k.device)
        return self._placed

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one stream."""
        return (self.k.shape[-1] + self.v.shape[-1]) * self.k.itemsize

    @property
    def bounds(self) -> tuple[int, int]:
        """The tokens of the shortest and of the longest stream."""
        if self._bounds is None:
            shortest, longest = self.counts.aminmax()
            self._bounds = int(shortest), int(longest)
        return self._bounds

    @property
    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]

    def _encode(self, streams: Tensor | slice, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of keys [s, n, Dk] and values [s, n, Dv] of streams that hold equally many tokens."""
        if self.rows.coded and k.shape[1]:
            if not int(self.counts[streams].max() if len(self.counts) else 0):
                self.mean = self.mean.clone()  # forks share it
                self.mean[streams] = k.median(1, keepdim=True).values  # one sink of another kind counts for little
            k = k - self.mean[streams]
        return self.rows.encode(k), self.rows.encode(v[..., :0] if self.plan.latent else v)

    def _decode(self, streams: Tensor | slice | int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [s, n, Dk] and values [s, n, Dv] of such rows, in the model's dtype."""
        k = self.rows.decode(k, self.dims[0])
        k = k + self.mean[streams] if self.rows.coded else k
        return k, k[..., : self.width] if self.plan.latent else self.rows.decode(v, self.width)

    def put(self, streams: Tensor, at: int, k: Tensor, v: Tensor) -> None:
        """Write k [s, n, Dk], v [s, n, Dv] from slot `at` on; the count of these streams then ends there."""
        end = at + k.shape[1]
        self._reserve(end)
        where = streams.to(self.k.device)
        k, v = self._encode(where, k, v)
        self.k[where, at:end] = k
        if not self.plan.latent:
            self.v[where, at:end] = v
        self.recount(streams, end)

    def recount(self, streams: Tensor | slice | int, counts: Tensor | int) -> None:
        """Let these streams hold so many tokens."""
        self.counts[streams] = counts
        self._forget()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """One more token for every stream: keys [B, Hkv, 1, Dk], values [B, Hkv, 1, Dv]."""
        shortest, longest = self.bounds
        self._reserve(longest + 1)
        if self.rows.coded:
            both = self._encode(slice(None), keys.flatten(0, 1), values.flatten(0, 1))
            keys, values = (x.unflatten(0, keys.shape[:2]) for x in both)
        else:
            values = values[..., :0] if self.plan.latent else values
            if self.rows.stored is not keys.dtype:
                keys, values = self.rows.encode(keys), self.rows.encode(values)
        if append(self.k, self.v, self.placed, keys, values):
            if self._placed is not None:
                self.counts += 1
            self._bounds = shortest + 1, longest + 1
            return
        k, v = keys.reshape(len(self.counts), -1), values.reshape(len(self.counts), -1)
        if shortest == longest:
            self.k[:, longest], self.v[:, longest] = k, v
        else:
            every, slot = torch.arange(len(self.counts), device=k.device), self.counts.to(k.device)
            self.k[every, slot], self.v[every, slot] = k, v
        self.counts += 1
        self._bounds, self._placed = (shortest + 1, longest + 1), None

    def window(self, streams: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Copies of what streams that hold `count` tokens have after their sinks: [s, count - sinks, D]."""
        where, behind = streams.to(self.k.device), slice(self.plan.sinks, count)
        return self._decode(where, self.k[where, behind], self.v[where, behind])

    @property
    def values(self) -> Tensor:
        """[S, room, Dv], a view of the keys where those have them; of rows that are no codes."""
        return self.k[..., : self.width] if self.plan.latent else self.v

    def of(self, stream: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """One stream's sinks and window, each as keys [n, Dk] and values [n, Dv]."""
        count = int(self.counts[stream])
        sinks = min(self.plan.sinks, count)
        k, v = self._decode(stream, self.k[stream], self.v[stream])
        return (k[:sinks], v[:sinks]), (k[sinks:count], v[sinks:count])

    @property
    def tokens(self) -> Tokens:
        """All that is held, as attention reads it: codes are decoded, as far as there are some."""
        if self.rows.coded:
            longest, every = self.bounds[1], slice(None)
            return Tokens(*self._decode(every, self.k[:, :longest], self.v[:, :longest]), self.placed)
        return Tokens(self.k, self.values, self.placed)

    def select(self, streams: Tensor) -> None:
        """Keep, repeat and order streams."""
        on = streams.to(self.k.device)
        self.k, self.v, self.counts = self.k[on], self.v[on], self.counts[streams]
        self._forget()
        self.mean = self.mean[on]

    def fork(self) -> ExactBuffer:
        """A copy that goes on by itself."""
        twin = copy(self)
        twin.k, twin.v, twin.counts, twin._placed = self.k.clone(), self.v.clone(), self.counts.clone(), None
        return twin

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes; slots past a stream's count, which may hold forgotten tokens, are zero. k and v are
        a token in the model's dtype, from which the same rows are made again: of a latent, it and its rotary key."""
        k, v = self._decode(slice(None), self.k, self.v)
        if self.plan.latent:
            k, v = k[..., : self.width], k[..., self.width :]
        idle = torch.arange(self.k.shape[1], device="cpu") >= self.counts[:, None]
        if bool(idle.any()):
            hidden = idle[..., None].to(self.k.device)
            k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        state = {"k": k, "v": v, "counts": self.counts}
        return state | {"mean": self.mean} if self.rows.coded else state

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Become the buffer whose `state` this is, on `device`: one of the same streams, dimensions and dtypes.

        Raises:
            DamagedError: the state is none of such a buffer.
        """
        state = State.of(state, "exact")
        state.only("k", "v", "counts", *(("mean",) if self.rows.coded else ()))
        streams, slots, dtype = len(self.counts), self.plan.slots, self.rows.dtype
        dims = (self.width, self.dims[0] - self.width) if self.plan.latent else self.dims
        k = state.tensor("k", (streams, None, dims[0]), dtype)
        v = state.tensor("v", (streams, k.shape[1], dims[1]), dtype)
        state.require(k.shape[1] <= slots, f"{k.shape[1]} slots, expected at most {slots}")
        counts = state.numbers("counts", (streams,), COUNTER, 0, min(k.shape[1], slots - 1))  # the next has a slot
        if self.plan.latent:
            k, v = torch.cat([k, v], -1), v.new_zeros(*v.shape[:2], 0)
        if self.rows.coded:
            mean = state.tensor("mean", (streams, 1, self.dims[0]), dtype)
            self.mean, k = mean.to(device), k - mean
        k, v = (self.rows.encode(x.to(device)) for x in (k, v))
        self.k, self.v, self.counts = k, v, counts
        self._forget()

    def _reserve(self, tokens: int) -> None:
        if tokens > self.k.shape[1]:
            more = self.plan.room(tokens) - self.k.shape[1]
            self.k, self.v = F.pad(self.k, (0, 0, 0, more)), F.pad(self.v, (0, 0, 0, more))
