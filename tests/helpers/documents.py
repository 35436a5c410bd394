"""README and the other documents at the top, and the pages of docs/, as tests read them: blocks, headings, links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(```+)([^\n]*)\n(.*?)^\1[ \t]*$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: (needs [^>]+) -->\s*\Z")
TITLE = re.compile(r'title="([^"]+)"')


class Block(NamedTuple):
    """A fenced block. line: of its first line of text. title: the file that it is. excuse: why it cannot run here."""

    path: Path
    line: int
    language: str
    text: str
    title: str | None
    excuse: str | None


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> list[Block]:
    text, found = read(path), []
    for fence in FENCE.finditer(text):
        info, before = fence[2].strip(), text[: fence.start()]
        excuse, title = NOT_RUN.search(before), TITLE.search(info)
        line = before.count("\n") + 2
        language = info.split(" ")[0]
        found.append(Block(path, line, language, fence[3], title and title[1], excuse and excuse[1]))
    return found


def prose(path: Path) -> str:
    """The text without fenced blocks; as many lines."""
    return FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), read(path))


def anchors(path: Path) -> set[str]:
    """The ids of a page's headings, as Python-Markdown's toc and GitHub make them."""
    found: dict[str, int] = {}
    ids = set()
    for heading in re.findall(r"^#{1,6} +(.+?)\s*#*$", prose(path), re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)).strip().lower()
        slug = re.sub(r"[\s]+", "-", words)
        count = found.get(slug, 0)
        found[slug] = count + 1
        ids.add(f"{slug}_{count}" if count else slug)
    return ids


def links(path: Path) -> list[str]:
    """Targets of links and pictures, outside of code."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    return re.findall(r"\]\(([^()\s]+)\)", text)
