"""The texts of RULER's haystacks and the words of its needles."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from kvcomp.benchmarks.data import Data, DataError, Source, hub_rows, load, read_json, register

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]  # forty even depths, in whole percents
SENTENCE_END = re.compile(r"""(?<!\bMr\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)(?<=[.!?"'”’])\s+(?=["'“‘(]?[A-Z0-9])""")
ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
KEY_TASKS = ("niah_single_1", *ESSAY_TASKS[:3], "niah_multikey_2", *ESSAY_TASKS[3:])


def _essay_words(text: str) -> list[str]:
    return re.sub(r"\s+", " ", text).strip().split(" ")


@cache
def _packaged_words() -> list[str]:
    return _essay_words((files("kvcomp.benchmarks") / "data" / "haystack.txt").read_text(encoding="utf-8"))


ESSAYS = register(
    Source(
        name="ruler/essays",
        tasks=ESSAY_TASKS,
        files=("PaulGrahamEssays.json",),
        read=lambda file: _essay_words(read_json(file)["text"]),
        fetch="PaulGrahamEssays.json, which RULER's download_paulgraham_essay.py writes",
        hub=lambda: _essay_words(" ".join(hub_rows("baber/paul_graham_essays", None, "train")["text"])),
        fallback=_packaged_words,
        fallback_name="a public-domain novel from the package",
        unit="words",
    )
)


def _word_list(name: str, tasks: tuple[str, ...]) -> Source[list[str]]:
    """The lists travel in the wonderwords package; its files are needed, not its code."""

    def packaged() -> list[str]:
        spec = importlib.util.find_spec("wonderwords")
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f'{", ".join(tasks)}: needs the word lists of wonderwords: pip install "kvcomp[demo]"')
        return _lines(Path(spec.submodule_search_locations[0]) / "assets" / f"{name}.txt")

    return register(
        Source(
            name=f"ruler/{name}",
            tasks=tasks,
            files=(f"wonderwords_{name}.txt", f"{name}.txt"),
            read=_lines,
            fetch=f"{name}.txt of wonderwords",
            fallback=packaged,
            fallback_name="the wonderwords package",
            unit="words",
            listed=False,
        )
    )


@cache
def _lines(file: Path) -> list[str]:
    words = {line.strip() for line in file.read_text(encoding="utf-8").splitlines()}
    return sorted(words - {""})


NOUNS = _word_list("nounlist", (*KEY_TASKS, "cwe"))
ADJECTIVES = _word_list("adjectivelist", (*KEY_TASKS, "cwe"))
VERBS = _word_list("verblist", ("cwe",))
ENGLISH = register(
    Source(
        name="ruler/english_words",
        tasks=("cwe",),
        files=("english_words.json",),
        read=lambda file: list(read_json(file).values()),
        fetch="RULER's english_words.json, which cwe needs beyond about 100,000 tokens",
        fallback=list[str],
        fallback_name="not needed below about 100,000 tokens",
        unit="words",
        listed=False,
    )
)


def common_words(data: Data) -> list[str]:
    """Return the nouns, adjectives and verbs, each word once."""
    return sorted({*load(NOUNS, data), *load(ADJECTIVES, data), *load(VERBS, data)})


def sentences(words: int, data: Data) -> list[str]:
    """Return the sentences of the first `words` words of the essays, which start again where they end."""
    text = load(ESSAYS, data)
    return SENTENCE_END.split(" ".join((text * (words // len(text) + 1))[:words]))
