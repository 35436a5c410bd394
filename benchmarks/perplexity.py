"""Perplexity as a decode sees it: how well the end of a text is predicted from a cache that holds its beginning.

A window of a text fills the context. All of it but its last tokens is the prompt, prefilled and compressed as any
other; the last tokens are then fed as if the model had written them, one by one or a few together
(`kvcomp.benchmarks.decoding`), and

    nll = -1/n sum_t log p(x_t | x_<t)     perplexity = exp(nll)

over those n tokens. Every prediction thus reads the compressed cache, and what is fed is compressed in its turn. A
perplexity of one forward pass over the window would never read a cache at all.
"""

from __future__ import annotations

import math
import platform
import random
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvcomp.benchmarks.data import Data, Source, hub_rows, load, origin, register
from kvcomp.benchmarks.ruler.task import TooSmallError, fit
from kvcomp.benchmarks.samples import Sample, TaskError

GOLDEN = (math.sqrt(5) - 1) / 2
BOOK = re.compile(r"^\*\*\* ?START OF [^\n]*\n(.*?)^\*\*\* ?END OF ", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Perplexity:
    """Windows of one text, each scored by the mean negative log-likelihood of its last tokens; the lower the better.

    The window of sample i begins at the fraction (u + i / golden ratio) mod 1 of the text, u drawn by the seed: any
    number of samples is spread over the text evenly, and begins as a smaller number does. Where a window reaches
    the text's end it goes on at its start.

    continuation: n, how many tokens are scored.
    """

    name: str
    source: Source[list[str]]
    continuation: int = 128

    @property
    def max_new_tokens(self) -> int:
        return self.continuation

    @property
    def sources(self) -> tuple[Source[Any], ...]:
        """The text."""
        return (self.source,)

    def count(self, samples: int, data: Data) -> int:
        """Return `samples`; DataError where the text is missing."""
        load(self.source, data)
        return samples

    def check(self, tokenizer: Any, context: int, samples: int, seed: int, data: Data) -> None:
        """Raise what `generate` would: its first prompt tells."""
        self.generate(tokenizer, context, 1, seed, data)

    def generate(self, tokenizer: Any, context: int, samples: int, seed: int, data: Data) -> list[Sample]:
        """Return windows of at most `context` tokens, within 1/512 of it or a word. Their last ones are scored.

        Raises DataError where the text is missing, and TaskError where half of the context is less than what is
        scored, or the text is shorter than the context.
        """
        if context < 2 * self.continuation:
            raise TaskError(
                f"context: {context} is less than the {2 * self.continuation} tokens that {self.name} needs, "
                f"{self.continuation} of them to be scored."
            )
        words = load(self.source, data)
        made_of = f"{self.source.name}: {origin(self.source, data)}"
        first = random.Random(f"{seed}/{self.name}").random()

        def window(index: int) -> str:
            start = int((first + index * GOLDEN) % 1 * len(words))

            def text(units: int) -> str:
                return "".join([*words[start : start + units], *words[: max(0, start + units - len(words))]]).strip()

            def used(units: int) -> int:
                return len(tokenizer(text(units), verbose=False).input_ids)

            try:
                units = fit(used, context, fewest=1, most=len(words))
            except TooSmallError as error:
                raise TaskError(f"context: {context} is less than one word of {self.name}.") from error
            if units == len(words) and (held := used(units)) < context - context // 512:
                raise TaskError(f"context: {context} is more than the {held} tokens of the text of {self.name}.")
            return text(units)

        return [
            Sample(self.name, index, window(index), (), None, self.continuation, origin=made_of)
            for index in range(samples)
        ]


def _words(text: str) -> list[str]:
    """Return the words, each with the space after it; joined, they are the text."""
    return re.findall(r"\S+\s*", text)


def _read(file: Path) -> list[str]:
    return _words(file.read_text(encoding="utf-8-sig"))


def _read_book(file: Path) -> list[str]:
    """Return the book without Project Gutenberg's preface and licence."""
    text = file.read_text(encoding="utf-8-sig")
    book = BOOK.search(text)
    return _words(book[1] if book else text)


@cache
def _packaged() -> list[str]:
    return _words((files("kvcomp.benchmarks") / "data" / "haystack.txt").read_text(encoding="utf-8"))


@cache
def _standard_library() -> list[str]:
    """The modules of Python's own library that are one file each, in alphabetical order."""
    folder = Path(sysconfig.get_path("stdlib"))
    return _words("\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("[a-z]*.py"))))


TEXT = register(
    Source(
        name="perplexity/text",
        tasks=("perplexity_text", "fidelity_text"),
        files=("perplexity.txt",),
        read=_read,
        fetch="any text of yours as perplexity.txt",
        fallback=_packaged,
        fallback_name="a public-domain novel from the package",
        unit="words",
    )
)
WIKITEXT2 = register(
    Source(
        name="perplexity/wikitext2",
        tasks=("perplexity_wikitext2", "fidelity_wikitext2"),
        files=("wiki.test.raw", "wiki.test.tokens", "wikitext*2*/test.txt"),
        read=_read,
        fetch="wiki.test.raw of WikiText-2, or a folder wikitext2 with its test.txt",
        hub=lambda: _words("".join(hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test")["text"])),
        unit="words",
    )
)
GUTENBERG = register(
    Source(
        name="perplexity/gutenberg",
        tasks=("perplexity_gutenberg", "fidelity_gutenberg"),
        files=("pg[0-9]*.txt", "gutenberg*/*[0-9].txt"),
        read=_read_book,
        fetch="a book of Project Gutenberg as plain text: pg2701.txt, or a folder gutenberg with moby_dick_2701.txt",
        unit="words",
    )
)
CODE = register(
    Source(
        name="perplexity/code",
        tasks=("perplexity_code", "fidelity_code"),
        files=("code.txt",),
        read=_read,
        fetch="any source code as code.txt",
        fallback=_standard_library,
        fallback_name=f"the standard library of Python {platform.python_version()}",
        unit="words",
    )
)
SOURCES = (TEXT, WIKITEXT2, GUTENBERG, CODE)
TASKS: dict[str, Perplexity] = {source.tasks[0]: Perplexity(source.tasks[0], source) for source in SOURCES}
