"""A Llama whose layers are declared to see a sliding window."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_folder
import torch
from transformers import AutoModelForCausalLM

from kvcomp import CompressedCache, KvcompError
from kvcomp.benchmarks.sliding import declare
from kvcomp.integrations.huggingface.sliding import SlidingLayer


def test_the_weights_stay_and_only_the_window_is_seen(tmp_path: Path) -> None:
    source = tiny_folder.save(tmp_path / "llama")
    declare(source, tmp_path / "sliding", window=40, every=2)
    full, model = (AutoModelForCausalLM.from_pretrained(x).eval() for x in (source, tmp_path / "sliding"))
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    ids = torch.randint(0, 400, (1, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = full(ids).logits, model(ids).logits
    torch.testing.assert_close(other[:, :40], one[:, :40])
    assert float((other[:, 60:] - one[:, 60:]).abs().max()) > 1e-4
    cache = CompressedCache("int(bits=4) + window(recent=8, sinks=0)", model)
    assert [isinstance(layer, SlidingLayer) for layer in cache.layers] == [False, False]  # a page is 64 tokens
    assert isinstance(CompressedCache("kivi(group=16) + window(recent=8)", model).layers[0], SlidingLayer)


def test_what_cannot_be_declared(tmp_path: Path) -> None:
    source = tiny_folder.save(tmp_path / "llama")
    declare(source, tmp_path / "sliding", 40, 2)
    with pytest.raises(KvcompError, match="exists: name a folder to make"):
        declare(source, tmp_path / "sliding", 40, 2)
    with pytest.raises(KvcompError, match="is a cwm: expected a llama"):
        declare(tmp_path / "sliding", tmp_path / "again", 40, 2)
    with pytest.raises(KvcompError, match="is no folder that"):
        declare(tmp_path / "nothing", tmp_path / "again", 40, 2)
