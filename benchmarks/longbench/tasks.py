"""LongBench as tasks: prompts cut to a context as the authors cut them, and answers scored as they score them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvcomp.benchmarks.chat import in_chat
from kvcomp.benchmarks.data import Data, Source, load, origin
from kvcomp.benchmarks.longbench import items
from kvcomp.benchmarks.longbench.datasets import DATASETS, EVEN, V2, Dataset
from kvcomp.benchmarks.longbench.items import Item
from kvcomp.benchmarks.longbench.metrics import first_line
from kvcomp.benchmarks.samples import Sample, TaskError


@dataclass(frozen=True)
class LongBench:
    """One dataset as a `Task`.

    chat: put prompts into the tokenizer's chat template, except those of the few-shot and code datasets.
    """

    name: str
    dataset: Dataset
    source: Source[list[Item]]
    chat: bool = False

    @property
    def max_new_tokens(self) -> int:
        return self.dataset.max_new_tokens

    @property
    def sources(self) -> tuple[Source[Any], ...]:
        """The file that items come from."""
        return (self.source,)

    def count(self, samples: int, data: Data) -> int:
        return min(samples, len(load(self.source, data)))

    def check(self, tokenizer: Any, context: int, samples: int, seed: int, data: Data) -> None:
        """Raise what `generate` would: its first prompt tells."""
        self.generate(tokenizer, context, 1, seed, data)

    def generate(self, tokenizer: Any, context: int, samples: int, seed: int, data: Data) -> list[Sample]:
        """Return the first `samples` items; of a dataset with tags, in turn from every group. The seed has no say.

        Raises DataError where the data is missing, and TaskError where the context is too short for the answer or
        a library of the metric is missing.
        """
        chosen = load(self.source, data)[:samples]
        made_of = origin(self.source, data)
        room = context - self.max_new_tokens
        fitted = [self._fit(tokenizer, item.prompt, room) for item in chosen]
        made = [
            Sample(
                task=self.name,
                index=index,
                prompt=prompt,
                references=item.answers,
                depth=None,
                max_new_tokens=self.max_new_tokens,
                classes=item.classes,
                tags=item.tags,
                origin=made_of,
                question=_asked(item, prompt),
            )
            for index, (item, prompt) in enumerate(zip(chosen, fitted, strict=True))
        ]
        if made:
            self.score("", made[0])  # a library that is missing is better known before a model runs
        return made

    def score(self, prediction: str, sample: Sample) -> float:
        """Return the best score against any of the references, as a fraction."""
        answer = first_line(prediction) if self.dataset.first_line else prediction
        return max((self.dataset.metric(answer, r, sample.classes) for r in sample.references), default=0.0)

    def stop(self, text: str, sample: Sample) -> bool:
        return self.dataset.settled is not None and self.dataset.settled(text)

    def _fit(self, tokenizer: Any, prompt: str, room: int) -> str:
        if not (self.chat and self.dataset.chat):
            fitted = cut_middle(tokenizer, prompt, room)
        else:
            fitted = cut_middle(tokenizer, prompt, room, lambda text: in_chat(tokenizer, text))
        if fitted is None:
            raise TaskError(
                f"context: {room + self.max_new_tokens} leaves no room for the prompt of {self.name} "
                f"beside the {self.max_new_tokens} tokens of its answer."
            )
        return fitted


def _asked(item: Item, prompt: str) -> int | None:
    """`Sample.question` of an item whose prompt was cut, and perhaps put into a chat template."""
    at = -1 if item.question is None else prompt.rfind(item.prompt[len(item.prompt) - item.question :])
    return None if at <= 0 else len(prompt) - at


def cut_middle(tokenizer: Any, prompt: str, budget: int, wrap: Callable[[str], str] = str) -> str | None:
    """Return `wrap(prompt)` where it has at most `budget` tokens; otherwise cut the prompt in its middle.

    The first and the last budget / 2 tokens stay, decoded and joined, as in the authors' `pred.py`. Joined text
    can have other tokens at the seam (a character cut in two, a word that merges): as many more go as it is
    then too long. What `wrap` adds counts. None where nothing is left.
    """
    ids = tokenizer(prompt, verbose=False).input_ids
    frame = len(tokenizer(wrap("")).input_ids) - len(tokenizer("").input_ids)
    keep = min(len(ids), budget - frame)
    while keep > 0:
        text = wrap(prompt if keep == len(ids) else _halves(tokenizer, ids, keep))
        over = len(tokenizer(text, verbose=False).input_ids) - budget
        if over <= 0:
            return text
        keep -= over
    return None


def _halves(tokenizer: Any, ids: list[int], keep: int) -> str:
    first = keep // 2
    halves = ids[:first], ids[len(ids) - (keep - first) :]
    return "".join(tokenizer.decode(half, skip_special_tokens=True) for half in halves)


V1_TASKS = {name: LongBench(name, spec, items.source(name, spec, even=False)) for name, spec in DATASETS.items()}
E_TASKS = {
    f"{name}_e": LongBench(f"{name}_e", DATASETS[name], items.source(f"{name}_e", DATASETS[name], even=True))
    for name in EVEN
}
V2_TASKS = {"longbench_v2": LongBench("longbench_v2", V2, items.source_v2())}
TASKS = V1_TASKS | E_TASKS | V2_TASKS


def find_task(name: str, chat: bool = False) -> LongBench:
    """Return the task of that name, or raise TaskError with the names there are."""
    if name not in TASKS:
        raise TaskError(f"tasks: LongBench has no {name!r}. It has: {', '.join(TASKS)}.")
    return replace(TASKS[name], chat=chat)


def samples(dataset: str, tokenizer: Any, context: int, limit: int, data: Data, chat: bool = False) -> list[Sample]:
    """Return at most `limit` prompts of a dataset; see `LongBench.generate`."""
    return find_task(dataset, chat).generate(tokenizer, context, limit, seed=0, data=data)


def score(dataset: str, prediction: str, sample: Sample) -> float:
    """Return how right the prediction is, from 0 to 1."""
    return find_task(dataset).score(prediction, sample)
