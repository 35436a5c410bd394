"""Question answering: the documents that a question comes with, among documents of other questions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from kvcomp.benchmarks.data import Data, Source, hub_rows, load, read_json, read_jsonl, register
from kvcomp.benchmarks.ruler.task import Draft, RulerTask, Setting, Writer, string_match_part
from kvcomp.benchmarks.samples import Sample, TaskError

ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
TEMPLATE = f"{ONLY}\n\nThe following are given documents.\n\n{{context}}\n\n{ONLY}\n\nQuestion: {{question}} Answer:"
DOCUMENT = "Document {number}:\n{text}"


@dataclass(frozen=True)
class Question:
    """A question and its answers; documents by their place in the whole set.

    own: the documents that come with the question; the first `needed` of them hold its answer.
    near: others on the same subject.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    needed: int
    near: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """The questions of a data set, and all their documents, each once."""

    documents: list[str]
    questions: list[Question]

    def __len__(self) -> int:
        return len(self.questions)


class _Collection:
    """Numbers documents as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.questions: list[Question] = []

    def add(
        self, text: str, answers: Iterable[str], needed: Sequence[str], own: Sequence[str], near: Sequence[str]
    ) -> None:
        ordered = dict.fromkeys([*needed, *own])
        self.questions.append(
            Question(
                text,
                tuple(dict.fromkeys(answers)),
                own=tuple(map(self.number, ordered)),
                needed=len(set(needed)),
                near=tuple(self.number(other) for other in dict.fromkeys(near) if other not in ordered),
            )
        )

    def number(self, document: str) -> int:
        return self.numbers.setdefault(document, len(self.numbers))

    def all(self) -> Questions:
        return Questions(list(self.numbers), self.questions)


def read_squad(file: Path) -> Questions:
    """Read SQuAD in its own schema, or one question a line (title, context, question, answers)."""
    if file.suffix == ".jsonl":
        return _squad((r["title"], r["context"], r["question"], _texts(r["answers"])) for r in read_jsonl(file))
    return _squad(
        (number, paragraph["context"], qa["question"], _texts([] if qa.get("is_impossible") else qa["answers"]))
        for number, article in enumerate(read_json(file)["data"])
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    )


def read_hotpotqa(file: Path) -> Questions:
    """Read HotpotQA (distractor setting) in its own schema."""
    return _hotpotqa(
        (r["question"], r["answer"], dict(map(tuple, r["context"])), [title for title, _ in r["supporting_facts"]])
        for r in read_json(file)
    )


def _texts(answers: Any) -> list[str]:
    if isinstance(answers, dict):  # the hub's columns
        answers = answers["text"]
    return [answer["text"] if isinstance(answer, dict) else answer for answer in answers]


def _squad(rows: Iterable[tuple[Any, str, str, list[str]]]) -> Questions:
    rows = list(rows)
    articles: dict[Any, dict[str, None]] = {}
    for title, context, _, _ in rows:
        articles.setdefault(title, {})[context] = None
    found = _Collection()
    for title, context, question, answers in rows:
        if answers:  # in SQuAD 2 some questions have none
            found.add(question, answers, [context], [context], list(articles[title]))
    return found.all()


def _hotpotqa(rows: Iterable[tuple[str, str, dict[str, list[str]], list[str]]]) -> Questions:
    found = _Collection()
    for question, answer, paragraphs, facts in rows:
        documents = {title: f"{title}\n{''.join(sentences)}" for title, sentences in paragraphs.items()}
        needed = [documents[title] for title in dict.fromkeys(facts) if title in documents]
        found.add(question, [answer], needed, list(documents.values()), [])
    return found.all()


def _hub_squad() -> Questions:
    rows = hub_rows("rajpurkar/squad_v2", None, "validation")
    return _squad((r["title"], r["context"], r["question"], _texts(r["answers"])) for r in rows)


def _hub_hotpotqa() -> Questions:
    rows = hub_rows("hotpotqa/hotpot_qa", "distractor", "validation")
    return _hotpotqa(
        (
            r["question"],
            r["answer"],
            dict(zip(r["context"]["title"], r["context"]["sentences"], strict=True)),
            r["supporting_facts"]["title"],
        )
        for r in rows
    )


SQUAD = register(
    Source(
        name="ruler/squad",
        tasks=("qa_1",),
        files=("dev-v2.0.json", "squad.json", "dev-v1.1.json", "squad_dev*.json*", "xquad.en.json"),
        read=read_squad,
        fetch="dev-v2.0.json of SQuAD 2.0 (rajpurkar.github.io/SQuAD-explorer)",
        hub=_hub_squad,
        unit="questions",
    )
)
HOTPOTQA = register(
    Source(
        name="ruler/hotpotqa",
        tasks=("qa_2",),
        files=("hotpot_dev_distractor_v1.json", "hotpotqa.json", "hotpotqa_*.json"),
        read=read_hotpotqa,
        fetch="hotpot_dev_distractor_v1.json of HotpotQA (hotpotqa.github.io)",
        hub=_hub_hotpotqa,
        unit="questions",
    )
)


@dataclass(frozen=True)
class Qa(RulerTask):
    """A question, its own documents, then those on the same subject, then any others, all shuffled.

    Where the context is too small for all of a question's own documents, those that hold the answer stay; a
    question whose answer's documents do not fit is passed over.
    """

    source: Source[Questions]
    max_new_tokens: ClassVar[int] = 32

    @property
    def sources(self) -> tuple[Source[Any], ...]:
        return (self.source,)

    def count(self, samples: int, data: Data) -> int:
        return min(samples, len(load(self.source, data)))

    def score(self, prediction: str, sample: Sample) -> float:
        """Return 1 where any of the references appears in the prediction, and otherwise 0."""
        return string_match_part(prediction, sample.references)

    def prepare(self, setting: Setting) -> Writer:
        content = load(self.source, setting.data)
        room = setting.context - self.max_new_tokens
        order = random.Random(f"{setting.seed}/{self.name}").sample(content.questions, len(content.questions))
        fitting = (
            question
            for question in order
            if setting.tokens(_prompt(content, question, question.own[: question.needed])[0]) <= room
        )
        found: list[Question] = []

        def write(units: int, index: int, rng: random.Random) -> Draft:
            found.extend(islice(fitting, max(0, index + 1 - len(found))))
            if index >= len(found):
                raise TaskError(
                    f"samples: {index + 1} are more than the {len(found)} questions of {self.name} that fit "
                    f"{setting.context} tokens with the documents that they need."
                )
            question = found[index]
            extra = units - 1 + question.needed
            documents = list(islice(_documents(content, question, rng.getrandbits(64)), extra))
            rng.shuffle(documents)
            prompt, starts = _prompt(content, question, documents)
            place = min(starts[documents.index(number)] for number in question.own[: question.needed])
            return Draft(prompt, question.answers, place, TEMPLATE)

        return Writer(write, fewest=1)


def _documents(content: Questions, question: Question, seed: int) -> Iterator[int]:
    """Yield the documents in the order in which they enter a growing prompt, without end."""
    rng = random.Random(seed)
    order = list(question.own[: question.needed])
    for some in (question.own[question.needed :], question.near):
        order += rng.sample(some, len(some))
    yield from order
    seen = set(order)
    while len(order) < len(content.documents):
        number = rng.randrange(len(content.documents))
        if number not in seen:
            seen.add(number)
            order.append(number)
            yield number
    while True:  # as the authors do: beyond the last document they come again
        yield from order


def _prompt(content: Questions, question: Question, documents: Sequence[int]) -> tuple[str, list[int]]:
    """Return the prompt, and the character where each document begins."""
    parts = [DOCUMENT.format(number=i, text=content.documents[number]) for i, number in enumerate(documents, start=1)]
    starts = [TEMPLATE.index("{context}")]
    for part in parts:
        starts.append(starts[-1] + len(part) + 2)
    return TEMPLATE.format(context="\n\n".join(parts), question=question.text), starts
