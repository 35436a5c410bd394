"""Peaks of memory: a block that is held for a moment is seen, and what a cache held already is not seen again."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_folder
import torch

from kvcomp import Stack
from kvcomp.benchmarks import memory
from kvcomp.benchmarks.answering import answer
from kvcomp.benchmarks.ruler import generate
from kvcomp.integrations.huggingface.models import load_model
from kvcomp.ledger import MIB

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda"),
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
    ),
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_a_block_of_a_moment_is_seen(device: torch.device) -> None:
    before = torch.ones(32 * MIB, dtype=torch.uint8, device=device)
    grown = memory.watch(device)
    if grown() is None:
        pytest.skip("the peak of memory cannot be had here")
    kept = torch.ones(16 * MIB, dtype=torch.uint8, device=device)
    block = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
    del block, before
    assert grown() == pytest.approx(80 * MIB, abs=4 * MIB)
    again = memory.watch(device)
    assert again() == pytest.approx(0, abs=4 * MIB)
    assert kept.nbytes == 16 * MIB


def test_where_nothing_tells_there_is_no_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.watch(torch.device("meta"))() is None
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "RESET", tmp_path / "clear_refs")
    assert memory.watch(CPU)() is None
    (tmp_path / "status").write_text("Name:\tx\nVmRSS:\t 3 kB\nVmHWM:\t 10 kB\n")
    assert memory.watch(CPU)() == 7 * 2**10
    monkeypatch.setattr(memory, "RESET", tmp_path / "missing" / "clear_refs")
    assert memory.watch(CPU)() is None


def test_a_peak_is_what_was_held_and_what_decoding_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(str(tiny_folder.save(tmp_path)), device="cpu")
    (sample,) = generate("niah_single_1", tokenizer, 500, samples=1, seed=0)
    stacks = [Stack.parse(spec) for spec in ("none", "kivi(bits=2, group=16) + window(recent=16)")]
    for grown in (0, 1000, None):
        monkeypatch.setattr(memory, "watch", lambda device, grown=grown: lambda: grown)
        dense, small = answer(model, tokenizer, sample, 500, stacks, max_new_tokens=1)
        if grown is None:
            assert dense.peak is small.peak is None
        else:
            assert dense.peak is not None
            assert small.peak is not None
            assert small.peak - grown <= small.held < dense.peak - grown <= dense.held
