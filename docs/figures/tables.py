"""Write the tables of README and docs/results.md that CSVs hold: python docs/figures/tables.py

A table follows a line `<!-- table: KIND of FILE.csv -->` in its document; `KINDS` says what makes it of the file, which
`kvcomp bench` wrote: summary.csv, or fidelity.csv.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kvcomp.benchmarks.ruler import TASKS

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "benchmarks" / "figures"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md")
DENSE = "none"
SHORT = (  # stacks of README
    DENSE,
    "kivi(bits=4)",
    "int(bits=4, basis=hadamard)",
    "snapkv(keep=0.25, kernel=31) + kivi(bits=4)",
    "kivi(bits=2)",
)
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """The rows of a CSV of benchmarks/figures."""
    with (FIGURES / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fidelity(name: str) -> list[Row]:
    """The rows of a `fidelity.csv` over all texts, or of its only one."""
    found = rows(name)
    together = [row for row in found if row.get("task") == "all texts"]
    return together or found


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    first, *others = ("| " + " | ".join(line) + " |\n" for line in (head, *lines))
    return (first + "|---" * len(head) + "|\n" + "".join(others)).replace("|  |", "| |")


def percent(row: Row, name: str) -> str:
    return f"{100 * float(row[name]):.0f}"


def points(row: Row, name: str) -> str:
    """A difference in points, with its sign."""
    return "0" if (text := f"{100 * float(row[name]):+.0f}") in ("+0", "-0") else text


def between(row: Row, name: str, show: Callable[[Row, str], str]) -> str:
    """A figure with its interval."""
    return f"{show(row, name)} [{show(row, f'{name}_low')}, {show(row, f'{name}_high')}]"


def change(row: Row) -> str:
    return between(row, "change", points) if row["change"] else ""


def ruler(file: str) -> str:
    """Bytes, accuracy and time of every stack."""
    found = rows(file)
    dense = next(row for row in found if row["stack"] == DENSE)
    lines = [
        (
            str(number),
            f"`{row['stack']}`",
            f"{float(row['effective_bits']):.2f}",
            *(f"{float(row[f'{what}_mib']):.1f} MiB, {float(row[f'{what}_ratio']):.2f}x" for what in ("held", "read")),
            between(row, "accuracy", percent),
            change(row),
            f"{float(row['ms_per_token']) / float(dense['ms_per_token']):.2f}x",
        )
        for number, row in enumerate(found, start=1)
    ]
    return table(("#", "stack", "bits", "held", "read", "accuracy, %", "against `none`", "ms/token"), lines)


def tasks(file: str) -> str:
    """Accuracy by task, a column a stack."""
    found = rows(file)
    head = ("accuracy, %", *(str(number) for number in range(1, len(found) + 1)))
    return table(head, [(task, *(percent(row, task) for row in found)) for task in TASKS if task in found[0]])


def short(file: str) -> str:
    """The stacks of README."""
    found = {row["stack"]: row for row in rows(file)}
    lines = []
    for name in SHORT:
        row = found[name]
        sizes = (
            f"{float(row[f'{what}_mib']):.1f} MiB" if name == DENSE else f"{float(row[f'{what}_ratio']):.1f}x less"
            for what in ("held", "read")
        )
        stack = "uncompressed" if name == DENSE else f"`{name}`"
        bits = f"{float(row['effective_bits']):.1f}"
        lines.append((stack, bits, *sizes, between(row, "accuracy", percent), change(row)))
    return table(("stack", "bits", "held", "read", "accuracy, %", "against uncompressed"), lines)


def divergence(file: str) -> str:
    """How far next-token distributions are from the uncompressed cache's."""
    lines = [
        (
            f"`{row['stack']}`",
            f"{float(row['effective_bits']):.2f}",
            f"{float(row['kl']):.4f}",
            f"{100 * float(row['overlap']):.1f}",
            f"{100 * float(row['overlap_low']):.1f} to {100 * float(row['overlap_high']):.1f}"
            if float(row["overlap"]) < 1  # not the uncompressed cache itself
            else "",
            f"{100 * float(row['top1']):.1f}",
        )
        for row in fidelity(file)
    ]
    return table(("stack", "bits", "KL, nats", "1 - TVD, %", "95% interval", "top-1, %"), lines)


KINDS: dict[str, Callable[[str], str]] = {"ruler": ruler, "tasks": tasks, "short": short, "divergence": divergence}
PLACE = re.compile(r"(<!-- table: (\w+) of (\w+\.csv) -->\n\n?)((?:\|[^\n]*\n)*)")


def renewed(text: str) -> str:
    """A document with its tables made anew."""
    return PLACE.sub(lambda found: found[1] + KINDS[found[2]](found[3]), text)


def write() -> None:
    for document in DOCUMENTS:
        document.write_text(renewed(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
