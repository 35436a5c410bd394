"""The exact buffer: the sinks and the recent window of every stream, in the model's dtype.

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


class ExactBuffer:
    """Sinks and window of S streams: k [S, room, Dk], v [S, room, Dv], of which a stream's first counts [S] are tokens.

    Where the plan is latent, values are the first `width` channels of keys, and v holds none.

    A stream's first `plan.sinks` tokens stay where they are. When it is full (sinks + recent + one page), the oldest
    page after the sinks leaves, and the window moves up: a copy of the window every P tokens, never of the cache.
    """

    def __init__(self, plan: LayerPlan, keys: Tensor, values: Tensor) -> None:
        """Empty, for streams, dimensions, dtype and device of keys [B, Hkv, n, Dk] and values [B, Hkv, n, Dv]."""
        streams = keys.shape[0] * keys.shape[1]
        width = values.shape[-1]
        k, v = keys.new_zeros(streams, 0, keys.shape[-1]), values.new_zeros(streams, 0, 0 if plan.latent else width)
        self._hold(plan, k, v, torch.zeros(streams, dtype=COUNTER, device="cpu"), width)

    @classmethod
    def over(cls, plan: LayerPlan, k: Tensor, v: Tensor, counts: Tensor) -> ExactBuffer:
        """In tensors that somebody else owns, k [S, slots, Dk] and v [S, slots, Dv]; counts [S] on the host."""
        made = cls.__new__(cls)
        made._hold(plan, k, v, counts, v.shape[-1])
        return made

    def _hold(self, plan: LayerPlan, k: Tensor, v: Tensor, counts: Tensor, width: int) -> None:
        self.plan, self.k, self.v, self.counts, self.width = plan, k, v, counts, width
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

    def put(self, streams: Tensor, at: int, k: Tensor, v: Tensor) -> None:
        """Write k [s, n, Dk], v [s, n, Dv] from slot `at` on; the count of these streams then ends there."""
        end = at + k.shape[1]
        self._reserve(end)
        where = streams.to(self.k.device)
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
        if self.plan.latent:
            values = values[..., :0]
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
        k = self.k[where, behind]
        return k, k[..., : self.width] if self.plan.latent else self.v[where, behind]

    @property
    def values(self) -> Tensor:
        """[S, room, Dv], a view of the keys where those have them."""
        return self.k[..., : self.width] if self.plan.latent else self.v

    def of(self, stream: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """One stream's sinks and window, each as keys [n, Dk] and values [n, Dv]."""
        count = int(self.counts[stream])
        sinks = min(self.plan.sinks, count)
        k, v = self.k[stream], self.values[stream]
        return (k[:sinks], v[:sinks]), (k[sinks:count], v[sinks:count])

    @property
    def tokens(self) -> Tokens:
        """All that is held, as attention reads it."""
        return Tokens(self.k, self.values, self.placed)

    def select(self, streams: Tensor) -> None:
        """Keep, repeat and order streams."""
        on = streams.to(self.k.device)
        self.k, self.v, self.counts = self.k[on], self.v[on], self.counts[streams]
        self._forget()

    def fork(self) -> ExactBuffer:
        """A copy that goes on by itself."""
        twin = copy(self)
        twin.k, twin.v, twin.counts, twin._placed = self.k.clone(), self.v.clone(), self.counts.clone(), None
        return twin

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes; slots past a stream's count, which may hold forgotten tokens, are zero. k and v are
        what is stored of a token: of a latent, it and its rotary key."""
        k, v = (self.k[..., : self.width], self.k[..., self.width :]) if self.plan.latent else (self.k, self.v)
        idle = torch.arange(self.k.shape[1], device="cpu") >= self.counts[:, None]
        if bool(idle.any()):
            hidden = idle[..., None].to(self.k.device)
            k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        return {"k": k, "v": v, "counts": self.counts}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Become the buffer whose `state` this is, on `device`: one of the same streams, dimensions and dtypes.

        Raises:
            DamagedError: the state is none of such a buffer.
        """
        state = State.of(state, "exact")
        state.only("k", "v", "counts")
        streams, slots = len(self.counts), self.plan.slots
        dims = (self.width, self.k.shape[2] - self.width) if self.plan.latent else (self.k.shape[2], self.v.shape[2])
        k = state.tensor("k", (streams, None, dims[0]), self.k.dtype)
        v = state.tensor("v", (streams, k.shape[1], dims[1]), self.v.dtype)
        state.require(k.shape[1] <= slots, f"{k.shape[1]} slots, expected at most {slots}")
        counts = state.numbers("counts", (streams,), COUNTER, 0, min(k.shape[1], slots - 1))  # the next has a slot
        if self.plan.latent:
            k, v = torch.cat([k, v], -1), v.new_zeros(*v.shape[:2], 0)
        self.k, self.v, self.counts = k.to(device), v.to(device), counts
        self._forget()

    def _reserve(self, tokens: int) -> None:
        if tokens > self.k.shape[1]:
            more = self.plan.room(tokens) - self.k.shape[1]
            self.k, self.v = F.pad(self.k, (0, 0, 0, more)), F.pad(self.v, (0, 0, 0, more))
