"""Decoding from many caches: each alone until its time is known, then all in one batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kvcomp import CompressedCache
from kvcomp.benchmarks import memory
from kvcomp.integrations.huggingface.lockstep import can_step_together, lockstep
from kvcomp.integrations.huggingface.timing import clock

TIMED = 8  # steps that a cache takes alone; their median is its time per token


class Reader(Protocol):
    """What is fed to a cache, and what is made of the logits.

    token: the next one to feed, None once there is nothing left to do; prediction and score are known by then. steps:
    how many were taken.
    """

    token: int | None

    @property
    def steps(self) -> int: ...
    @property
    def prediction(self) -> str: ...
    @property
    def score(self) -> float: ...

    def take(self, logits: Tensor) -> None:
        """Logits [V] behind the token that was fed."""
        ...


class Answer:
    """Greedy decoding from the prompt's last token until `finished(tokens)`, or for `limit` tokens."""

    def __init__(
        self,
        token: int,
        limit: int,
        finished: Callable[[list[int]], bool],
        text: Callable[[list[int]], str],
        grade: Callable[[str], float],
    ) -> None:
        self.token: int | None = token
        self.limit, self.finished, self.text, self.grade = limit, finished, text, grade
        self.tokens: list[int] = []

    @property
    def steps(self) -> int:
        return len(self.tokens)

    @property
    def prediction(self) -> str:
        return self.text(self.tokens)

    @property
    def score(self) -> float:
        return self.grade(self.prediction)

    def take(self, logits: Tensor) -> None:
        self.tokens.append(int(logits.argmax()))
        more = len(self.tokens) < self.limit and not self.finished(self.tokens)
        self.token = self.tokens[-1] if more else None


class Surprise:
    """Feeds given tokens; the score is the mean nll of all but the first, in nats."""

    prediction = ""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.steps, self.nll = tokens, 0, 0.0
        self.token: int | None = tokens[0]

    @property
    def score(self) -> float:
        return self.nll / self.steps

    def take(self, logits: Tensor) -> None:
        self.steps += 1
        self.nll -= float(logits.float().log_softmax(-1)[self.tokens[self.steps]])
        self.token = self.tokens[self.steps] if self.steps + 1 < len(self.tokens) else None


@dataclass
class Decoding:
    """One cache and what is decoded from it. working: bytes that a step needs besides the cache, None if unknown."""

    cache: CompressedCache
    reader: Reader
    seconds: list[float] = field(default_factory=list)
    working: int | None = None

    @property
    def ms_per_token(self) -> float:
        return 1000 * statistics.median(self.seconds)

    @property
    def peak(self) -> int | None:
        """The most bytes that the cache and a step needed."""
        return None if self.working is None else self.cache.memory().held + self.working


def run_all(model: Any, decodings: Sequence[Decoding]) -> Iterator[Decoding]:
    """Decode from every cache until its reader is done, and yield it then.

    Each takes its first `TIMED` steps alone and timed. What then remains runs as one batch, whose rows are computed as
    each would be alone (`lockstep`), so that many caches cost little more than one. Caches with layers that cannot be
    batched go on alone.
    """
    left = []
    for decoding in decodings:
        _alone(model, decoding, TIMED if can_step_together(decoding.cache) else None)
        if decoding.reader.token is None:
            yield decoding
        else:
            left.append(decoding)
    while left:
        batch = lockstep([decoding.cache for decoding in left])
        while all(decoding.reader.token is not None for decoding in left):
            tokens = [decoding.reader.token for decoding in left]
            for decoding, logits in zip(left, _step(model, tokens, batch), strict=True):
                decoding.reader.take(logits)
        yield from (decoding for decoding in left if decoding.reader.token is None)
        left = [decoding for decoding in left if decoding.reader.token is not None]


def _alone(model: Any, decoding: Decoding, steps: int | None) -> None:
    begun = decoding.cache.memory().held
    growth = memory.watch(model.device)
    while decoding.reader.token is not None and (steps is None or len(decoding.seconds) < steps):
        start = clock(model.device)
        (logits,) = _step(model, [decoding.reader.token], decoding.cache)
        decoding.reader.take(logits)
        decoding.seconds.append(clock(model.device) - start)
    grown = growth()
    if grown is not None:
        decoding.working = max(grown - (decoding.cache.memory().held - begun), 0)


def _step(model: Any, tokens: Sequence[int | None], cache: Any) -> Tensor:
    """Logits [n, V] behind a token of each of n rows."""
    ids = torch.tensor(tokens, device=model.device)[:, None]
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits[:, -1]
