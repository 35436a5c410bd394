"""Variable tracking: a chain of assignments hidden in noise, and the question which variables share one value."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kvcomp.benchmarks.ruler.task import Draft, RulerTask, Setting, TooSmallError, Writer, distinct, fit
from kvcomp.benchmarks.ruler.texts import NOISE

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
    "the value {value}, they are: "
)
EXAMPLE_TOKENS = 500


@dataclass(frozen=True)
class Tracking(RulerTask):
    """One variable gets a number, and `hops` others one after the other get the variable before.

    A worked example with names of three letters comes first. It has as many repetitions of the noise as fit
    `EXAMPLE_TOKENS` tokens, and its own names and number in every sample.
    """

    hops: int = 4
    max_new_tokens: ClassVar[int] = 30

    def prepare(self, setting: Setting) -> Writer:
        def example_tokens(noise: int) -> int:
            return setting.tokens(self._text(noise, 3, random.Random(f"{setting.seed}/{self.name}"))[0])

        try:
            example = fit(example_tokens, EXAMPLE_TOKENS, self.hops + 1)
        except TooSmallError:  # a tokenizer of single bytes
            example = self.hops + 1

        def write(units: int, _: int, rng: random.Random) -> Draft:
            shown, names, _ = self._text(example, 3, rng)
            before = f"{shown} {' '.join(names)}\n\n"
            text, names, place = self._text(units, 5, rng)
            return Draft(before + text, tuple(names), len(before) + place, TEMPLATE)

        return Writer(write, fewest=self.hops + 1)

    def _text(self, noise: int, letters: int, rng: random.Random) -> tuple[str, list[str], int]:
        """Return the question on a chain in `noise` repetitions, its variables, and where the chain starts."""
        names = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), self.hops + 1)
        number = rng.randint(10000, 99998)
        context = "\n".join(_hide(_chain(names, number), noise, rng))
        text = TEMPLATE.format(context=context, value=number, count=len(names))
        return text, names, text.index(f"VAR {names[0]} = {number}")


def _chain(names: Sequence[str], number: int) -> list[str]:
    # The space at the end of a hop is the authors'.
    return [f"VAR {names[0]} = {number}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]


def _hide(chain: Sequence[str], noise: int, rng: random.Random) -> list[str]:
    lines = [NOISE] * noise
    for place, link in reversed(list(zip(sorted(rng.sample(range(noise), len(chain))), chain, strict=True))):
        lines.insert(place, link)
    return lines
