"""What every benchmark is made of: prompts with their right answers, and the tasks that write and score them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from kvcomp.benchmarks.data import Data, Source
from kvcomp.errors import KvcompError


class TaskError(KvcompError):
    """A task that does not exist, or cannot be generated as asked."""


@dataclass(frozen=True)
class Sample:
    """One prompt with its right answers.

    depth: where the answer lies, 0 at the start of the prompt and 1 at its end; None where nobody knows.
    classes: the answers to choose from, in a classification.
    tags: groups that a report breaks a task down by, such as "0-4k" or "hard".
    origin: which texts the prompt is made of, where there is a choice (`data.origin`).
    question: how many characters at the end of the prompt are the question and what follows it; None: the prompt has no
        context that stands before a question.
    """

    task: str
    index: int
    prompt: str
    references: tuple[str, ...]
    depth: float | None
    max_new_tokens: int
    classes: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    origin: str = ""
    question: int | None = None


def question_of(prompt: str, template: str) -> int | None:
    """`Sample.question` of a prompt that was written by a template whose `{context}` stands before the question."""
    begins = template.partition("{context}")[2].partition("{")[0]
    at = prompt.rfind(begins) if begins else -1
    return None if at <= 0 else len(prompt) - at


class Prompts(Protocol):
    """A frozen dataclass that writes prompts of at most a given size."""

    @property
    def name(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def sources(self) -> tuple[Source[Any], ...]: ...  # the texts that its prompts are made of

    def count(self, samples: int, data: Data) -> int:
        """Return how many of `samples` prompts there are; DataError where the data is missing."""
        ...

    def check(self, tokenizer: Any, context: int, samples: int, seed: int, data: Data) -> None:
        """Raise TaskError where `generate` would, in less time."""
        ...

    def generate(self, tokenizer: Any, context: int, samples: int, seed: int, data: Data) -> list[Sample]:
        """Return the first `samples` prompts; each fits `context` tokens together with its answer."""
        ...


class Task(Prompts, Protocol):
    """Prompts that are answered, and the scores of the answers."""

    def score(self, prediction: str, sample: Sample) -> float:
        """Return how right the prediction is, from 0 to 1."""
        ...

    def stop(self, text: str, sample: Sample) -> bool:
        """Return whether the score of an answer to `sample` that begins with `text` is settled."""
        ...
