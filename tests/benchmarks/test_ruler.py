"""RULER's prompts: every task fills its context, is the same for the same seed, and scores what it should."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import texts_folder

from kvcomp.benchmarks.data import DataError
from kvcomp.benchmarks.ruler import TASKS, TaskError, find_task, generate, string_match_all, string_match_part
from kvcomp.benchmarks.ruler.task import TooSmallError, fit

CONTEXTS = [1024, 3000, 4096, 9000]
NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


def tokenizer(text: str) -> SimpleNamespace:
    """Words and single punctuation marks: about what a real tokenizer makes of English."""
    return SimpleNamespace(input_ids=re.findall(r"\w+|[^\w\s]", text))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts_folder.save(tmp_path_factory.mktemp("data"))


def test_there_are_thirteen_tasks() -> None:
    needles = ["single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery"]
    assert list(TASKS) == [*(f"niah_{kind}" for kind in needles), "vt", "cwe", "fwe", "qa_1", "qa_2"]
    assert {name: task.max_new_tokens for name, task in TASKS.items()} == dict.fromkeys(TASKS, 128) | NEW_TOKENS


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_fill_the_context(task: str, context: int, data: Path) -> None:
    for sample in generate(task, tokenizer, context, samples=3, seed=1, data=data):
        length = len(tokenizer(sample.prompt).input_ids) + sample.max_new_tokens
        assert 0.9 * context <= length <= context
        assert sample.max_new_tokens == find_task(task).max_new_tokens


@pytest.mark.parametrize("task", TASKS)
def test_samples_depend_on_seed_and_index_only(task: str, data: Path) -> None:
    few, many = (generate(task, tokenizer, 1024, samples=n, seed=5, data=data) for n in (2, 4))
    assert many[:2] == few
    assert [sample.index for sample in many] == [0, 1, 2, 3]
    assert len({sample.prompt for sample in many}) == 4
    assert generate(task, tokenizer, 1024, samples=2, seed=6, data=data) != few
    assert [sample.task for sample in few] == [task, task]


@pytest.mark.parametrize("task", TASKS)
def test_the_references_score_one_and_settle_the_answer(task: str, data: Path) -> None:
    (sample,) = generate(task, tokenizer, 1024, samples=1, seed=0, data=data)
    spec = find_task(task)
    answer = " The answer: " + ", ".join(sample.references)
    assert spec.score(answer.upper(), sample) == 1
    assert spec.stop(answer, sample)
    assert spec.score("I do not know", sample) == 0
    assert not spec.stop("I do not know", sample)
    assert len(set(sample.references)) == len(sample.references)
    if len(sample.references) > 1:
        part = 1 if task.startswith("qa") else 1 / len(sample.references)
        assert spec.score(sample.references[0], sample) == pytest.approx(part)


@pytest.mark.parametrize("task", TASKS)
def test_few_prompts_are_tokenized(task: str, data: Path) -> None:
    lengths: list[int] = []

    def counting(text: str) -> SimpleNamespace:
        lengths.append(len(text))
        return tokenizer(text)

    samples = generate(task, counting, 8192, samples=3, seed=0, data=data)
    assert sum(lengths) <= 6 * sum(len(sample.prompt) for sample in samples)


def test_fit_finds_the_last_unit_that_fits() -> None:
    calls: list[int] = []

    def used(units: int) -> int:
        calls.append(units)
        return 100 + 7 * units

    for room in range(121, 2000, 13):
        calls.clear()
        units = fit(used, room, fewest=3)
        assert used(units) <= room
        assert used(units + 1) > room or room - used(units) <= room // 512
        assert len(calls) <= 8
    assert fit(used, 10**6, fewest=3, most=50) == 50
    with pytest.raises(TooSmallError):
        fit(used, 120, fewest=3)


def test_fit_copes_with_units_of_all_sizes() -> None:
    def used(units: int) -> int:
        return sum(1 + 97 * (unit % 7 == 0) for unit in range(units))

    for room in range(200, 4000, 37):
        units = fit(used, room, fewest=1)
        assert used(units) <= room < used(units + 1) + room // 512 + 1


@pytest.mark.parametrize(
    ("prediction", "references", "whole", "part"),
    [
        ("It is 12.", ["12"], 1.0, 1.0),
        ("ABC", ["abc", "d"], 0.5, 1.0),
        ("", ["1"], 0.0, 0.0),
        ("none", ["1", "2"], 0.0, 0.0),
        ("a\tb", ["a\nb"], 1.0, 1.0),  # control characters count as line ends
        ("x 1 y 2", ["1", "2", "3", "4"], 0.5, 1.0),
    ],
)
def test_metrics(prediction: str, references: list[str], whole: float, part: float) -> None:
    assert string_match_all(prediction, references) == whole
    assert string_match_part(prediction, references) == part


def test_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(TaskError, match="niah_single_1"):
        generate("niah_singel_1", tokenizer, 1024, samples=1, seed=0)


@pytest.mark.parametrize("task", [task for task in TASKS if not task.startswith("qa")])
def test_a_context_too_small_says_what_is_needed(task: str) -> None:
    with pytest.raises(TaskError, match=rf"context: 128 is less than the \d+ tokens that {task} needs"):
        generate(task, tokenizer, 128, samples=1, seed=0)


@pytest.mark.parametrize(("task", "file"), [("qa_1", "dev-v2.0.json"), ("qa_2", "hotpot_dev_distractor_v1.json")])
def test_missing_data_names_the_task_and_what_to_fetch(task: str, file: str, tmp_path: Path) -> None:
    for data in (None, tmp_path):
        with pytest.raises(DataError) as caught:
            generate(task, tokenizer, 1024, samples=1, seed=0, data=data)
        line = str(caught.value)
        assert line.startswith(f"{task}: ")
        assert file in line
        assert "\n" not in line


def test_only_the_question_tasks_need_data(data: Path, tmp_path: Path) -> None:
    for name, task in TASKS.items():
        if not name.startswith("qa"):
            assert generate(name, tokenizer, 1024, samples=1, seed=0, data=tmp_path)
            assert task.count(7, None) == 7
    assert find_task("qa_1").count(1000, data) == texts_folder.ARTICLES * texts_folder.PARAGRAPHS
    assert find_task("qa_2").count(3, data) == 3


def test_samples_say_which_haystack_they_have(data: Path) -> None:
    (real,) = generate("niah_single_2", tokenizer, 1024, samples=1, seed=0, data=data)
    (packaged,) = generate("niah_single_2", tokenizer, 1024, samples=1, seed=0)
    (noise,) = generate("niah_single_1", tokenizer, 1024, samples=1, seed=0, data=data)
    assert "PaulGrahamEssays.json" in real.origin
    assert "public-domain" in packaged.origin
    assert noise.origin == ""
    assert real.prompt != packaged.prompt


class Chatty:
    """A tokenizer of words whose chat template is ChatML's."""

    chat_template = "chatml"
    bos_token = None

    def __call__(self, text: str) -> SimpleNamespace:
        return tokenizer(text)

    def apply_chat_template(self, turns: list[dict[str, str]], **options: bool) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return (
            "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns) + "<|im_start|>assistant\n"
        )


PREFIXES = {
    "cwe": " Answer: The top",
    "fwe": " Answer: According to the coded",
    "vt": " Answer: According to the chain",
}
PREFIXES |= {"qa_1": " Answer:", "qa_2": " Answer:"}


@pytest.mark.parametrize("task", TASKS)
def test_in_chat_the_answer_prefix_begins_the_models_turn(task: str, data: Path) -> None:
    context = 2048
    for plain, sample in zip(
        generate(task, Chatty(), context, 2, seed=1, data=data),
        generate(task, Chatty(), context, 2, seed=1, data=data, chat=True),
        strict=True,
    ):
        before, prefix = sample.prompt.split("<|im_end|>\n<|im_start|>assistant\n")
        assert before.startswith("<|im_start|>user\n")
        assert prefix.startswith(PREFIXES.get(task, " The special magic"))
        assert plain.prompt.endswith(prefix)
        assert before[-1] in "?."  # the question
        assert len(tokenizer(sample.prompt).input_ids) + sample.max_new_tokens <= context
        assert sample.references == plain.references or task in ("fwe", "cwe")  # whose words depend on the length
        assert sample.question is not None
        asked = sample.prompt[len(sample.prompt) - sample.question :]
        assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n" + prefix)
        if sample.depth is not None and task.startswith("niah"):
            place = round(sample.depth * len(sample.prompt))
            near = sample.prompt[max(place - 2, 0) : place + 40]
            assert "One of the special magic" in near


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    with pytest.raises(TaskError, match=r"^chat: the tokenizer of this model has no chat template: leave out --chat"):
        generate("vt", tokenizer, 1024, 1, seed=0, chat=True)


def test_a_template_that_changes_the_question_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chatty, "apply_chat_template", lambda self, turns, **_: turns[0]["content"].upper())
    with pytest.raises(TaskError, match=r"^chat: the chat template of this model changes what is asked"):
        generate("vt", Chatty(), 1024, 1, seed=0, chat=True)
