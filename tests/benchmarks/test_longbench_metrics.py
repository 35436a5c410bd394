"""LongBench's metrics against values worked out by hand and against second derivations of their definitions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomp.benchmarks.longbench import metrics
from kvcomp.benchmarks.samples import TaskError

WORDS = st.lists(st.sampled_from(["red", "blue", "cat", "dog", "sun"]), max_size=12)


def test_f1_counts_words_without_case_punctuation_and_articles() -> None:
    assert metrics.f1("The cat, sat.", "a CAT sat") == 1
    assert metrics.f1("cat sat on mat", "cat ran") == pytest.approx(2 * (1 / 4) * (1 / 2) / (1 / 4 + 1 / 2))
    assert metrics.f1("cat cat cat", "cat") == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))
    assert metrics.f1("don't", "dont") == 1
    assert metrics.f1("dog", "cat") == metrics.f1("", "cat") == metrics.f1("the", "the") == 0


@given(WORDS, WORDS)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(prediction: list[str], reference: list[str]) -> None:
    rest, same = list(reference), 0
    for word in prediction:
        if word in rest:
            rest.remove(word)
            same += 1
    precision, recall = same / max(len(prediction), 1), same / max(len(reference), 1)
    expected = 2 * precision * recall / (precision + recall) if same else 0
    assert metrics.f1(" ".join(prediction), " ".join(reference)) == pytest.approx(expected)


def test_f1_zh_counts_the_words_of_jieba() -> None:
    pytest.importorskip("jieba")
    assert metrics.f1_zh("厦门大学", "厦门大学。") == 1
    # 我 / 来到 / 北京 / 清华大学 and 北京 / 清华大学: two of four, two of two
    assert metrics.f1_zh("我来到北京清华大学", "北京清华大学") == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert metrics.f1_zh("，。", "北京") == 0


def test_rouge_l_is_the_union_of_common_subsequences() -> None:
    pytest.importorskip("rouge")
    # the cat sat / the cat ran: two words of three in common, both ways
    assert metrics.rouge_l("the cat sat", "the cat ran") == pytest.approx(2 / 3)
    # the package's own example: w1 w2 and w1 w3 w5 of w1 w2 w3 w4 w5; 4 of 5 words and 4 of the 8 different ones
    recall, precision = 4 / 5, 4 / 8
    expected = 2 * precision * recall / (precision + recall)
    assert metrics.rouge_l("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(expected)
    assert metrics.rouge_l("", "a") == metrics.rouge_l("...", "a") == metrics.rouge_l("a", ".") == 0


def test_rouge_l_of_long_sentences_is_not_lost_to_recursion() -> None:
    pytest.importorskip("rouge")
    limit = sys.getrecursionlimit()
    words = [f"w{i}" for i in range(700)]
    assert metrics.rouge_l(" ".join(words), " ".join(words)) == pytest.approx(1)
    assert metrics.rouge_l(" ".join(words[:350]), " ".join(words)) == pytest.approx(2 / 3)
    assert sys.getrecursionlimit() == limit


def test_rouge_l_zh_counts_the_words_of_jieba() -> None:
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    assert metrics.rouge_l_zh("我来到北京清华大学", "我来到清华大学") == pytest.approx(2 * 0.75 * 1 / 1.75)
    assert metrics.rouge_l_zh("", "北京") == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "classes", "score"),
    [
        ("Other location", "Other location", ["Date", "Other location"], 1),
        ("Date or Other location", "Other location", ["Date", "Other location"], 1 / 2),
        ("Date", "Other location", ["Date", "Other location"], 0),
        ("", "Date", ["Date"], 0),
        ("City state", "City state", ["City", "City state"], 1),  # part of the reference's name
        ("City state", "City", ["City", "City state"], 1 / 2),  # but not the reverse
        # "City" is dropped, so "state" after it is never checked, as in the authors' loop
        ("City state", "City state", ["City", "state", "City state"], 1 / 2),
    ],
)
def test_classification(prediction: str, reference: str, classes: Sequence[str], score: float) -> None:
    assert metrics.classification(prediction, reference, classes) == score


def test_count_and_retrieval_are_shares_of_the_numbers() -> None:
    assert metrics.count("There are 12.", "12") == 1
    assert metrics.count("12 or 13, 12", "12") == pytest.approx(2 / 3)
    assert metrics.count("twelve", "12") == metrics.count("112", "12") == 0
    assert metrics.retrieval("Paragraph 7", "Paragraph 7") == metrics.retrieval("段落7", "段落7") == 1
    assert metrics.retrieval("7, not 17", "Paragraph 7") == 1 / 2
    assert metrics.retrieval("Paragraph", "Paragraph 7") == 0


def test_edit_similarity_is_that_of_the_first_line_of_code() -> None:
    # "return " is common: 2 x 7 of 16 characters are 87.5%, rounded to the even percent
    assert metrics.edit_similarity("return x", "return y") == 0.88
    assert metrics.edit_similarity("\n\n```python\n# set x\n// too\nreturn y\nreturn x", "return y") == 1
    assert metrics.edit_similarity("# only a remark", "return y") == 0
    assert metrics.edit_similarity("# a remark\n\nreturn y", "return y") == 0  # the empty line is the first of code
    # Matching blocks, the first of the longest first, as in fuzzywuzzy without python-Levenshtein: the last "a" is
    # 2 x 1 of 6 characters. A longest common subsequence, as rapidfuzz has it, would be "ba".
    assert metrics.edit_similarity("aba", "bca") == 0.33


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is (*D*)", "D"),
        ("The correct answer is A because", "A"),
        ("The correct answer is A. No: The correct answer is (B)", "B"),  # brackets win
        ("The correct answer is (E)", None),
        ("the correct answer is (B)", None),
        ("B", None),
    ],
)
def test_choice(answer: str, chosen: str | None) -> None:
    assert [letter for letter in "ABCD" if metrics.choice(answer, letter)] == ([chosen] if chosen else [])


@given(st.text(alphabet="ax#`/\n ", max_size=30), st.text(alphabet="ax#\n", max_size=10))
def test_an_ended_answer_keeps_its_line(text: str, more: str) -> None:
    if metrics.first_line_ended(text):
        assert metrics.first_line(text) == metrics.first_line(text + more)
    if metrics.code_line_ended(text):
        assert metrics.code_line(text) == metrics.code_line(text + more)


@given(st.lists(st.sampled_from(["The correct answer is ", "(", ")", "A", "B", "*", "(C)"]), max_size=8))
def test_a_made_choice_stays(parts: list[str]) -> None:
    text = "".join(parts)
    if metrics.choice_made(text):
        for letter in "ABCD":
            assert metrics.choice(text, letter) == metrics.choice(text + " The correct answer is (D)", letter)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics._library.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    for prediction in ("", "北京"):  # tasks try the empty one before a model runs
        with pytest.raises(TaskError, match=r'jieba: pip install "kvcomp\[bench\]"'):
            metrics.f1_zh(prediction, "北京")
