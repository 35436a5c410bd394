"""RULER's generators: prompts fill their context, hold their needles, and ask for one of them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from kvcomp.benchmarks.ruler import DEPTHS, TASKS, TaskError, generate, string_match_all


def tokenizer(text: str) -> SimpleNamespace:
    """Words and single punctuation marks: about what a real tokenizer makes of English."""
    return SimpleNamespace(input_ids=re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("context", [512, 2048, 9000])
def test_prompt_and_answer_fill_the_context(task: str, context: int) -> None:
    for sample in generate(task, tokenizer, context, samples=3, seed=1):
        length = len(tokenizer(sample.prompt).input_ids) + sample.max_new_tokens
        assert 0.9 * context <= length <= context


@pytest.mark.parametrize("task", TASKS)
def test_the_needle_that_is_asked_for_is_in_the_haystack_once(task: str) -> None:
    for sample in generate(task, tokenizer, 1024, samples=10, seed=0):
        key = re.search(r"What is the special magic number for (.+?) mentioned", sample.prompt).group(1)
        (value,) = sample.references
        assert sample.prompt.count(f"One of the special magic numbers for {key} is: {value}.") == 1
        assert sample.prompt.count(value) == 1
        assert re.fullmatch(r"\d{7}", value)
        assert sample.prompt.endswith(f"The special magic number for {key} mentioned in the provided text is")
        assert abs(sample.prompt.index(value) / len(sample.prompt) - sample.depth) < 1e-4


@pytest.mark.parametrize(("task", "needles"), [("niah_single_1", 1), ("niah_multikey_1", 4)])
def test_the_number_of_needles(task: str, needles: int) -> None:
    (sample,) = generate(task, tokenizer, 1024, samples=1, seed=3)
    assert sample.prompt.count("One of the special magic numbers for") == needles


@pytest.mark.parametrize("task", TASKS)
def test_samples_depend_on_seed_and_index_only(task: str) -> None:
    few, many = (generate(task, tokenizer, 700, samples=n, seed=5) for n in (2, 4))
    assert many[:2] == few
    assert len({sample.prompt for sample in many}) == 4
    assert generate(task, tokenizer, 700, samples=2, seed=6) != few


def test_depths_are_spread_over_the_prompt() -> None:
    depths = [sample.depth for sample in generate("niah_single_1", tokenizer, 1024, samples=40, seed=0)]
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    assert (len(DEPTHS), DEPTHS[0], DEPTHS[-1]) == (40, 0.0, 1.0)


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [("It is 12.", ["12"], 1.0), ("ABC", ["abc", "d"], 0.5), ("", ["1"], 0.0), ("none", ["1", "2"], 0.0)],
)
def test_string_match_all(prediction: str, references: list[str], score: float) -> None:
    assert string_match_all(prediction, references) == score


def test_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(TaskError, match="niah_single_1"):
        generate("niah_singel_1", tokenizer, 1024, samples=1, seed=0)


def test_a_context_too_small_says_what_is_needed() -> None:
    with pytest.raises(TaskError, match="context"):
        generate("niah_single_1", tokenizer, 128, samples=1, seed=0)
