"""Calibration of kvzap: it learns KVzip's own scores, and its caches are as those of every policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import tokens
from letters import Letters
from torch import Tensor
from transformers import DynamicCache

from kvcomp import CompressedCache, Stack
from kvcomp.cache.eviction import chunk_of
from kvcomp.calibration.file import load
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.integrations.huggingface import prefill
from kvcomp.integrations.huggingface.calibrate import calibrate, gather
from kvcomp.policies.kvzap import KVzap
from kvcomp.policies.kvzip import KVzip

CONTEXTS = [tokens(1, n, seed=n)[0].tolist() for n in (60, 33)]


class Spy:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.contexts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        self.last = keys, values

    def repeated(self, received: Tensor, model: Any) -> None:
        keys, values = self.last
        turned = model.rotate(model.rotate(keys, torch.full((keys.shape[2],), 9)), torch.full((keys.shape[2],), -9))
        torch.testing.assert_close(turned, keys, rtol=1e-3, atol=1e-3)
        self.contexts.append((keys, values, received))

    def result(self, output: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        return self.contexts


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "qwen3next"])
@pytest.mark.parametrize("chunk", [2048, 25])
def test_it_sees_the_scores_of_kvzip(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    before = model.config._attn_implementation
    found = gather(model, CONTEXTS, seen=Spy, repeats=chunk, tokenizer=Letters())
    assert model.config._attn_implementation == before
    scores: list[list[Tensor]] = []
    choose = KVzip.choose
    monkeypatch.setattr(KVzip, "choose", lambda self, got, *at: scores.append([*got]) or choose(self, got, *at))
    for ids in CONTEXTS:
        prefill(model, torch.tensor([ids]), [CompressedCache(f"kvzip(chunk={chunk})", model)], tokenizer=Letters())
    for at, seen in enumerate(found.values()):
        for i, (keys, values, received) in enumerate(seen):
            assert keys.shape[:3] == values.shape[:3] == received.shape == (1, received.shape[1], len(CONTEXTS[i]))
            torch.testing.assert_close(received, scores[i][at])
    assert len(found) == len(scores[0])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zap")
    text = folder / "letters.txt"
    text.write_text("".join(map(chr, tokens(1, 3000, seed=9).clamp(32, 120)[0].tolist())))
    out = folder / "zap.safetensors"
    calibrate(models.make("llama"), Letters(), "kvzap", [text], tokens=1024, context=256, name="tiny").save(out)
    return out


def test_a_calibration_can_be_repeated(file: Path) -> None:
    text = file.with_name("letters.txt")
    again = calibrate(models.make("llama"), Letters(), "kvzap", [text], tokens=1024, context=256).tensors
    for name, tensor in load(file, "kvzap").tensors.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "given", ["keep=0.3", "keep=0.3, heads=adaptive", "keep=0.3, layers=pyramid", "threshold=-5.5", "budget=30"]
)
@pytest.mark.parametrize("rest", ["", " + int(bits=8) + window(sinks=2, recent=8)"])
def test_padded_rows_are_as_alone_and_caches_do_not_mix(given: str, rest: str, file: Path) -> None:
    model = models.make("llama")
    ids, lengths = tokens(3, 90), (90, 61, 33)
    mask = (torch.arange(90) >= torch.tensor([[90 - length] for length in lengths])).long()
    spec = f"kvzap({given}, calibration={str(file)!r}){rest}"
    batch, other = CompressedCache(spec, model), CompressedCache("snapkv(keep=0.5, window=8)", model)
    prefill(model, ids, [batch, other], mask)
    for b, length in enumerate(lengths):
        alone = CompressedCache(spec, model)
        prefill(model, ids[b : b + 1, 90 - length :], [alone])
        kept = [layer.store.kept.view(-1, 2)[b].tolist() for layer in batch.layers]
        assert kept == [layer.store.kept.tolist() for layer in alone.layers]
        for mine, own in zip(batch.layers, alone.layers, strict=True):
            for head in range(2):
                together, single = (layer.store._tokens(s) for layer, s in ((mine, 2 * b + head), (own, head)))
                torch.testing.assert_close(together[1], single[1], rtol=1e-4, atol=1e-4)
        plan = alone.layers[0].plan
        if given.startswith("keep"):
            planned = sum(plan.policies[0].kept(length, plan.sinks, plan.recent, i, 4) for i in range(4))
            assert sum(map(sum, kept)) == 2 * planned


def test_with_a_threshold_a_prompt_in_chunks_keeps_what_it_does_at_once(file: Path) -> None:
    """A score is a token's own: in the first layer, whose keys no eviction changes, the same tokens stay."""
    model, ids = models.make("llama"), tokens(1, 1300)
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        models.make("llama")(ids, past_key_values=dense)
    policy = KVzap(calibration=str(file))
    plan = Stack.parse(policy).plan(0, 4)
    scores = policy.scores(chunk_of(plan, None, dense.layers[0].keys, dense.layers[0].values, 0.25))
    spec = f"kvzap(threshold={float(scores.median())}, calibration={str(file)!r}) + none + window(sinks=0, recent=0)"
    held = []
    for chunk in (None, 600):
        cache = CompressedCache(spec, model)
        prefill(model, ids, [cache], chunk=chunk)
        held.append([cache.layers[0].store._tokens(s)[1] for s in range(2)])
    for once, parts in zip(*held, strict=True):
        torch.testing.assert_close(once, parts)
        assert 10 < len(once) < 1300


def test_what_it_refuses(file: Path) -> None:
    text = [file.with_name("letters.txt")]
    with pytest.raises(KvcompError, match=r"context: 2048, which this method lets the model repeat.*2500 positions"):
        calibrate(models.make("llama", max_position_embeddings=2500), Letters(), "kvzap", text)
    with pytest.raises(UnsupportedError, match="MLA"):
        gather(models.make("deepseek"), CONTEXTS, seen=Spy, repeats=2048, tokenizer=Letters())
