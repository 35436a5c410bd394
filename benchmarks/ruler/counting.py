"""Aggregation: which words of a long list are the most frequent."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from kvcomp.benchmarks.data import Source, load
from kvcomp.benchmarks.ruler import texts
from kvcomp.benchmarks.ruler.task import Draft, RulerTask, Setting, Writer, distinct

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)


class Repeats(NamedTuple):
    """How often each of the ten common words appears, and each of the others."""

    common: int
    other: int


@dataclass(frozen=True)
class CommonWords(RulerTask):
    """A numbered, shuffled list in which ten words appear more often than all others, after an example of it.

    From 4096 tokens on, the ten appear 30 times and the others 3 times; below, 6 times and once. The example has
    40 words, 10 times and 3 times, or below 4096 tokens 20 words, 3 times and once.
    """

    max_new_tokens: ClassVar[int] = 120

    @property
    def sources(self) -> tuple[Source[Any], ...]:
        return (texts.NOUNS, texts.ADJECTIVES, texts.VERBS, texts.ENGLISH)

    def prepare(self, setting: Setting) -> Writer:
        words, english = texts.common_words(setting.data), load(texts.ENGLISH, setting.data)
        long = setting.context >= 4096
        example, repeats = (40, Repeats(10, 3)) if long else (20, Repeats(3, 1))

        def write(units: int, _: int, rng: random.Random) -> Draft:
            shown, answer = _list(rng.sample(words, example), repeats, rng)
            numbered = " ".join(f"{i}. {word}" for i, word in enumerate(answer, start=1))
            pool = words if units <= len(words) else english
            chosen = rng.sample(pool, len(pool))[:units]
            asked, answer = _list(chosen, Repeats(30, 3) if long else Repeats(6, 1), rng)
            prompt = f"{COMMON.format(context=shown)} {numbered}\n{COMMON.format(context=asked)}"
            return Draft(prompt, tuple(answer), None, COMMON)

        return Writer(write, fewest=11, most=max(len(words), len(english)))


def _list(words: Sequence[str], repeats: Repeats, rng: random.Random) -> tuple[str, list[str]]:
    """Return the numbered list, and its ten common words."""
    common, others = list(words[:10]), list(words[10:])
    whole = common * repeats.common + others * repeats.other
    rng.shuffle(whole)
    return " ".join(f"{i}. {word}" for i, word in enumerate(whole, start=1)), common


@dataclass(frozen=True)
class FrequentWords(RulerTask):
    """Words of six random letters, the k-th of which makes up k^-2 / zeta(2) of the text; the first one is dots.

    The vocabulary has a word for every 50 tokens of the context. The answer is the second to the fourth word.
    """

    max_new_tokens: ClassVar[int] = 50

    def prepare(self, setting: Setting) -> Writer:
        size = (setting.context - self.max_new_tokens) // 50
        zeta = math.pi**2 / 6

        def write(units: int, _: int, rng: random.Random) -> Draft:
            words = distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), max(size, 5))
            words[0] = "..."
            text = [word for k, word in enumerate(words, start=1) for _ in range(int(units * k**-2 / zeta))]
            rng.shuffle(text)
            return Draft(FREQUENT.format(context=" ".join(text)), tuple(words[1:4]), None, FREQUENT)

        return Writer(write, fewest=74)  # the fewest from which on the fourth word always beats the fifth
