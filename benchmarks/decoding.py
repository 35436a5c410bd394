"""Decoding from many caches: each alone until its time is known, then all in one batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kvcomp import CompressedCache
from kvcomp.benchmarks import memory
from kvcomp.integrations.huggingface.forward import with_cache
from kvcomp.integrations.huggingface.lockstep import can_step_apart, can_step_together, lockstep
from kvcomp.integrations.huggingface.timing import clock

TIMED = 8  # steps that a cache takes alone; their median is its time per token
CHUNK = 16  # known tokens fed together after that


class Reader(Protocol):
    """What is fed to a cache, and what is made of the logits. steps: how many tokens were fed.

    Once there is nothing left to feed, prediction and score are known.
    """

    @property
    def steps(self) -> int: ...
    @property
    def prediction(self) -> str: ...
    @property
    def score(self) -> float: ...

    def ahead(self, most: int) -> list[int]:
        """The next tokens to feed, at most so many of those that are known; none once it is done."""
        ...

    def take(self, logits: Tensor) -> None:
        """Logits [n, V] after the n tokens that were fed."""
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

    def ahead(self, most: int) -> list[int]:
        return [] if self.token is None else [self.token]

    def take(self, logits: Tensor) -> None:
        self.tokens.append(int(logits[-1].argmax()))
        more = len(self.tokens) < self.limit and not self.finished(self.tokens)
        self.token = self.tokens[-1] if more else None


class Forced:
    """Feeds all of the given tokens but the last, whatever is predicted."""

    prediction = ""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.steps = tokens, 0

    def ahead(self, most: int) -> list[int]:
        last = len(self.tokens) - 2  # fed alone, so that what is read at the end is what a decode step reads
        return self.tokens[self.steps : max(min(self.steps + most, last), self.steps + 1)][: last + 1 - self.steps]


class Surprise(Forced):
    """The score is the mean nll of all tokens but the first, in nats."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(tokens)
        self.nll = 0.0

    @property
    def score(self) -> float:
        return self.nll / self.steps

    def take(self, logits: Tensor) -> None:
        n = len(logits)
        following = torch.tensor(
            self.tokens[self.steps + 1 : self.steps + 1 + n], device=logits.device, dtype=torch.int64
        )
        self.nll += float(functional.cross_entropy(logits.float(), following, reduction="sum"))
        self.steps += n


class Agreement(Forced):
    """Compares the predicted distributions q with given ones p, a row of logits [n, V] for each of n fed tokens.

    For each token: kl = sum p log(p / q) in nats, overlap = sum min(p, q) = 1 - TVD, and top1: whether both have the
    same most likely token. The score is the mean overlap.
    """

    def __init__(self, tokens: list[int], dense: Tensor) -> None:
        super().__init__(tokens)
        self.dense = dense
        self.kl: list[float] = []
        self.overlap: list[float] = []
        self.top1: list[int] = []

    @property
    def score(self) -> float:
        return statistics.fmean(self.overlap)

    def take(self, logits: Tensor) -> None:
        for p, q in zip(self.dense[self.steps : self.steps + len(logits)], logits, strict=True):
            p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            kl = (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0).sum()
            self.kl.append(float(kl.clamp(0, 1e9)))
            self.overlap.append(float(torch.minimum(p, q).exp().sum().clamp(0, 1)))
            self.top1.append(int(p.argmax() == q.argmax()))
        self.steps += len(logits)


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
    batched go on alone. Known tokens are fed `CHUNK` at a time to stacks that neither evict nor select: a token then
    sees its chunk in full precision, as pages that are not full yet leave it anyway.
    """
    plain, others = [], []
    for decoding in decodings:
        _alone(model, decoding, TIMED if can_step_together(decoding.cache) else None)
        if not decoding.reader.ahead(1):
            yield decoding
        elif decoding.cache.stack.policies or decoding.cache.stack.selector:
            others.append(decoding)
        else:
            plain.append(decoding)
    yield from _together(model, plain, CHUNK)
    yield from _together(model, others, 1)


def _together(model: Any, left: list[Decoding], most: int) -> Iterator[Decoding]:
    """Decode in batches, of which at most so many tokens a row are fed at once.

    Rows hold equally many tokens where the model needs that, and where several known ones are fed at once.
    """
    groups: dict[int, list[Decoding]] = {}
    for decoding in left:
        apart = len(decoding.reader.ahead(most)) == 1 and can_step_apart(model, decoding.cache)
        groups.setdefault(-1 if apart else decoding.cache.get_query_offset(), []).append(decoding)
    for group in groups.values():
        yield from _batch(model, group, most)


def _batch(model: Any, left: list[Decoding], most: int) -> Iterator[Decoding]:
    """Decode in one batch, whose rows are fed one token at once where they hold different numbers of tokens."""
    while left:
        batch = lockstep([decoding.cache for decoding in left])
        apart = len({decoding.cache.get_query_offset() for decoding in left}) > 1
        while all(tokens := [decoding.reader.ahead(1 if apart else most) for decoding in left]):
            fed = min(map(len, tokens))
            held = [decoding.cache.get_query_offset() for decoding in left] if apart else None
            for decoding, logits in zip(left, _step(model, [row[:fed] for row in tokens], batch, held), strict=True):
                decoding.reader.take(logits)
        yield from (decoding for decoding in left if not decoding.reader.ahead(1))
        left = [decoding for decoding in left if decoding.reader.ahead(1)]


def _alone(model: Any, decoding: Decoding, steps: int | None) -> None:
    begun = decoding.cache.memory().held
    growth = memory.watch(model.device)
    while (steps is None or len(decoding.seconds) < steps) and (token := decoding.reader.ahead(1)):
        start = clock(model.device)
        (logits,) = _step(model, [token], decoding.cache)
        decoding.reader.take(logits)
        decoding.seconds.append(clock(model.device) - start)
    grown = growth()
    if grown is not None:
        decoding.working = max(grown - (decoding.cache.memory().held - begun), 0)


def _step(model: Any, tokens: Sequence[Sequence[int]], cache: Any, held: Sequence[int] | None = None) -> Tensor:
    """Logits [rows, n, V] after n tokens of each row. held: tokens before them in each row; None: as the cache says."""
    ids = torch.tensor(tokens, device=model.device, dtype=torch.int64)
    place = (
        {} if held is None else {"position_ids": torch.tensor(held, device=model.device, dtype=torch.int64)[:, None]}
    )
    logits: Tensor = model(input_ids=ids, **place, **with_cache(model, cache), use_cache=True).logits
    return logits
