"""Words that a reader of PyTorch's or vLLM's documentation would not understand, or that mean two things here.

Documents, docstrings and comments are free of all of them; names of code in backticks do not count.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kvcomp", "policies", "quantizers", "sparse", "kernels", "integrations", "benchmarks", "examples", "tests")
GENERATED = {"docs/models.md"}  # from the sentences of the source
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
DOCUMENTS = [path for path in PAGES if path.relative_to(ROOT).as_posix() not in GENERATED]

# A pattern, and what to write instead.
WORDS = {
    r"\bbehind\b": "after, of, remaining",
    r"\bstands? in\b": "is documented in, replaces",
    r"\bto look would\b": "reading values on the host would synchronize the GPU",
    r"\b(was|were|is|are) thrown out\b": "preempted, evicted",
    r"\blet(s|ting)? (\w+ ){0,3}go\b": "evict",
    r"\bgets? told\b|\bis told\b|\bare told\b|\bwhat it is of\b": "name who reports what",
    r"\bhanded\b": "passed, given",
    r"(?<!-)\bapart\b(?! from)": "separately, outside of the graph, detached",
    r"\bat hand\b": "available, current",
    r"\broom for\b": "memory for, reserve",
    r"\bsave (those|few|where)\b": "except",
    r"\bobstacles?\b": "reason",
    r"\bthe middles\b": "thresholds",
    r"\bsays? of (itself|themselves)\b": "its summary",
    r"\bno token never\b|\bwhat is no token\b": "past the last token",
    r"\bwords behind\b": "generated tokens appended",
    r"\bthe other way\b": "the opposite, more",
    r"\bhangs? on\b": "depends on",
    r"\bloud\b": "of large norm",
    r"\bdoors?\b": "entry, checks",
    r"\bchapters?\b": "parts",
}
# Identifiers that were renamed for the field's names.
NAMES = {
    "Sides": "KVLayout",
    "kernel_sides": "kernel_layouts",
    "Numbers": "Dense",
    "middles": "thresholds",
    "let_go": "evict_pages",
}

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]


def found(text: str, words: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    """Line, what is written there, and what to write instead."""
    for pattern, instead in words.items():
        for hit in re.finditer(pattern, text, re.IGNORECASE):
            yield text.count("\n", 0, hit.start()) + 1, hit[0], instead


def prose_of(path: Path) -> str:
    """A document without blocks and code, or a source's docstrings and comments; as many lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
        return re.sub(r"`[^`\n]*`", "", text)
    lines = [""] * (text.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] += token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            constant = node.body[0].value  # type: ignore[attr-defined]
            for i, line in enumerate(str(constant.value).split("\n")):
                lines[constant.lineno - 1 + i] += line
    return re.sub(r"`[^`\n]*`", "", "\n".join(lines))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_documents_use_the_words_of_the_field(path: Path) -> None:
    told = [f"{name(path)}:{line}: {word!r}: {instead}" for line, word, instead in found(prose_of(path), WORDS)]
    assert not told, "\n".join(told)


@pytest.mark.parametrize("path", sources(), ids=name)
def test_sources_use_the_words_of_the_field(path: Path) -> None:
    told = [f"{name(path)}:{line}: {word!r}: {instead}" for line, word, instead in found(prose_of(path), WORDS)]
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NAME and token.string in NAMES:
            told.append(f"{name(path)}:{token.start[0]}: {token.string}: {NAMES[token.string]}")
    assert not told, "\n".join(told)


def test_a_word_is_seen_where_it_stands() -> None:
    text = "Pages lie\nbehind it, and it lets old pages go.\nRecall is apart from that."
    assert [(line, word) for line, word, _ in found(text, WORDS)] == [(2, "behind"), (2, "lets old pages go")]


def test_only_prose_is_read(tmp_path: Path) -> None:
    page, module = tmp_path / "page.md", tmp_path / "module.py"
    page.write_text("`behind` is code\n```\nbehind\n```\nbehind\n", encoding="utf-8")
    assert [line for line, _, _ in found(prose_of(page), WORDS)] == [5]
    module.write_text('"""One.\n\nbehind"""\n\nbehind = "behind"  # behind\n', encoding="utf-8")
    assert [line for line, _, _ in found(prose_of(module), WORDS)] == [3, 5]
