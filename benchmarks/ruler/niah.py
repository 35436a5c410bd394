"""Needles in a haystack: one sentence says the value of a key, and the question asks for the values of some keys."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvcomp.benchmarks.data import Data, Source, load
from kvcomp.benchmarks.ruler import texts
from kvcomp.benchmarks.ruler.task import Draft, RulerTask, Setting, Writer, distinct

NEEDLE = "One of the special magic {values} for {key} is: {value}."
ONE = (
    "A special magic {value} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value} afterwards.\n{context}\n"
    "What is the special magic {value} for {query} mentioned in the provided text? "
    "The special magic {value} for {query} mentioned in the provided text is"
)
SOME = (
    "Some special magic {value}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {value}s afterwards.\n{context}\n"
    "What are all the special magic {value}s for {query} mentioned in the provided text? "
    "The special magic {value}s for {query} mentioned in the provided text are"
)
Kind = Literal["number", "word", "uuid"]
Haystack = Literal["noise", "essays", "needles"]


@dataclass(frozen=True)
class Niah(RulerTask):
    """Needles of `keys` keys with `values` values each, and a question for the values of `queries` of the keys.

    haystack: "noise" repeats the five sentences of `texts.NOISE`, "essays" is running text by the word, and
        "needles" is other needles, one a line.
    """

    haystack: Haystack
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    max_new_tokens: ClassVar[int] = 128
    begins: ClassVar[str] = " The special magic"

    @property
    def sources(self) -> tuple[Source[Any], ...]:
        words = (texts.NOUNS, texts.ADJECTIVES) if self.key == "word" else ()
        return (texts.ESSAYS, *words) if self.haystack == "essays" else words

    def prepare(self, setting: Setting) -> Writer:
        return Writer(lambda units, _, rng: self._write(units, rng, setting.data), fewest=4)

    def _write(self, units: int, rng: random.Random, data: Data) -> Draft:
        draw = {kind: _drawing(kind, rng, data) for kind in (self.key, self.value)}
        keys = distinct(draw[self.key], self.keys)
        numbers = distinct(draw[self.value], self.keys * self.values)
        values = {key: numbers[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}
        asked = rng.sample(keys, self.queries)
        needles = [self._needle(key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        others = random.Random(rng.getrandbits(64))  # separately, so that one more of them changes nothing else
        if self.haystack == "essays":
            pieces = texts.sentences(units, data)
            places = [int(len(pieces) * depth) for depth in rng.sample(texts.DEPTHS, len(needles))]
            context = " ".join(_insert(needles, sorted(places), pieces))
        else:
            pieces = [texts.NOISE] * units if self.haystack == "noise" else self._others(units, others, keys, data)
            context = "\n".join(_insert(needles, sorted(rng.sample(range(units), len(needles))), pieces))
        template = ONE if self.queries * self.values == 1 else SOME
        query = ", and ".join([", ".join(asked[:-1]), asked[-1]]) if len(asked) > 1 else asked[0]
        prompt = template.format(value=self.value, context=context, query=query)
        place = min(prompt.index(self._needle(key, value)) for key in asked for value in values[key])
        return Draft(prompt, tuple(value for key in asked for value in values[key]), place, template)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(values=f"{self.value}s", key=key, value=value)

    def _others(self, count: int, rng: random.Random, taken: Sequence[str], data: Data) -> list[str]:
        key, value = _drawing(self.key, rng, data), _drawing(self.value, rng, data)
        return [self._needle(distinct(key, 1, taken)[0], value()) for _ in range(count)]


def _insert(needles: Sequence[str], places: Sequence[int], pieces: Sequence[str]) -> list[str]:
    """Return the pieces with needle i before piece `places[i]`; the places ascend."""
    whole = list(pieces)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        whole.insert(place, needle)
    return whole


def _drawing(kind: Kind, rng: random.Random, data: Data) -> Callable[[], str]:
    if kind == "number":
        return lambda: str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuid":
        return lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    adjectives, nouns = load(texts.ADJECTIVES, data), load(texts.NOUNS, data)
    return lambda: f"{rng.choice(adjectives)}-{rng.choice(nouns)}"
