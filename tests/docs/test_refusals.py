"""docs/troubleshooting.md lists every refusal of the source, and none that is gone."""

from __future__ import annotations

import ast
import re
from functools import cache

import documents
import pytest

PAGE = documents.DOCS / "troubleshooting.md"
FOLDERS = ("kvcomp", "policies", "quantizers", "sparse", "kernels", "integrations", "benchmarks")
KINDS = {"UnsupportedError", "SpecError"}
GAP = "…"
WORDS = 3  # a message of fewer words of its own is made of others, which are looked for by themselves


def text_of(node: ast.expr) -> str:
    """A message with … where it has values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return GAP


@cache
def sources() -> tuple[tuple[str, ast.AST], ...]:
    paths = [path for folder in FOLDERS for path in sorted((documents.ROOT / folder).rglob("*.py"))]
    return tuple((documents.name(path), ast.parse(documents.read(path))) for path in paths)


def raised() -> list[tuple[str, str]]:
    """Where a refusal is raised, and its sentence."""
    found = []
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                kind = getattr(node.exc.func, "id", getattr(node.exc.func, "attr", ""))
                sentence = text_of(node.exc.args[0])
                if kind in KINDS and len(re.findall(r"[A-Za-z]{2,}", sentence)) >= WORDS:
                    found.append((f"{name}:{node.lineno}", sentence))
    return found


@cache
def sentences() -> str:
    """All texts of the source, a line each."""
    texts = []
    for _, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                texts.append(" ".join(text_of(node).split()))
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                texts.append(" ".join(text_of(node.exc.args[0]).split()))
    return "\n".join(texts)


def listed() -> list[str]:
    """The patterns of the page: code in the first column of tables of sentences."""
    found = []
    inside = False
    for line in documents.read(PAGE).splitlines():
        if line.startswith("|"):
            inside = inside or line.startswith("| sentence")
            if inside:
                found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
        else:
            inside = False
    return found


def pattern(phrase: str) -> re.Pattern[str]:
    return re.compile("[^\n]*?".join(re.escape(part) for part in phrase.split(GAP)))


@pytest.mark.parametrize(("place", "sentence"), raised(), ids=lambda x: x[:60])
def test_every_refusal_is_listed(place: str, sentence: str) -> None:
    assert any(pattern(phrase).search(sentence) for phrase in listed()), f"{place}: {sentence}"


@pytest.mark.parametrize("phrase", listed())
def test_every_listed_sentence_is_one_of_the_source(phrase: str) -> None:
    assert pattern(phrase).search(sentences()), f"{phrase}: no message says so any more"


def test_the_page_was_read() -> None:
    assert len(listed()) > 60
    assert len(raised()) > 60
    assert not pattern("a sentence that … nobody wrote").search(sentences())


def test_reasons_that_messages_are_made_of_are_listed() -> None:
    """Why vLLM refuses a policy, and a model a stack, is said in sentences of a function of its own."""
    for name, function in (("integrations/vllm/checks.py", "_check_policy"),):
        tree = dict(sources())[name]
        body = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
        for node in ast.walk(body):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "why":
                sentence = text_of(node.value)
                if len(sentence.split()) > WORDS:
                    assert any(pattern(phrase).search(sentence) for phrase in listed()), sentence
