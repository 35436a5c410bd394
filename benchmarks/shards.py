"""`--shard 2/8`: a part of a run's samples, answered by a job of its own into a folder of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kvcomp.benchmarks.records import RunError
from kvcomp.text import quote

MOST = 10_000  # shards of a run
FOLDER = re.compile(r"shard-([1-9]\d*)-of-([1-9]\d*)")


@dataclass(frozen=True)
class Shard:
    """Every `count`-th sample of a run, beginning with the `number`-th; numbers begin with 1.

    Samples are counted over contexts, tasks and indices, in the order of a run without shards, including those of tasks
    that do not fit a context: which shard has which sample depends on the settings alone.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that a text such as "2/8" names.

        Raises:
            RunError: it names none.
        """
        found = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, re.ASCII)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count <= MOST:
            raise RunError(
                f"shard: {quote(text)} is none: expected i/n with 1 <= i <= n <= {MOST}, such as 1/4 for the first of "
                "four."
            )
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def folder(self) -> str:
        """Name of its folder in that of the run."""
        return f"shard-{self.number}-of-{self.count}"

    def has(self, place: int) -> bool:
        """Whether a sample is of this shard; place: its position among all samples of the run, from 0."""
        return place % self.count == self.number - 1


def folders(run: Path) -> list[Path]:
    """The folders of shards in that of a run, by count and number."""
    if not run.is_dir():
        return []
    found = [(name, file) for file in run.iterdir() if (name := FOLDER.fullmatch(file.name)) and file.is_dir()]
    return [file for _, file in sorted(found, key=lambda pair: (int(pair[0][2]), int(pair[0][1])))]
