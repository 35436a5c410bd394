"""`kvcomp plan`: the published figures in its output, every model and GPU, and one line where it cannot go on."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
from command import refused
from typer.testing import CliRunner, Result

from kvcomp.cli.app import app
from kvcomp.cli.output import size
from kvcomp.cost.hardware import GPUS
from kvcomp.integrations.huggingface.shapes import builtin

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`kvcomp plan` without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def invoke(*args: object) -> Result:
        return CliRunner().invoke(app, ["plan", *map(str, args)])

    return invoke


def told(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def row(text: str, *starts: str) -> list[str]:
    """Words of the row that starts with the last of `starts`, after lines that start with the others."""
    lines = iter(text.splitlines())
    for start in starts:
        line = next(line for line in lines if line.strip().startswith(start))
    return line.strip().removeprefix(starts[-1]).split()


def test_published_figures_of_qwen3_8b_on_an_h100(run: Run) -> None:
    text = told(run("--model", "qwen3-8b", "--gpu", "h100", "--context", "2048,4096,40960", "--batch", "1,8,32"))
    assert "ridge 295.2 FLOP/byte" in text
    assert "147 KB of K and V per token" in text
    assert "a token's step reads 15.1 GB" in text
    assert row(text, "FLOP per byte", "2,048 tokens x 1, dense")[0] == "2088.1"
    for tokens, batch, published in (("4,096", 1, "1.12"), ("4,096", 8, "7.03"), ("4,096", 32, "16.30")):
        assert row(text, "FLOP per byte", f"{tokens} tokens x {batch}, dense")[3] == published
        assert published in row(text, f"{tokens} tokens x {batch}", "dense")
    assert row(text, "FLOP per byte", "40,960 tokens x 32, dense")[3:] == ["6.03", "4.00", "6.51"]
    bound = " ".join(row(text, "40,960 tokens x 1", "dense"))
    assert bound.startswith("6.04 GB 1.00x 16.00 6.04 GB 1.00x 21.2 GB 6.32 ")


def test_published_ladder_of_a_million_tokens(run: Run) -> None:
    text = told(run("--context", 1_000_000, "--assume", "latent/8", "--assume", "bits/4", "--assume", "reads/10"))
    assert row(text, "1,000,000 tokens x 1", "dense")[:2] == ["147", "GB"]
    assert row(text, "+ latent/8 assumed")[:2] == ["18.4", "GB"]
    assert row(text, "+ bits/4 assumed")[:2] == ["4.61", "GB"]
    assert row(text, "+ reads/10 assumed")[:5] == ["4.61", "GB", "32.00x", "461", "MB"]
    assert "nothing here provides or measures it" in text
    assert "more than the 40,960 positions" in text


def test_published_latents_of_deepseek_v3(run: Run) -> None:
    text = told(run("--model", "deepseek-v3"))
    assert "70.3 KB of K and V per token" in text
    assert "absorbed" in text
    assert "8 of 256 experts" in text


def test_the_documentation_shows_what_the_command_prints(run: Run) -> None:
    page = (Path(__file__).parents[3] / "docs" / "choose.md").read_text(encoding="utf-8")
    command, shown = re.search(r"\$ kvcomp plan (.*)\n([^`]*)```", page).groups()
    assert [line.rstrip() for line in told(run(*shlex.split(command))).strip().splitlines()] == shown.splitlines()


@pytest.mark.parametrize("model", builtin())
def test_every_model(run: Run, model: str) -> None:
    found = json.loads(told(run("--model", model, "--stack", "int(bits=8)", "--json")))
    dense, small = found["decode"]
    assert (dense["stack"], small["stack"]) == ("dense", "int(bits=8)")
    assert small["held"] < dense["held"]
    assert small["ms_per_token"] < dense["ms_per_token"]


@pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS])
def test_every_gpu(run: Run, gpu: str) -> None:
    text = told(run("--gpu", gpu.lower(), "--model", "smollm2-135m"))
    assert f"{gpu}  " in text
    assert "yes, " in text


def test_a_device_of_ones_own(run: Run) -> None:
    found = json.loads(told(run("--tflops", 100, "--bandwidth", 0.5, "--json")))
    assert found["gpu"] | {"source": ""} == {
        "name": "custom",
        "tflops": 100,
        "bandwidth_tb_s": 0.5,
        "memory_gb": None,
        "ridge": 200,
        "source": "",
    }
    assert found["decode"][0]["fits"] is None
    assert "fits" not in told(run("--tflops", 100, "--bandwidth", 0.5))
    assert "fits 8 GB" in told(run("--tflops", 100, "--bandwidth", 0.5, "--memory", 8))
    assert "no, 17 GB" in told(run("--gpu", "m3 ultra", "--memory", 16))


def test_json_and_the_table_say_the_same(run: Run) -> None:
    asked = ("--context", "5000", "--batch", "2", "--stack", "kivi(bits=2)", "--stack", "int(bits=4) + quest(pages=64)")
    found: dict[str, Any] = json.loads(told(run(*asked, "--json")))
    text = told(run(*asked, "--parts"))
    assert [r["stack"] for r in found["decode"]] == ["dense", "kivi(bits=2)", "int(bits=4) + quest(pages=64)"]
    for record in found["decode"]:
        assert record["held"] == sum(record["held_parts"].values())
        assert record["read"] == sum(record["read_parts"].values())
        assert size(record["held"]) in text
        assert f"{record['read_ratio']:.2f}x" in text
        for name, part in (record["held_parts"] | record["read_parts"]).items():
            assert f"{name} {size(part)}" in text
    quest = found["decode"][2]["read_parts"]
    assert set(quest) == {"pages", "summaries", "window", "table"}
    assert found["prefill"][0]["intensity"] > found["gpu"]["ridge"]


def test_a_local_folder(run: Run, tmp_path: Path) -> None:
    models.make("gemma3").config.save_pretrained(tmp_path / "mine")
    text = told(run("--model", tmp_path / "mine", "--context", 512, "--stack", "kivi(bits=2)"))
    assert "mine  " in text
    assert "in 2 full-attention layers; the other 2 hold at most" in text
    assert "Layers with a sliding window are packed by quantizers" in text


def test_help_teaches(run: Run) -> None:
    text = re.sub(r"[\s│]+", " ", told(run("--help")))
    for part in ("kvcomp plan --model qwen3-8b --gpu h100", "--assume latent/8", "H200", "--bandwidth", "its FLOPs"):
        assert part in text


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--model", "qwen3-9b"], ["model", "qwen3-8b"]),
        (["--model", "nobody/nothing"], ["model", "hub", "gpt-oss-120b"]),
        (["--model", "./missing"], ["model", "no folder"]),
        (["--gpu", "h10"], ["gpu", "'H100'"]),
        (["--gpu", "h100", "--tflops", "1", "--bandwidth", "1"], ["gpu", "not both"]),
        (["--tflops", "3"], ["bandwidth"]),
        (["--bandwidth", "3"], ["tflops"]),
        (["--tflops", "0", "--bandwidth", "3"], ["tflops", "positive"]),
        (["--memory", "-1"], ["memory", "positive"]),
        (["--context", "4k"], ["context", "4k"]),
        (["--context", "0"], ["context", "0"]),
        (["--batch", "many"], ["batch", "many"]),
        (["--stack", "kivvi"], ["kivi"]),
        (["--assume", "latent"], ["assume", "NAME/FACTOR"]),
        (["--weight-bits", "0"], ["weight-bits"]),
        (["--model", "deepseek-v3", "--stack", "criticalkv"], ["MLA", "snapkv"]),
        (["--model", "gpt-oss-20b", "--stack", "kivi(bits=2, group=48)"], ["kivi(group=48)", "use a group"]),
    ],
)
def test_what_cannot_be_planned_is_one_line(run: Run, args: list[str], parts: list[str]) -> None:
    result = run(*args)
    refused(result, *parts)
    assert not result.stdout


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1 KB"), (147_456, "147 KB"), (15.136e9, "15.1 GB"), (1.5e15, "1.5e+03 TB")],
)
def test_sizes_have_three_digits(nbytes: float, text: str) -> None:
    assert size(nbytes) == text
