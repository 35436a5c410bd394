"""Every example runs, at small sizes, on the packaged model; what it measures is what it claims."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = 80
LONGER = {"engine.py"}  # an engine, not an excerpt
IN_VLLM = {"vllm_client.py"}  # tests/integrations/vllm/engine/test_server.py runs it


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports an example by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_documented_and_tested(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert f"python examples/{path.name}" in text
    assert "def main(" in text
    assert len(text.splitlines()) <= LINES or path.name in LONGER
    tests = [
        file
        for folder in ("examples", "integrations/vllm/engine")
        for file in (EXAMPLES.parent / "tests" / folder).glob("test_*.py")
    ]
    assert any(path.stem in file.read_text(encoding="utf-8") for file in tests), f"no test runs {path.name}"


def test_one_document_many_questions(example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    found = example("many_questions").main(fillers=16)
    assert found["right"] >= 3  # of four
    assert found["one"] < found["held"] < found["dense"]  # five conversations in less than one DynamicCache
    assert "times less" in capsys.readouterr().out


def test_long_chat_holds_no_more_from_turn_to_turn(example: Callable[[str], ModuleType]) -> None:
    stack = "streaming(sinks=4, recent=64) + int(bits=4) + window(sinks=4, recent=16)"
    found = example("long_chat").main(stack, turns=4, new_tokens=24)
    tokens, held, dense = ([turn[name] for turn in found] for name in ("tokens", "held", "dense"))
    assert tokens[-1] > 3.5 * tokens[0]
    assert held[-1] <= 1.05 * held[1]
    assert dense[-1] == pytest.approx(dense[0] * tokens[-1] / tokens[0])


def test_quantized_weights_and_cache() -> None:
    # In a process of its own: where torchao is installed, every import of transformers loads it.
    torchao = Path(sys.prefix) / "torchao"
    assert torchao.is_dir(), f"`make test` installs it: pip install --no-deps --target {torchao} torchao"
    code = f"import json, runpy; main = runpy.run_path({str(EXAMPLES / 'quantized_weights.py')!r})['main']\n"
    code += "print(json.dumps(main('int(bits=4)', tokens=200, scored=8)))"
    paths = os.pathsep.join([str(torchao), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    plain, compressed, int8, both = json.loads(done.stdout.splitlines()[-1])
    assert int8["weights"] == both["weights"] < 0.6 * plain["weights"]
    assert compressed["held"] == both["held"] < plain["held"] / 2
    for figures in (compressed, int8, both):
        assert figures["perplexity"] == pytest.approx(plain["perplexity"], rel=0.1)


def test_a_prefix_is_held_once(example: Callable[[str], ModuleType]) -> None:
    found = example("shared_prefix").main(prefix_tokens=320, new_tokens=4)
    assert 1.5 * found["together"] < found["apart"] < found["dense"] / 3


def test_a_cache_is_sent_to_another_process(example: Callable[[str], ModuleType]) -> None:
    found = example("save_and_send").main(tokens=200)
    assert found["there"].endswith(found["here"].strip())
    assert "1712" in found["here"]
    assert found["sent"] < found["dense"]


def test_own_policy(example: Callable[[str], ModuleType]) -> None:
    from kvcomp import SpecError, Stack
    from kvcomp.stages import registry

    try:
        module = example("own_policy")
        found = module.main(tokens=400)
        assert 1.5 * found["valuenorm(keep=0.5)"]["held"] < found["DynamicCache"]["held"]
        with pytest.raises(SpecError, match="power"):
            Stack.parse("valuenorm(power=0)")
        values = torch.ones(1, 2, 50, 4)
        values[0, :, 17] = 9.0
        scores = module.ValueNorm().scores(type("Chunk", (), {"values": values}))
        assert scores.shape == (1, 2, 50)
        assert scores.argmax(-1).tolist() == [[17, 17]]
    finally:
        registry._stages.pop("valuenorm", None)  # other tests list all stages


def test_engine(example: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    example("engine").main(["--tokens", "4", "--blocks", "8"])
    assert "times smaller" in capsys.readouterr().out


def test_lm_eval(example: Callable[[str], ModuleType]) -> None:
    stacks = ("none", "kivi(bits=4)")
    found = example("lm_eval_stacks").main(context=400, samples=1, stacks=stacks)
    assert list(found) == list(stacks)
    assert found["kivi(bits=4)"]["held"] < found["none"]["held"]
    assert all(0 <= figures["score"] <= 1 for figures in found.values())


def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    book: Any = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), (
        "the notebook is kept without outputs"
    )
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not cells[0].outputs  # nothing is installed where all is there
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    for part in ("1712", "held", "DynamicCache", "times less"):
        assert part in said
