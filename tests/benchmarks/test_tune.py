"""Which stack `kvcomp tune` chooses, and that the command says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_folder
from command import refused
from command import run as command

from kvcomp import Stack
from kvcomp.benchmarks.divergence import FidelityRow
from kvcomp.benchmarks.results import RunError
from kvcomp.benchmarks.tune import GRID, Goal, front, goal, write_texts


def row(stack: str, held: float, overlap: float) -> FidelityRow:
    shares = (overlap, overlap - 0.01, overlap + 0.01)
    return FidelityRow(
        "", 64, "fidelity_text", stack, 1, 4, 4.0, 1.0, held, held, 0.1, None, None, *shares, 1, 1, 1, 1, 0, None, None
    )


ROWS = [row("a", 2, 0.999), row("b", 4, 0.99), row("c", 4, 0.95), row("d", 8, 0.92), row("e", 7, 0.80)]


def test_the_front_has_what_nothing_beats() -> None:
    assert [one.stack for one in front(ROWS)] == ["a", "b", "d"]
    assert [one.stack for one in front([row("x", 2, 0.9), row("y", 2, 0.9)])] == ["x"]


@pytest.mark.parametrize(
    ("held", "tvd", "chosen"),
    [
        ("4x", None, "b"),
        ("7", None, "d"),
        ("9x", None, None),
        (None, "1%", "b"),
        (None, None, "b"),
        (None, "0.06", "b"),
        (None, "10 %", "d"),
        (None, "0.05%", None),
    ],
)
def test_the_choice(held: str | None, tvd: str | None, chosen: str | None) -> None:
    best = goal(held, tvd).choose(ROWS)
    assert (best and best.stack) == chosen


def test_what_comes_nearest() -> None:
    assert Goal(held=20).nearest(ROWS).stack == "d"
    assert Goal(tvd=0.0001).nearest(ROWS).stack == "a"


@pytest.mark.parametrize(
    ("held", "tvd", "said"),
    [
        ("8x", "1%", "only one of them"),
        ("eight", None, "held: 'eight' is not like 8x"),
        ("1x", None, "held: '1x'"),
        ("nan", None, "held: 'nan'"),
        (None, "200%", "tvd: '200%'"),
        (None, "-1", "tvd: '-1'"),
        (None, "2", "tvd: '2'"),
        (None, "", "tvd: ''"),
    ],
)
def test_odd_goals(held: str | None, tvd: str | None, said: str) -> None:
    with pytest.raises(RunError, match=re.escape(said)):
        goal(held, tvd)


def test_the_grid_is_canonical() -> None:
    assert [Stack.parse(spec).quantizer is not None for spec in GRID] == [True] * len(GRID)
    assert len({Stack.parse(spec).hash for spec in GRID}) == len(GRID)


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    write_texts([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path)
    assert (tmp_path / "perplexity.txt").read_text(encoding="utf-8") == "one\n\ntwo"
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    for name, said in (("c.txt", "is not UTF-8"), ("d.txt", "No such file")):
        with pytest.raises(RunError, match=rf"text: .*{name}.*{said}"):
            write_texts([tmp_path / name], tmp_path)


def test_the_command(tmp_path: Path) -> None:
    model, out = tiny_folder.save(tmp_path / "model"), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60, encoding="utf-8")
    options = ["--model", str(model), "--text", str(text), "--context", "200", "--samples", "1", "--out", str(out)]
    options += ["--stack", "int8", "--stack", "turboquant(bits=1)"]
    said = command("tune", *options, "--held", "1.5x")
    assert 'CompressedCache("int8", model)' in said.stdout, said.output
    assert (out / "report.html").is_file()
    again = command("tune", *options, "--tvd", "90%")
    assert 'CompressedCache("turboquant(bits=1)", model)' in again.stdout
    failed = command("tune", *options, "--held", "5000x")
    assert (said.exit_code, again.exit_code, failed.exit_code) == (0, 0, 1)
    assert "No stack of the grid meets the goal; the nearest is turboquant(bits=1)" in failed.stdout
    refused(command("tune", "--text", tmp_path / "none.txt", "--out", out), "text:", "none.txt", "No such file")
    refused(command("tune", *options, "--held", "2x", "--tvd", "1%"), "held, tvd: only one")
