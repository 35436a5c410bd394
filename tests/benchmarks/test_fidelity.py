"""Next-token distributions of compressed caches against the dense ones."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import tiny_folder
import torch
import typer
from tiny_models import make
from transformers import DynamicCache
from typer.testing import CliRunner

from kvcomp.benchmarks import fidelity
from kvcomp.errors import KvcompError


def test_figures_are_those_of_the_definitions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    row = fidelity.Fidelity("")
    row.add(p.log(), q.log() + 3)  # logits are known up to a constant
    row.add(p.log(), p.log())
    assert row.kl == pytest.approx([0.25 * torch.tensor(2.0).log().item(), 0], abs=1e-6)
    assert row.overlap == pytest.approx([0.75, 1])
    assert row.top1 == [0, 1]


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_dense_predictions_are_those_of_the_library(chunk: int | None) -> None:
    model, ids = make("llama"), torch.randint(3, 256, (1, 212), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids, past_key_values=DynamicCache(config=model.config)).logits[0, -12:]
        ((spec, dense, logits, bits),) = fidelity.measure(model, ids, ["none"], 12, chunk)
    assert spec == "none"
    assert bits >= 32
    torch.testing.assert_close(dense, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_fewer_bits_are_farther_from_dense(capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = make("llama"), torch.randint(3, 256, (1, 320), generator=torch.Generator().manual_seed(0))
    stacks = ["int(bits=8)", "int(bits=4)", "turboquant(bits=1)", "int8 + quest(pages=1, dense_layers=0)"]
    rows = {spec: fidelity.Fidelity(spec) for spec in stacks}
    with torch.inference_mode():
        for spec, dense, logits, bits in fidelity.measure(model, ids, stacks, 20):
            rows[spec].add(dense, logits)
            rows[spec].bits.append(bits)
    overlaps = [sum(rows[spec].overlap) / 20 for spec in stacks]
    assert 0.99 < overlaps[0] <= 1
    assert overlaps[0] > overlaps[1] > overlaps[2]
    assert overlaps[3] < overlaps[0]
    fidelity.table(list(rows.values()), "title")
    shown = capsys.readouterr().out
    assert all(spec.split(" ")[0] in shown for spec in stacks)


def test_the_command(tmp_path: Path) -> None:
    folder = tiny_folder.save(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60, encoding="utf-8")
    app, out = typer.Typer(), tmp_path / "out.csv"
    app.command()(fidelity.main)
    given = ["--model", str(folder), "--text", str(text), "--context", "200", "--scored", "6", "--stack", "int8"]
    result = CliRunner().invoke(app, [*given, "--stack", "kivi(bits=2)", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "kivi(bits=2)" in result.stdout
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["stack"] for row in rows] == ["int8"] * 6 + ["kivi(bits=2)"] * 6
    assert all(0 <= float(row["overlap"]) <= 1.0001 for row in rows)
    with pytest.raises(KvcompError, match=r"text: .*less than 10000000 \+ 206"):
        CliRunner().invoke(app, [*given, "--start", "10000000"], catch_exceptions=False)
