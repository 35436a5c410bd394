"""Every causal LM that transformers has, and ten models with images: right, or refused in words.

Each runs in a process of its own. What is found is a row of docs/models.md, which `make test-models` writes.
"""

from __future__ import annotations

from typing import Any

import pytest
from document import DOCUMENT, compresses, head, is_pinned, keep, row
from images import MODELS, tiny_model_of_images
from isolated import isolated
from situations import SENSITIVE, WITH_IMAGES, Prompt, examine
from tiny import NotBuiltError, architectures, tiny_model

NAMES = [*architectures(), *MODELS]
BAD = ("wrong", "crash")


def _examined(name: str) -> dict[str, Any]:
    if name in MODELS:
        model, prompt = tiny_model_of_images(name)
        return examine(model, prompt, WITH_IMAGES)
    try:
        model = tiny_model(name)
    except NotBuiltError as error:
        return {"not_built": str(error)}
    return examine(model, Prompt.padded())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_served_right_or_refused(name: str) -> None:
    result = isolated(lambda: _examined(name))
    keep(name, result)
    assert "fatal" not in result, result["fatal"]
    verdicts = result.get("verdicts", {})
    assert not {what: said for what, said in verdicts.items() if said.startswith(BAD)}
    if compresses(result):
        assert result["pages"] > 0, "too few tokens for a page: nothing was tested"
        assert result["sensitivity"] >= SENSITIVE, "a wrong cache would not have been seen"
    elif "layers" in result:
        assert any("nothing is compressed" in said for said in result["warned"])
    if is_pinned():
        known = DOCUMENT.read_text(encoding="utf-8").splitlines() if DOCUMENT.exists() else []
        assert row(name, result) in known, "docs/models.md says something else: make test-models writes it anew"


@pytest.mark.skipif(not is_pinned(), reason="the document is of the pinned transformers")
def test_the_document_is_of_these_models() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.startswith(head()), "make test-models writes docs/models.md anew"
    assert [line.split(" | ")[0].removeprefix("| ") for line in text.removeprefix(head()).splitlines()] == NAMES


def test_most_architectures_are_built() -> None:
    """Of a newer transformers, too: those that are not say why in the document."""
    assert len(NAMES) > 200
    assert len(MODELS) == 10


def test_a_crash_and_a_hang_are_results(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes
    import time

    monkeypatch.setattr("isolated.SECONDS", 1)
    assert isolated(lambda: {"answer": 1}) == {"answer": 1}
    assert isolated(lambda: {"answer": ctypes.string_at(0)}) == {"fatal": "ended by SIGSEGV"}
    assert isolated(lambda: {"answer": time.sleep(30)}) == {"fatal": "no answer in time"}
    assert "ZeroDivisionError" in isolated(lambda: {"answer": 1 // 0})["fatal"]
