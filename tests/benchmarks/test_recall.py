"""How much of the attention lies on what is read."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import tiny_folder
import torch
import typer
from synthetic import MODEL
from typer.testing import CliRunner

from kvcomp.benchmarks import recall
from kvcomp.calibration.file import Calibration
from kvcomp.errors import KvcompError
from kvcomp.quantizers.latent import JointMoments, Latent

WINDOW = "window(sinks=2, recent=16)"


def layers_of(tokens: int, dtype: torch.dtype = torch.float32, count: int = 2) -> list[recall.Layer]:
    """Layers of 4 query heads and 2 KV heads."""
    torch.manual_seed(0)
    layers = []
    for _ in range(count):
        layer = recall.Layer()
        layer.add(torch.randn(1, 4, tokens, 64), 2 * torch.randn(1, 2, tokens, 64), torch.randn(1, 2, tokens, 64))
        layers.append(layer.to(dtype))
    return layers


def test_mass_is_the_share_of_the_attention_on_what_is_read() -> None:
    layers = layers_of(400, count=1)
    spec = f"sketch(tokens=32, rank=64, bits=8) + {WINDOW}"
    found = recall.measure(spec, spec, layers, 400, 1)
    layer, masses = layers[0], []
    for head in range(2):  # 64 coordinates in 8 bits: as good as the keys themselves
        q, k = layer.queries[0, 2 * head : 2 * head + 2, -1:], layer.keys[0, head]
        shares = (q @ k.T * 0.125).softmax(-1)[:, 0]
        pages = (399 - 18) // 16 * 16
        paged = shares[:, 2 : 2 + pages]
        best = paged.div(paged.sum(-1, keepdim=True)).mean(0).topk(32).indices
        masses.append(1 - paged.sum(-1) + paged[:, best].sum(-1))
    assert found.mass == pytest.approx(float(torch.stack(masses).mean()), abs=0.01)
    assert 0 < found.read < 0.5


@pytest.mark.parametrize("name", ["quest(pages=99, dense_layers=0)", "nsa(pages=99)", "sketch(tokens=9999)"])
def test_everything_read_is_all_of_it(name: str) -> None:
    found = recall.measure(name, f"{name} + {WINDOW}", layers_of(300), 300, 3)
    assert found.mass == pytest.approx(1, abs=1e-4)
    assert found.error < 1e-4


def test_what_stands_for_the_rest_is_no_mass_but_less_error() -> None:
    nsa, moba = (
        recall.measure(name, f"{name} + {WINDOW}", layers_of(600), 600, 2)
        for name in ("nsa(pages=2, first=0, last=0)", "moba(pages=2, last=0)")
    )
    assert nsa.mass < 0.9
    assert nsa.error < moba.error


def test_a_share_of_the_bytes() -> None:
    layers = layers_of(1000, torch.bfloat16)
    for template, share in (("quest({}, dense_layers=0)", 0.3), ("sketch({}) + int8", 0.2)):
        spec = recall.at_share(f"{template.format('tokens={tokens}')} + {WINDOW}", share, layers)
        assert spec is not None
        found = recall.measure(spec, spec, layers, 1000, 2)
        assert 0.8 * share < found.read <= share + 0.02
    assert recall.at_share("quest(tokens={tokens}, dense_layers=0)", 0.01, layers) is None
    assert recall.at_share("quest(pages=3)", 0.01, layers) == "quest(pages=3)"


def test_latents_are_chosen_from_for_all_heads(tmp_path: Path) -> None:
    """At full rank a layer's own attention, of which a share of the latents is read."""
    layers, moments = layers_of(600, count=1), JointMoments()
    moments.add(layers[0].queries, layers[0].keys, layers[0].values)
    tensors = {f"0.{name}": x for name, x in Latent.calibrate(moments.result()).items()}
    path = tmp_path / "c.safetensors"
    Calibration("latent", {}, MODEL, (("a.txt", "0" * 64),), 600, 600, tensors).save(path)
    spec = f"latent(rank=1.0, calibration={str(path)!r}) + quest(tokens={{tokens}}, dense_layers=0) + {WINDOW}"
    whole = recall.measure("", spec.format(tokens=9999), layers, 600, 2)
    assert whole.mass == pytest.approx(1, abs=1e-3)
    assert whole.error < 1e-3
    half = recall.at_share(spec, 0.5, layers)
    assert half is not None
    found = recall.measure("", half, layers, 600, 2)
    assert 0.35 < found.read <= 0.52
    assert 0.3 < found.mass < 0.95


def test_the_command(tmp_path: Path) -> None:
    tiny = tiny_folder.save(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("The grass is green. The sky is blue. One of the special magic numbers is 7. " * 300)
    app = typer.Typer()
    app.command()(recall.main)
    given = ["--model", str(tiny), "--text", str(text), "--context", "256", "--queries", "4", "--start", "10"]
    stacks = [
        "--stack",
        f"quest(tokens={{tokens}}, dense_layers=0) + {WINDOW}",
        "--stack",
        f"sketch(keep=0.5) + {WINDOW}",
    ]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [*given, *stacks, "--share", "0.5", "--share", "0.8", "--out", str(tmp_path / "recall")]
    )
    assert result.exit_code == 0, result.output
    with (tmp_path / "recall.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert float(rows[0]["mass"]) <= float(rows[1]["mass"])
    assert (tmp_path / "recall_256.svg").read_text().startswith("<svg")
    for argument, value, message in (
        ("--stack", "kivi(bits=4)", "has no selector"),
        ("--cache-dtype", "int8", "neither bfloat16 nor float32"),
        ("--dtype", "int8", "none of float32, bfloat16, float16"),
        ("--text", str(tmp_path / "no.txt"), "no.txt"),
    ):
        failed = CliRunner().invoke(app, [*given, *stacks, argument, value])
        assert isinstance(failed.exception, KvcompError)
        assert message in str(failed.exception)
