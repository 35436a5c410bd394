"""Cards of Matched-Budget Evaluation: a stack counts at the smallest budget that it fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_folder
from typer.testing import CliRunner

from kvcomp.benchmarks.mbe import export
from kvcomp.benchmarks.results import NLL, Record, Results, Run, RunError
from kvcomp.cli.app import app

DENSE = run_folder.record(held=2**20, held_dense=2**20, ms_per_token=10.0, prefill_s=0.5, prefill_own_s=None)
SMALL = replace(DENSE, stack="int(bits=4)", hash="1", held=2**18, ms_per_token=8.0, prefill_own_s=0.25)
CONFIG: dict[str, Any] = {
    "settings": {"model": "org/model", "seed": 3, "samples": 2},
    "versions": {"kvcomp": "0"},
    "machine": {"cpu": "a cpu", "threads": 2, "gpu": None},
}
# What its run_mbe.py writes, and what its manifest requires.
FIELDS = {"method", "type", "model", "attention", "prerequisite", "hardware_tier", "harness_version", "accuracy"}
FIELDS |= {"system", "composability", "notes"}
METRICS = {"peak_kv_memory_gb", "decode_throughput_tok_s", "ttft_ms", "max_batch_before_oom"}
TASKS = {"longbench", "ruler", "ifeval", "gsm8k", "agentic_trace"}


def cards_of(tmp_path: Path, *records: Record) -> list[dict[str, Any]]:
    files, _ = export([Run(Path("out/run"), CONFIG, list(records))], tmp_path)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize(
    ("held", "budget"),
    [
        (2**19, "B50"),
        (2**18 + 1, "B50"),
        (2**18, "B25"),
        (2**17 + 1, "B25"),
        (2**17, "B12"),
        (2**16, "B06"),
        (1, "B06"),
    ],
)
def test_a_stack_counts_at_the_smallest_budget_that_it_fits(tmp_path: Path, held: int, budget: str) -> None:
    (card,) = cards_of(tmp_path, DENSE, replace(SMALL, held=held))
    assert set(card["accuracy"]) == set(card["system"]) == {"full", budget}
    assert set(card) > FIELDS
    assert card["harness_version"] == "mbe-0.1.0"
    assert all(set(metrics) == METRICS for metrics in card["system"].values())
    assert all(set(tasks) == TASKS for tasks in card["accuracy"].values())


def test_a_card_has_means_over_tasks_and_medians_of_time(tmp_path: Path) -> None:
    more = [
        replace(stack, task=task, index=index, score=score, ms_per_token=stack.ms_per_token * (1 + index))
        for stack in (DENSE, SMALL)
        for task, scores in (("vt", (0.0, 0.5, 1.0)), ("qasper", (0.1, 0.2, 0.3)))
        for index, score in enumerate(scores)
    ]
    (card,) = cards_of(tmp_path, DENSE, replace(SMALL, score=0.0), *more)
    assert card["accuracy"]["full"] == dict.fromkeys(TASKS) | {"ruler": 0.75, "longbench": pytest.approx(0.2)}
    assert card["accuracy"]["B25"] == dict.fromkeys(TASKS) | {"ruler": 0.25, "longbench": pytest.approx(0.2)}
    assert card["system"]["B25"]["peak_kv_memory_gb"] == 2**18 / 1e9
    assert card["system"]["B25"]["decode_throughput_tok_s"] == 1000 / 16
    assert card["system"]["B25"]["ttft_ms"] == 500 + 250 + 16
    assert card["system"]["B25"]["max_batch_before_oom"] is None
    assert card["hardware_tier"] == "CPU: a cpu, 2 threads"
    assert card["kvcomp"]["versions"] == CONFIG["versions"]
    rows = [(row["method"], row["kv_budget"], row["accuracy"]) for row in card["results"]]  # what its leaderboard shows
    assert rows == [("none", "100%", pytest.approx(0.475)), ("int(bits=4)", "25.00%", pytest.approx(0.225))]


@pytest.mark.parametrize(
    ("stack", "kind", "prerequisite"),
    [
        ("int(bits=4)", "quantization", "training-free"),
        ("snapkv(keep=0.25)", "eviction", "training-free"),
        ("snapkv(keep=0.25) + kivi(bits=4)", "quantization + eviction", "training-free"),
        ("klt(bits=2)", "quantization", "training-free"),
        ('oscar(bits=2, calibration="of/model.safetensors")', "quantization", "calibration"),
        ('int(bits=4) + dsa(tokens=64, calibration="a.safetensors")', "quantization + selection", "calibration"),
    ],
)
def test_what_a_method_is_and_needs(tmp_path: Path, stack: str, kind: str, prerequisite: str) -> None:
    (card,) = cards_of(tmp_path, replace(SMALL, stack=stack))
    assert (card["type"], card["prerequisite"]) == (kind, prerequisite)
    assert set(card["accuracy"]) == {"B25"}  # nothing was measured without compression
    assert card["composability"]["eviction"] == ("self" if "eviction" in kind else "composes")


def test_what_has_no_place_is_named(tmp_path: Path) -> None:
    wide = replace(SMALL, stack="int8", hash="2", held=2**19 + 1)
    text = replace(DENSE, task="perplexity_text", metric=NLL, score=2.0)
    files, other = export([Run(Path("out/run"), CONFIG, [DENSE, SMALL, wide, text])], tmp_path)
    assert [file.name for file in files] == ["int_bits_4_org_model_512.json"]
    assert other == ["perplexity_text", "int8 at 512 tokens, which holds 50.0% of the uncompressed cache"]
    for records in ([DENSE], [DENSE, wide], [text]):
        with pytest.raises(RunError, match=r"^export: 'out/run' has no stack that holds at most half"):
            export([Run(Path("out/run"), CONFIG, records)], tmp_path)


def test_each_context_has_a_card_of_its_own(tmp_path: Path) -> None:
    cards = cards_of(tmp_path, SMALL, replace(SMALL, context=1024, held=2**17), replace(SMALL, stack="int[bits=4]"[:3]))
    assert [(card["kvcomp"]["context"], *card["accuracy"]) for card in cards] == [
        (512, "B25"),
        (512, "B25"),
        (1024, "B12"),
    ]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_command_writes_cards(tmp_path: Path) -> None:
    results = Results(tmp_path / "run", CONFIG)
    for record in (DENSE, SMALL):
        results.append(record)
    said = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--export", "mbe", "--json"])
    assert said.exit_code == 0, said.output
    (file,) = json.loads(said.stdout)["exported"]
    assert file == str(tmp_path / "run" / "mbe" / "int_bits_4_org_model_512.json")
    assert json.loads(Path(file).read_text())["method"] == "int(bits=4)"
