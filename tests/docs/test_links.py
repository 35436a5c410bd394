"""No link of README, the changelog or docs/ is dead: files, pictures and headings exist."""

from __future__ import annotations

import re
from pathlib import Path

import documents
import pytest

FIGURES = {".svg", ".png"}
MADE = {"build", "out", "dist"}  # by commands


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=documents.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in documents.links(path):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), f"{link}: only https leads elsewhere"
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{documents.name(path)}: {link} does not exist"
        assert target.is_relative_to(documents.ROOT)
        if path.parent == documents.DOCS:
            assert target.is_relative_to(documents.DOCS), f"{link}: the site has the files of docs/ alone"
        if anchor:
            assert anchor in documents.anchors(target), f"{documents.name(path)}: {link} names no heading"


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=documents.name)
def test_every_file_that_is_named_exists(path: Path) -> None:
    """`tests/kvcomp/stages/test_stack.py` and `kernels/reference` are files and folders of the repository."""
    tops = {
        entry.name for entry in documents.ROOT.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    } - MADE
    for span in re.findall(r"`([\w./-]+)`", documents.prose(path)):
        if "/" in span and span.split("/")[0] in tops and not span.startswith("kvcomp/__"):
            assert (documents.ROOT / span).exists(), f"{documents.name(path)}: {span} does not exist"


def test_every_example_is_listed() -> None:
    """docs/examples.md has a row for each script, and no other."""
    listed = set(re.findall(r"`([\w/]+\.(?:py|ipynb))`", documents.read(documents.DOCS / "examples.md")))
    folder = documents.ROOT / "examples"
    scripts = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in (".py", ".ipynb")}
    assert scripts == listed


def test_a_dead_link_and_a_dead_anchor_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b(c)`: d\n\n[x](gone.md) and ![y](#a-bc-d)\n```\n[no](link)\n```\n", encoding="utf-8")
    assert documents.links(page) == ["gone.md", "#a-bc-d"]
    assert documents.anchors(page) == {"a-bc-d"}


def test_every_page_is_in_the_navigation() -> None:
    settings = documents.read(documents.ROOT / "mkdocs.yml")
    listed = re.findall(r": (\S+\.md)$", settings, re.MULTILINE)
    assert sorted(listed) == sorted(p.relative_to(documents.DOCS).as_posix() for p in documents.DOCS.rglob("*.md"))


def test_every_picture_is_shown() -> None:
    shown = {Path(link).name for path in documents.DOCUMENTS for link in documents.links(path)}
    assert {p.name for p in documents.DOCS.rglob("*") if p.suffix in FIGURES} <= shown
