"""Every Python block of README and docs/ runs, page by page, from top to bottom.

A block with a title is a file of that name, which later blocks import. What needs a GPU, vLLM or a model of the hub
says so in a comment before it (`<!-- not run: needs vLLM -->`), and is compiled only.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import documents
import pytest

from kvcomp.integrations.huggingface import models
from kvcomp.stages import registry

EXCUSES = {"needs vLLM", "needs a GPU", "needs a model of the hub"}
PAGES = [path for path in documents.DOCUMENTS if any(b.language == "python" for b in documents.blocks(path))]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return models.load_model("smollm2-135m", device="cpu")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: tuple[Any, Any]) -> Iterator[Path]:
    """A folder of a page's own, where its files can be imported, with the packaged model available."""
    model, tokenizer = smollm2
    monkeypatch.setattr(models, "load_model", lambda name: {"smollm2-135m": (model, tokenizer)}[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = registry.stages()
    own = {name: stage for name, stage in known.items() if stage.__module__.startswith("kvcomp.")}
    registry._stages.clear()
    registry._stages.update(own)
    yield tmp_path
    registry._stages.clear()
    registry._stages.update(known)
    model.config._attn_implementation = "sdpa"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::kvcomp.errors.KvcompWarning")
@pytest.mark.parametrize("path", PAGES, ids=documents.name)
def test_python_blocks_run(path: Path, elsewhere: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    files = []
    for block in documents.blocks(path):
        if block.language != "python":
            continue
        code = "\n" * (block.line - 1) + block.text  # a failure names the line of the page
        ast.parse(code, filename=str(path))
        if block.excuse is not None:
            assert block.excuse in EXCUSES, f"{documents.name(path)}:{block.line}: {block.excuse}"
        elif block.title is not None:
            (elsewhere / block.title).write_text(block.text, encoding="utf-8")
            files.append(Path(block.title).stem)
            importlib.invalidate_caches()
            importlib.import_module(files[-1])
        else:
            exec(compile(code, str(path), "exec"), namespace)
    for module in files:
        sys.modules.pop(module, None)


def test_every_page_was_found() -> None:
    assert {"README.md", "docs/index.md", "docs/huggingface.md", "docs/extend.md"} <= set(map(documents.name, PAGES))


def test_the_engine_of_the_page_attends_as_torch_does(elsewhere: Path) -> None:
    """Prompts see each other exactly: the 20 lines under "An engine" give what dense attention gives."""
    import torch
    from torch.nn import functional as F

    block = next(b for b in documents.blocks(documents.DOCS / "extend.md") if b.title == "engine.py")
    found: dict[str, Any] = {}
    exec(compile(block.text, "engine.py", "exec"), found)
    starts = [0, *torch.tensor(found["lengths"]).cumsum(0).tolist()]
    for a, b in pairwise(starts):
        q, k, v = (found[name][a:b].transpose(0, 1)[None] for name in ("query", "key", "value"))
        dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(found["out"][a:b], dense, atol=1e-5, rtol=1e-5)
    assert found["pool"][1].any()
    assert not found["pool"][4:].any()


def test_methods_of_the_extend_page_are_the_examples() -> None:
    examples = documents.ROOT / "examples" / "methods"
    titled = {b.title: b.text for b in documents.blocks(documents.DOCS / "extend.md") if b.title is not None}
    assert {path.name: documents.read(path) for path in examples.glob("*.py")} == {
        name: text for name, text in titled.items() if name != "engine.py"
    }
    assert all(len(text.splitlines()) <= 50 for text in titled.values())
