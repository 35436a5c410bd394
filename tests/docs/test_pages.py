"""What README and the generated pages promise: length, every method with its paper, pictures of measured tables."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import documents
import pytest

import kvcomp.stages.stack
from kvcomp.cost.hardware import GPUS
from kvcomp.integrations.huggingface.shapes import builtin
from kvcomp.stages.registry import stages

README = documents.ROOT / "README.md"
OURS = {"-", "", "kvcomp"}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documents_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return load(documents.DOCS / "hooks.py")


def own_stages() -> dict[str, type]:
    assert kvcomp.stages.stack  # registers window
    return {name: stage for name, stage in stages().items() if stage.__module__.startswith("kvcomp.")}


def test_readme_is_one_screen() -> None:
    assert len(documents.read(README).splitlines()) <= 180


def test_readme_has_every_method_with_its_papers() -> None:
    """A line of the table names one stage or several, and has exactly the papers that their classes name."""
    table = documents.read(README).split("## Methods")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] == "| `"]
    named = {name: cells for cells in rows for name in re.findall(r"`(\w+)`", cells[0])}
    assert set(named) == set(own_stages())
    for cells in rows:
        names = re.findall(r"`(\w+)`", cells[0])
        papers = {paper for name in names for paper in re.findall(r"\d{4}\.\d{5}", own_stages()[name].paper)}
        assert set(re.findall(r"abs/(\d{4}\.\d{5})", cells[2])) == papers, cells[0]
        assert re.findall(r"\[(\d{4}\.\d{5})\]", cells[2]) == re.findall(r"abs/(\d{4}\.\d{5})", cells[2])


def test_readme_repeats_figures_of_the_results() -> None:
    """Rows of README's small table are rows of the long one."""
    long = documents.read(documents.DOCS / "results.md")
    table = documents.read(README).split("## What it saves")[1].split("\n## ")[0]
    for line in table.splitlines():
        if line.startswith("| `"):
            stack, bits, held, read, accuracy, change = (cell.strip() for cell in line.strip("|").split("|"))
            row = next(r for r in long.splitlines() if re.match(rf"\| \d+ \| {re.escape(stack)} \|", r))
            _, _, b, h, r, a, c, _ = (cell.strip() for cell in row.strip("|").split("|"))
            assert (accuracy, change) == (a, c)
            assert float(bits) == pytest.approx(float(b), abs=0.06)
            for short, full in ((held, h), (read, r)):
                assert float(short.split("x")[0]) == pytest.approx(float(full.split(", ")[1].rstrip("x")), abs=0.06)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_tables_are_what_make_results_makes(page: str) -> None:
    making = load(documents.DOCS / "figures" / "tables.py")
    text = documents.read(documents.DOCS.parent / page)
    assert making.renewed(text) == text, "make results writes it anew"
    assert len(making.PLACE.findall(text)) == text.count("<!-- table: ") == {"README.md": 1}.get(page, 5)
    spoilt = re.sub(r"\[(\d)", r"[9\1", text)  # figures in brackets
    assert spoilt != text
    assert making.PLACE.findall(making.renewed(spoilt)) == making.PLACE.findall(text)


def test_families_of_stacks_in_pictures() -> None:
    drawing = load(documents.DOCS / "figures" / "draw.py")
    expected = {
        "none": "quantizer",
        "kivi(bits=4) + window(recent=128)": "quantizer",
        "svd(rank=1.0, bits=4, calibration)": "quantizer",
        "snapkv(keep=0.5)": "policy",
        "snapkv(keep=0.5) + none": "policy",
        "snapkv(keep=0.25, kernel=31) + kivi(bits=4)": "policy + quantizer",
        "kivi(bits=4) + sketch(keep=0.1)": "selector",
    }
    assert {stack: drawing.family(stack) for stack in expected} == expected
    assert set(expected.values()) == set(drawing.FAMILIES)


def test_ratios_of_a_bfloat16_cache_are_those_that_the_stacks_compute() -> None:
    """README: "2.8x less at 2k tokens and 3.2x at 32k"; choose.md: a ratio in each row, at 8k tokens."""
    stack = kvcomp.stages.stack.Stack.parse("kivi(bits=4)")
    said = re.search(r"holds ([\d.]+)x less at 2k tokens and ([\d.]+)x at 32k", documents.read(README))
    assert said is not None
    for tokens, ratio in zip((2048, 32_768), said.groups(), strict=True):
        assert 16 / stack.effective_bits(64, tokens) == pytest.approx(float(ratio), abs=0.06)
    goals = documents.read(documents.DOCS / "choose.md").split("## By goal")[1].split("\n## ")[0]
    checked = 0
    for line in goals.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        ratios = re.findall(r"(?<![\d.])(\d\.\d)x", cells[2]) if len(cells) > 3 else []
        for spec, ratio in zip(re.findall(r"`([^`]+)`", cells[1]) if ratios else (), ratios, strict=False):
            window = " + window(sinks=4, recent=128)" if spec.startswith("klt") else ""
            bits = kvcomp.stages.stack.Stack.parse(spec + window).effective_bits(64, 8192)
            assert 16 / bits == pytest.approx(float(ratio), abs=0.06), spec
            checked += 1
    assert checked == 5


def test_plan_knows_as_many_models_and_devices_as_the_page_says() -> None:
    page = documents.read(documents.DOCS / "choose.md")
    numbers = {10: "ten", 11: "eleven", 12: "twelve", 15: "Fifteen", 16: "Sixteen", 17: "Seventeen", 18: "Eighteen"}
    assert f"{numbers[len(builtin())]} well-known models and {numbers[len(GPUS)]} GPUs" in page


def test_the_headline_is_drawn_from_the_tables(tmp_path: Path) -> None:
    """The committed pictures have the texts, hence the figures, that the script draws, and load nothing."""
    drawing = load(documents.DOCS / "figures" / "draw.py")
    for drawn in drawing.draw(tmp_path):
        kept = documents.read(documents.DOCS / "figures" / drawn.name)
        new, old = (re.findall(r">([^<>]+)</text>", svg) for svg in (documents.read(drawn), kept))
        assert new == old, "python docs/figures/draw.py draws it anew"
        assert len(new) > 10
        assert len(kept) < 100_000
        assert "http" not in re.sub(
            r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>|<!DOCTYPE.*?>', "", kept, flags=re.DOTALL
        )


def test_figures_of_the_headline_are_those_of_the_results() -> None:
    """docs/figures/attention_speed.csv repeats the table of docs/results.md."""
    drawing = load(documents.DOCS / "figures" / "draw.py")
    section = documents.read(documents.DOCS / "results.md").split("\n## Speed")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    table = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:4]] for cells in lines}
    found = {(row["stack"], row["context"]): row for row in drawing.rows(drawing.SPEED)}
    for (stack, context), row in found.items():
        cell = table[stack][("512", "8000", "32000").index(context)]
        assert f"{row['ms']}, {row['times_as_fast']}x" == cell
    assert {stack for stack, _ in found} == {name for name, cells in table.items() if cells[0]}


def test_the_generated_pages_have_everything(hooks: ModuleType) -> None:
    import kvcomp.stages
    from kvcomp.cli.app import app

    text = hooks.stages()
    for name, stage in own_stages().items():
        assert f"\n### {name}\n" in text
        for argument in dataclasses.fields(stage):
            assert f"| `{argument.name}` |" in text
    commands = hooks.commands()
    for command in app.registered_commands:
        assert f"## kvcomp {command.name or command.callback.__name__}" in commands
    assert "[bold]" not in commands
    assert "| `--seed` | `0` |" in commands
    listed = hooks.public("kvcomp.stages")
    for name in kvcomp.stages.__all__:
        thing = getattr(kvcomp.stages, name)
        assert f".{name}\n" in f"{listed}\n" or not (inspect.isclass(thing) or inspect.isfunction(thing)), name
    assert "::: kvcomp.integrations.huggingface.cache.CompressedCache" in hooks.public("kvcomp")
    assert hooks.changelog().startswith("# Changelog")


def test_the_changelog_has_each_entry_once() -> None:
    """Merges double entries of lists that were rewritten on one side."""
    text = documents.read(documents.ROOT / "CHANGELOG.md")
    entries = [
        " ".join(entry.split()) for entry in re.findall(r"^- .*?(?=^- |^\n|^#|^\*\*|\Z)", text, re.DOTALL | re.M)
    ]
    starts = [" ".join(entry.split()[:9]) for entry in entries]
    assert len(entries) > 100
    assert [start for start in starts if starts.count(start) > 1] == []


def test_every_mark_of_a_page_is_replaced(hooks: ModuleType) -> None:
    for path in documents.DOCUMENTS:
        for mark in re.findall(r"<!-- (\w+)", documents.prose(path)):
            assert mark in {*hooks.GENERATED, "not", "table"}, f"{documents.name(path)}: {mark}"
