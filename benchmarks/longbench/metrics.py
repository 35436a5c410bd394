"""LongBench's metrics (Bai et al. 2024, arXiv:2308.14508): each scores a prediction against one reference, from 0 to 1.

They return what the authors' `metrics.py` returns, quirks included; the quirks are named where they are. Two
notes on libraries. Edit similarity is the standard library's: it is what the authors' requirement, fuzzywuzzy
without python-Levenshtein, calls (with it, or in rapidfuzz, the measure is another one). ROUGE-L is the `rouge`
package's, which recurses once a word: with Python's usual limit it fails on long sentences, which the authors
then score 0; here it has the room that it needs.
"""

from __future__ import annotations

import importlib
import logging
import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from kvcomp.benchmarks.samples import TaskError

Metric = Callable[[str, str, Sequence[str]], float]  # prediction, reference, classes
ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(r"\d+")
ASCII_PUNCTUATION = frozenset(string.punctuation)
PUNCTUATION = ASCII_PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
CHOICE = re.compile(r"The correct answer is \(([A-D])\)")
BARE_CHOICE = re.compile(r"The correct answer is ([A-D])")


def f1(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the two bags of words, without case, punctuation and articles."""
    return _f1(_words(prediction), _words(reference))


def f1_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the two bags of words that jieba finds, without case and punctuation."""
    return _f1(_words_zh(prediction), _words_zh(reference))


def rouge_l(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Summary-level ROUGE-L F1 of words between spaces, sentences split at full stops; 0 where a side is empty."""
    score = _library("rouge").Rouge(metrics=["rouge-l"])
    try:
        with _recursion(len(prediction) + len(reference)):
            return float(score.get_scores(prediction, reference)[0]["rouge-l"]["f"])
    except ValueError:  # no sentence on one side
        return 0.0


def rouge_l_zh(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of the words that jieba finds; only ASCII full stops end sentences."""
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the prediction names, where the reference is one of them; otherwise 0.

    A class that is part of the reference's name does not count. The authors drop such classes from the list
    that they walk, so that the class after a dropped one is never checked; so does this.
    """
    named = [name for name in classes if name in prediction]
    place = 0
    while place < len(named):
        if named[place] != reference and named[place] in reference:
            del named[place]
        place += 1
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the reference; 0 where there are none."""
    numbers = NUMBER.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """`count` of the paragraph's number, the reference being "Paragraph 7" or "段落7"."""
    return count(prediction, NUMBER.findall(reference)[0])


def edit_similarity(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line of code and the reference: 2 x matching characters / all, in whole percents."""
    return round(100 * SequenceMatcher(None, code_line(prediction), reference).ratio()) / 100


def choice(prediction: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 where "The correct answer is (B)", brackets and asterisks optional, names the reference (LongBench v2)."""
    plain = prediction.replace("*", "")
    found = CHOICE.search(plain) or BARE_CHOICE.search(plain)
    return float(found is not None and found[1] == reference)


def first_line(text: str) -> str:
    """Return the first line that is not empty, "" where there is none."""
    return text.lstrip("\n").split("\n")[0]


def code_line(text: str) -> str:
    """Return the first line without a backtick, "#" or "//", "" where there is none."""
    return next(filter(_is_code, text.lstrip("\n").split("\n")), "")


def first_line_ended(text: str) -> bool:
    """Return whether more text can no longer change `first_line`."""
    return "\n" in text.lstrip("\n")


def code_line_ended(text: str) -> bool:
    """Return whether more text can no longer change `code_line`."""
    return any(map(_is_code, text.lstrip("\n").split("\n")[:-1]))


def choice_made(text: str) -> bool:
    """Return whether more text can no longer change `choice`: the form with brackets wins wherever it stands."""
    return CHOICE.search(text.replace("*", "")) is not None


def _is_code(line: str) -> bool:
    return not any(mark in line for mark in ("`", "#", "//"))


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    same = (Counter(prediction) & Counter(reference)).total()
    return 2 * same / (len(prediction) + len(reference)) if same else 0.0


def _words(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in ASCII_PUNCTUATION)
    return ARTICLES.sub(" ", plain).split()


def _words_zh(text: str) -> list[str]:
    words = ("".join("".join(c for c in word.lower() if c not in PUNCTUATION).split()) for word in _cut(text))
    return [word for word in words if word]


def _cut(text: str) -> list[str]:
    words: list[str] = _library("jieba").lcut(text)
    return words


@cache
def _library(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # jieba's own: escapes and pkg_resources
            module = importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f'tasks: this LongBench metric needs {name}: pip install "kvcomp[bench]"') from error
    logging.getLogger(name).setLevel(logging.WARNING)  # jieba reports on its dictionary
    return module


@contextmanager
def _recursion(more: int) -> Iterator[None]:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + more)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
