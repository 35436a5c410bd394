"""What RULER's tasks share: prompts that fill their context, and scores that count the references found."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

from kvcomp.benchmarks.chat import in_chat
from kvcomp.benchmarks.data import Data, Source, load, origin
from kvcomp.benchmarks.samples import Sample, TaskError, question_of

ENDLESS = 10**9
CONTROL = re.compile(r"[\x00-\x1f]")


class Draft(NamedTuple):
    """A prompt, its references, and the character where what the answer needs begins; None where it is all over.

    template: by which the prompt's end was written, from its `{context}` on.
    """

    prompt: str
    references: tuple[str, ...]
    place: int | None
    template: str


class Setting(NamedTuple):
    """What prompts are written for: `tokens` counts those of a text, `context` is what prompt and answer may take.

    asked: puts what stands before the answer into a chat template; None: a plain completion.
    """

    tokens: Callable[[str], int]
    context: int
    seed: int
    data: Data
    asked: Callable[[str], str] | None = None


class Writer(NamedTuple):
    """Writes the prompt of a sample with `fewest` to `most` units of haystack; its length grows with the units."""

    write: Callable[[int, int, random.Random], Draft]  # units, index of the sample, its randomness
    fewest: int
    most: int = ENDLESS


@dataclass(frozen=True)
class RulerTask(ABC):
    """A task that can be written to any length. Every reference that an answer contains counts the same.

    chat: the prompt is a user's turn in the tokenizer's chat template, and the model's turn begins with the prompt's
        end from `begins` on, the authors' answer prefix.
    """

    name: str
    chat: bool = field(default=False, kw_only=True)

    max_new_tokens: ClassVar[int]
    begins: ClassVar[str] = " Answer:"

    @property
    def sources(self) -> tuple[Source[Any], ...]:
        """The texts that prompts are made of."""
        return ()

    @abstractmethod
    def prepare(self, setting: Setting) -> Writer:
        """Return what writes the prompts; DataError where its data is missing."""

    def count(self, samples: int, data: Data) -> int:
        """Return `samples`, the prompts being endless; DataError where the data is missing."""
        for source in self.sources:
            load(source, data)
        return samples

    def generate(self, tokenizer: Any, context: int, samples: int, seed: int, data: Data) -> list[Sample]:
        """Return prompts whose tokens, with the task's new tokens, fill `context` as far as they fit.

        A sample depends on the task, the seed, its index, the data and the context, not on how many are asked
        for. Raises TaskError for a context too small for the task, and DataError where its data is missing.
        """
        setting = self._setting(tokenizer, context, seed, data)
        writer = self.prepare(setting)
        # The word lists are the same everywhere; what a hub has to offer is a text of its own.
        made_of = "; ".join(f"{source.name}: {origin(source, data)}" for source in self.sources if source.hub)
        return [self._sample(index, writer, setting, made_of) for index in range(samples)]

    def check(self, tokenizer: Any, context: int, samples: int, seed: int, data: Data) -> None:
        """Raise TaskError where one of the prompts of `generate` would not fit; none is written in full."""
        setting = self._setting(tokenizer, context, seed, data)
        writer = self.prepare(setting)
        for index in range(samples):
            self._require_room(self._used(index, writer, setting)(writer.fewest), setting)

    def score(self, prediction: str, sample: Sample) -> float:
        """Return the fraction of the references that appear in the prediction."""
        return string_match_all(prediction, sample.references)

    def stop(self, text: str, sample: Sample) -> bool:
        """Return whether `text` scores 1: what follows cannot take a reference away."""
        return self.score(text, sample) == 1

    def _setting(self, tokenizer: Any, context: int, seed: int, data: Data) -> Setting:
        asked = partial(in_chat, tokenizer) if self.chat else None
        return Setting(lambda text: len(tokenizer(text).input_ids), context, seed, data, asked)

    def _sample(self, index: int, writer: Writer, setting: Setting, made_of: str) -> Sample:
        used = self._used(index, writer, setting)
        self._require_room(used(writer.fewest), setting)
        units = fit(used, setting.context, writer.fewest, writer.most)
        prompt, references, place, template = self._draft(units, index, writer, setting)
        depth = None if place is None else round(place / len(prompt), 4)
        about = self.name, index, prompt, references, depth, self.max_new_tokens
        asked = template[: template.rindex(self.begins)]
        return Sample(*about, origin=made_of, question=question_of(prompt, asked))

    def _draft(self, units: int, index: int, writer: Writer, setting: Setting) -> Draft:
        draft = writer.write(units, index, random.Random(f"{setting.seed}/{self.name}/{index}"))
        if setting.asked is None:
            return draft
        at = draft.prompt.rindex(self.begins)
        question = draft.prompt[:at]
        framed = setting.asked(question)
        shift = framed.find(question.strip())
        if shift < 0:
            raise TaskError("chat: the chat template of this model changes what is asked: leave out --chat.")
        place = None if draft.place is None else draft.place + shift
        return draft._replace(prompt=framed + draft.prompt[at:], place=place)

    def _used(self, index: int, writer: Writer, setting: Setting) -> Callable[[int], int]:
        """What tells the tokens of a sample's prompt with so many units, and of its answer."""
        return lambda units: setting.tokens(self._draft(units, index, writer, setting).prompt) + self.max_new_tokens

    def _require_room(self, tokens: int, setting: Setting) -> None:
        if tokens > setting.context:
            raise TaskError(
                f"context: {setting.context} is less than the {tokens} tokens that {self.name} needs, "
                f"{self.max_new_tokens} of them for the answer."
            )


class TooSmallError(ValueError):
    """Not even the fewest units fit; the argument says what they use."""


def fit(used: Callable[[int], int], room: int, fewest: int, most: int = ENDLESS) -> int:
    """Return how many units fill `room`, within 1/512 of it or one unit; `used` grows about linearly with them.

    Few calls matter more than the last unit, since each tokenizes a prompt: the guesses follow the secant.
    Raises TooSmallError where `fewest` units do not fit.
    """
    low, spent = fewest, used(fewest)
    if spent > room:
        raise TooSmallError(spent)
    high = most + 1  # does not fit, or is not wanted
    guess = min(fewest + 32, most)
    while high - low > 1 and room - spent > room // 512:
        guess = min(max(guess, low + 1), high - 1)
        tokens = used(guess)
        rate = max((tokens - spent) / (guess - low), 1e-3)
        if tokens <= room:
            low, spent = guess, tokens
        else:
            high = guess
        guess = low + int((room - spent) / rate)
    return low


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Return the fraction of the references that appear in the prediction, whatever their case."""
    return sum(_contains(prediction, references)) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """Return 1 where any of the references appears in the prediction, whatever its case, and otherwise 0."""
    return float(any(_contains(prediction, references)))


def _contains(prediction: str, references: Sequence[str]) -> list[bool]:
    text = CONTROL.sub("\n", prediction).lower()
    return [reference.lower() in text for reference in references]


def distinct(draw: Callable[[], str], count: int, taken: Sequence[str] = ()) -> list[str]:
    """Return `count` drawn texts, all different, and none of them in `taken`."""
    found: dict[str, None] = {}
    while len(found) < count:
        text = draw()
        if text not in taken:
            found[text] = None
    return list(found)
