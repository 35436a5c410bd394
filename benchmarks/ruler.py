"""RULER's synthetic tasks (Hsieh et al. 2024, arXiv:2404.06654), in the plain-completion form.

The templates, haystacks, key and value types, and the placement of needles follow the authors' generator.
Three things differ, knowingly: the haystack of essays is a public-domain novel that travels with the package;
the haystack's size is searched for each sample, so that every prompt fills its context instead of falling
short by up to 500 words; and sentences are split by a rule that needs no download.
"""

from __future__ import annotations

import bisect
import importlib.util
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from kvcomp.errors import KvcompError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
PROMPT = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.\n{context}\n"
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]  # forty even depths, in whole percents
SENTENCE_END = re.compile(r"""(?<!\bMr\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<=[.!?"'”’])\s+(?=["'“‘(]?[A-Z0-9])""")


class TaskError(KvcompError):
    """A task that does not exist, or cannot be generated as asked."""


@dataclass(frozen=True)
class Sample:
    """One prompt with the strings that a right answer contains."""

    task: str
    index: int
    prompt: str
    references: tuple[str, ...]
    depth: float  # where the answer lies: 0 at the start of the prompt, 1 at its end
    max_new_tokens: int


class Task(Protocol):
    """What `TASKS` holds: a frozen dataclass that writes prompts of a chosen size and scores answers."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def metric(self) -> Callable[[str, Sequence[str]], float]: ...
    @property
    def stop(self) -> str | None: ...  # the answer ends where this appears

    def write(self, size: int, rng: random.Random) -> tuple[str, tuple[str, ...]]:
        """Return the prompt with `size` units of haystack, and its references."""
        ...


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Return the fraction of the references that appear in the prediction, whatever their case."""
    return sum(reference.lower() in prediction.lower() for reference in references) / len(references)


@dataclass(frozen=True)
class Niah:
    """Needles `key -> number` in a haystack; the question asks for the number of one key.

    noise: the sentences of `NOISE` again and again, all five a unit; otherwise running text by the word.
    keys: how many needles there are; one is asked for.
    """

    noise: bool
    keys: int
    max_new_tokens: int = 128
    metric: Callable[[str, Sequence[str]], float] = string_match_all
    stop: str | None = "\n"

    def write(self, size: int, rng: random.Random) -> tuple[str, tuple[str, ...]]:
        needles = {_random_key(rng): str(rng.randint(10**6, 10**7 - 1)) for _ in range(self.keys)}
        key = rng.choice(list(needles))
        sentences = [NEEDLE.format(key=k, value=v) for k, v in needles.items()]
        context = _in_noise(size, sentences, rng) if self.noise else _in_text(size, sentences, rng)
        return PROMPT.format(context=context, key=key), (needles[key],)


TASKS: dict[str, Task] = {
    "niah_single_1": Niah(noise=True, keys=1),
    "niah_multikey_1": Niah(noise=False, keys=4),
}


def generate(task: str, tokenizer: Any, context: int, samples: int, seed: int) -> list[Sample]:
    """Return `samples` prompts whose tokens, with the task's new tokens, fill `context` as far as they fit.

    A sample depends on the task, the seed, its index and the context, not on how many are asked for. Raises
    TaskError for an unknown task or a context too small for it.
    """
    spec = find_task(task)
    return [_fit(task, spec, tokenizer, context, index, seed) for index in range(samples)]


def find_task(name: str) -> Task:
    """Return the task of that name, or raise TaskError with the names there are."""
    if name not in TASKS:
        raise TaskError(f"tasks: no task {name!r}. There are: {', '.join(TASKS)}; `ruler` stands for all of them.")
    return TASKS[name]


def _fit(name: str, task: Task, tokenizer: Any, context: int, index: int, seed: int) -> Sample:
    def write(size: int) -> tuple[str, tuple[str, ...]]:
        return task.write(size, random.Random(f"{seed}/{name}/{index}"))

    def tokens(size: int) -> int:
        return len(tokenizer(write(size)[0]).input_ids) + task.max_new_tokens

    fewest, some = 4, 64
    least = tokens(fewest)
    if least > context:
        raise TaskError(
            f"context: {context} is less than the {least} tokens that {name} needs, "
            f"{task.max_new_tokens} of them for the answer."
        )
    per_unit = (tokens(some) - least) / (some - fewest)
    most = fewest + int(2 * (context - least) / per_unit) + 1  # twice the estimate: the search ends below it
    size = fewest + bisect.bisect_right(range(fewest, most), context, key=tokens) - 1
    while tokens(size) > context:  # the needles move with the size, so the count is only nearly monotone
        size -= 1
    prompt, references = write(size)
    depth = min(prompt.index(reference) for reference in references) / len(prompt)
    return Sample(name, index, prompt, references, round(depth, 4), task.max_new_tokens)


def _in_noise(size: int, needles: Sequence[str], rng: random.Random) -> str:
    sentences = [NOISE] * size
    for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
        sentences.insert(place, needle)
    return "\n".join(sentences)


def _in_text(size: int, needles: Sequence[str], rng: random.Random) -> str:
    words = _words()
    text = " ".join((words * (size // len(words) + 1))[:size])
    sentences = SENTENCE_END.split(text)
    places = sorted((int(len(sentences) * depth) for depth in rng.sample(DEPTHS, len(needles))), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        sentences.insert(place, needle)
    return " ".join(sentences)


@cache
def _words() -> list[str]:
    return (files("kvcomp.benchmarks") / "data" / "haystack.txt").read_text(encoding="utf-8").split()


def _random_key(rng: random.Random) -> str:
    return f"{rng.choice(_word_list('adjectivelist.txt'))}-{rng.choice(_word_list('nounlist.txt'))}"


@cache
def _word_list(name: str) -> list[str]:
    # RULER draws its keys from these lists of the wonderwords package; its files are needed, not its code.
    spec = importlib.util.find_spec("wonderwords")
    if spec is None or not spec.submodule_search_locations:
        raise TaskError('tasks: RULER draws its keys with wonderwords: pip install "kvcomp[demo]"')
    text = (Path(spec.submodule_search_locations[0]) / "assets" / name).read_text(encoding="utf-8")
    return sorted({word.strip() for word in text.splitlines() if word.strip()})
