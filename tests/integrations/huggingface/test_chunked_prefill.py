"""Prompts that enter in chunks, each compressed before the next comes: what is held on the way, and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from scored import SCORED, spec_of
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcomp import CompressedCache, KvcompWarning
from kvcomp.errors import KvcompError
from kvcomp.integrations.huggingface import prefill
from kvcomp.integrations.huggingface.fingerprint import fingerprint
from kvcomp.integrations.huggingface.layer import CompressedLayer
from kvcomp.integrations.huggingface.masks import Seen, mask_function, read_mask
from kvcomp.stages.registry import find

WINDOW = " + window(sinks=4, recent=32)"


@pytest.mark.parametrize("spec", ["snapkv(keep=0.25, window=16)", "keydiff(keep=0.25)"])
def test_no_more_than_the_budget_and_a_chunk_is_held(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8192 tokens by 1024: at its fullest, the cache holds a quarter of them and a chunk in full precision."""
    model, ids, chunk = models.make("llama", num_hidden_layers=2), tokens(1, 8192), 1024
    cache = CompressedCache(spec + WINDOW, model)
    seen: list[int] = []
    commit = CompressedLayer.commit

    def watched(self: CompressedLayer) -> None:
        seen.append(cache.memory().held)
        commit(self)
        seen.append(cache.memory().held)

    monkeypatch.setattr(CompressedLayer, "commit", watched)
    prefill(model, ids, [cache], chunk=chunk)
    kept = [int(layer.store.kept.max()) for layer in cache.layers]
    assert kept == [8192 // 4] * 2
    token = 2 * 2 * 16 * 4  # of a layer: heads x (K and V) x channels x bytes
    pending = token * (2 if cache.layers[0].plan.needs_queries else 1)  # as many bytes of queries; a layer at a time
    assert max(seen) <= 1.07 * (2 * token * 8192 // 4 + pending * chunk)  # pools grow by a sixteenth
    assert max(seen) > 2 * token * 8192 // 4


def test_chunks_see_what_was_kept_of_those_before() -> None:
    """With nothing evicted it is the dense prefill; with eviction, the stack's own forward over the same chunks."""
    model, ids = models.make("qwen3"), tokens(2, 200)
    mask = (torch.arange(200) >= torch.tensor([[0], [37]])).long()
    dense, chunked = (CompressedCache("none" + WINDOW, model) for _ in range(2))
    (whole,) = prefill(model, ids, [dense], mask)
    (parts,) = prefill(model, ids, [chunked], mask, chunk=64)
    torch.testing.assert_close(whole.logits, parts.logits, rtol=1e-4, atol=1e-4)
    ours, other = (CompressedCache("snapkv(keep=0.5, window=8)" + WINDOW, model) for _ in range(2))
    (filled,) = prefill(model, ids[:1], [ours], chunk=64)
    with torch.no_grad():
        for at in range(0, 200, 64):
            logits = model(ids[:1, at : at + 64], past_key_values=other).logits[:, -1]
    torch.testing.assert_close(filled.logits, logits)
    assert filled.dense_s == 0
    with pytest.raises(KvcompError, match="chunk=0"):
        prefill(model, ids, [CompressedCache("none", model)], chunk=0)


def held(cache: CompressedCache) -> list[set[tuple[float, ...]]]:
    """The values that each layer's first stream holds, where pages are exact."""
    return [{tuple(v.tolist()) for v in layer.store._tokens(0)[1]} for layer in cache.layers]


def kept(cache: CompressedCache) -> list[list[int]]:
    """Tokens that each stream of each full layer holds."""
    return [layer.store.kept.tolist() for layer in cache.layers if isinstance(layer, CompressedLayer)]


def filled(model: PreTrainedModel, spec: str, ids: Tensor, chunk: int | None, mask: Tensor | None = None) -> Any:
    """A cache after `prefill`, and the logits."""
    cache = CompressedCache(spec, model)
    return cache, prefill(model, ids, [cache], mask, chunk=chunk)[0].logits


@pytest.mark.parametrize("size", ["keep=0.3", "budget=40", "budget=40, hold=true"])
@pytest.mark.parametrize("name", SCORED)
def test_small_chunks_are_chosen_from_together(name: str, size: str) -> None:
    """A prompt in chunks of any size keeps as many tokens as at once, up to those that are protected, by any way in."""
    model, ids = models.make("llama", num_hidden_layers=2), tokens(1, 120)
    window = 16 if "window" in find(name).__dataclass_fields__ else 0
    spec = spec_of(name, size, 16, window, fingerprint(model))
    whole = kept(filled(model, spec, ids, None)[0])
    for chunk in (1, 7, 64):  # the last of 120 by 7 is alone
        cache, logits = filled(model, spec, ids, chunk)
        for now, then in zip(kept(cache), whole, strict=True):
            assert -3 <= (sum(now) - sum(then)) / 2 <= (window + 3 if size == "keep=0.3" else 63)
        if chunk > 1:
            generated = CompressedCache(spec, model)
            out = greedy(model, ids, generated, new=1, prefill_chunk_size=chunk)
            torch.testing.assert_close(out.logits[0], logits)
            assert kept(generated) == kept(cache)
            parts, same = generated.memory().parts, cache.memory().parts
            assert parts | {"table": 0} == same | {
                "table": 0
            }  # what pages received is known until a token is generated


@pytest.mark.parametrize("size", ["keep=0.3", "budget=100", "budget=100, hold=true"])
@pytest.mark.parametrize("name", SCORED)
def test_long_prompts_keep_as_many_as_planned(name: str, size: str) -> None:
    """Of a prompt of several rounds: the share, up to the protected tokens of the last; the budget and less than a
    page."""
    model, ids = models.make("llama", num_hidden_layers=2), tokens(1, 1300)
    spec = spec_of(name, size, 16, 16, fingerprint(model))
    for chunk in (100, 300, 1024):
        cache, _ = filled(model, spec + " + none + window(sinks=4, recent=8)", ids, chunk)
        for layer, found in zip(cache.layers, kept(cache), strict=True):
            plan = layer.plan
            planned, mean = plan.policies[0].kept(1300, 4, 8, plan.layer, plan.layers), sum(found) / 2
            if size.startswith("keep"):
                assert abs(mean - planned) <= 4 + 16 * 3 + 3  # in each of three rounds
            else:
                assert planned - 1 <= mean < planned + plan.page_size


def test_chunks_that_wait_are_seen_exactly() -> None:
    """Attention over what waits to be chosen from, with padding: the dense prefill, as long as nothing is evicted."""
    for name in ("llama", "gemma3", "gptoss"):
        model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
        ids, mask = left_padded([65, 80, 9])
        for rows, padding in ((ids, mask), (ids[1:2], None)):
            _, dense = filled(model, "none", rows, None, padding)
            for chunk in (1, 7, 64):
                cache, logits = filled(model, "knorm(keep=1.0) + none", rows, chunk, padding)
                torch.testing.assert_close(logits, dense, rtol=1e-4, atol=1e-4)
                assert cache.get_seq_length() == 80


@pytest.mark.parametrize(
    "spec", ["snapkv(keep=0.5, window=8)", "h2o(budget=40)", "knorm(budget=40)", "adakv(keep=0.4, window=8)"]
)
def test_rows_of_a_padded_batch_in_chunks_are_as_alone(spec: str) -> None:
    model, lengths = models.make("llama", num_hidden_layers=2), [65, 80, 9]
    ids, mask = left_padded(lengths)
    batch, _ = filled(model, spec, ids, 7, mask)
    for row, length in enumerate(lengths):
        alone, _ = filled(model, spec, ids[row : row + 1], 7, mask[row : row + 1])
        at_once, _ = filled(model, spec, ids[row : row + 1, 80 - length :], None)
        assert [x[2 * row : 2 * row + 2] for x in kept(batch)] == kept(alone)
        assert all(abs(sum(x) - sum(y)) <= 2 * 9 for x, y in zip(kept(alone), kept(at_once), strict=True))


@pytest.mark.parametrize("spec", ["snapkv(keep=0.5, window=8)", "knorm(budget=40)", "adakv(budget=40, window=8)"])
def test_what_is_generated_and_earlier_turns_stay(spec: str) -> None:
    """Neither share nor budget is of generated tokens; a later turn is another prompt, in chunks or not."""
    model, ids, turn = models.make("llama", num_hidden_layers=2), tokens(1, 150), tokens(1, 1200, seed=5)
    cache, _ = filled(model, spec, ids, 7)
    first = kept(cache)
    with torch.no_grad():
        for step in tokens(1, 90, seed=3).split(1, 1):
            model(step, past_key_values=cache)
        assert kept(cache) == [[n + 90 for n in layer] for layer in first]
        before = held(cache)
        single = cache.fork()
        model(turn[:, :150], past_key_values=single)
        alone, _ = filled(model, spec, turn[:, :150], None)
        assert [sum(x) for x in kept(single)] == [
            sum(x) + sum(y) + 180 for x, y in zip(first, kept(alone), strict=True)
        ]
        for part in turn.split(300, 1):
            model(part, past_key_values=cache)
    grown = [sum(x) - sum(y) - 180 for x, y in zip(kept(cache), first, strict=True)]
    assert all(n < 2 * (40 + 64) for n in grown) if "budget" in spec else all(abs(n - 1200) <= 2 * 8 for n in grown)
    assert all(old <= new for old, new in zip(before, held(cache), strict=True))


@pytest.mark.parametrize("name", ["tova", "knorm", "snapkv"])
def test_a_question_behind_a_prompt_stays(name: str) -> None:
    """What follows `prefill` is a prompt of its own; and a short part of a prompt with a budget stays whole."""
    model, ids, question = models.make("llama", num_hidden_layers=2), tokens(1, 1100), tokens(1, 50, seed=5)
    for own in (True, False):
        cache = CompressedCache(f"{name}(budget=200)", model)
        if own:
            prefill(model, ids, [cache], chunk=600)
        with torch.no_grad():
            if not own:
                model(ids, past_key_values=cache)
            before = kept(cache)
            model(question, past_key_values=cache)
        size = cache.layers[0].plan.page_size
        grown = [sum(x) - sum(y) for x, y in zip(kept(cache), before, strict=True)]
        assert all(n in (100, 100 - size, 100 - 2 * size) for n in grown)
        if own and name != "tova":  # which holds its budget
            assert grown == [100] * 2


@pytest.mark.parametrize("look", ["memory", "fork", "save", "rows", "report"])
def test_surgery_between_chunks(look: str, tmp_path: Path) -> None:
    """Whoever looks at a cache whose chunks wait finds the tokens chosen from."""
    model, ids, spec = models.make("llama", num_hidden_layers=2), tokens(1, 120), "knorm(keep=0.5) + int(bits=8)"
    cache = CompressedCache(spec, model)
    with torch.no_grad():
        for at in range(0, 100, 25):
            model(ids[:, at : at + 25], past_key_values=cache)
        assert cache.get_seq_length() == 100
        if look == "memory":
            assert "pending" not in cache.memory().parts
        if look == "report":
            assert "pending" not in cache.report()
        if look == "fork":
            cache = cache.fork()
        if look == "save":
            cache.save(tmp_path / "x.kv")
            cache = CompressedCache.load(tmp_path / "x.kv", model)
        if look == "rows":
            cache.batch_repeat_interleave(2)
        assert [n[0] for n in kept(cache)] == [50] * 2
        rows = ids[:, 100:101].expand(2 if look == "rows" else 1, -1)
        assert model(rows, past_key_values=cache).logits.isfinite().all()
        assert cache.get_seq_length() == 101


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("spec", ["knorm(keep=0.5)", "snapkv(keep=0.5, window=8)", "h2o(budget=40)"])
def test_a_look_at_lengths_and_a_refused_chunk_end_no_round(spec: str, announced: bool) -> None:
    """Chunks go on waiting whatever is asked of sizes, and whichever chunk is refused in between."""
    model = models.make("llama", num_hidden_layers=2)
    ids, mask = left_padded([90, 61])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def step(cache: CompressedCache, end: int, shown: Tensor | None, start: int) -> None:
        model(ids[:, end - 15 : end], attention_mask=shown, past_key_values=cache, position_ids=positions[:, start:end])

    plain, looked = CompressedCache(spec, model), CompressedCache(spec, model, max_tokens=90)
    if announced:
        for layer in [*plain.layers, *looked.layers]:
            layer.expect(90)
    wrong, again = mask.clone(), torch.arange(15).expand(2, -1)
    wrong[1, 29:31] = 0  # shown before
    with torch.no_grad():
        for end in range(15, 91, 15):
            step(plain, end, mask[:, :end], end - 15)
            step(looked, end, mask[:, :end], end - 15)
            if not 45 <= end < 90:
                continue
            waited = [layer.pending.keys.shape[2] for layer in looked.layers]
            assert looked.layers[0].keys.shape[2] == looked.layers[0].counted()[1] == looked.get_seq_length() == end
            for shown in (wrong[:, : end + 15], None):
                with pytest.raises(KvcompError, match="mask"):
                    step(looked, end + 15, shown, end)
            with pytest.raises(KvcompError, match="position 0"):
                model(ids[:, :15], attention_mask=mask[:, : end + 15], past_key_values=looked, position_ids=again)
            with pytest.raises(KvcompError, match="exceed"):
                model(ids.repeat(1, 2), past_key_values=looked)
            with pytest.raises(KvcompError, match="2 rows"):
                model(ids[:1, :15], past_key_values=looked)
            assert [layer.pending.keys.shape[2] for layer in looked.layers] == waited
            assert looked.get_seq_length() == end
    assert kept(looked) == kept(plain)
    for ours, theirs in zip(looked.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.store._tokens(0)[1], theirs.store._tokens(0)[1], rtol=0, atol=0)


def test_a_first_token_that_comes_alone_is_warned_of() -> None:
    """Tokens that come one at a time are generated ones, as far as a cache can tell."""
    model, ids = models.make("llama", num_hidden_layers=1), tokens(1, 40)
    cache = CompressedCache("knorm(keep=0.5)", model)
    with pytest.warns(KvcompWarning, match=r"knorm evicts nothing of it: use kvcomp.prefill\(chunk=1\)"):
        greedy(model, ids, cache, new=1, prefill_chunk_size=1)
    assert kept(cache) == [[40, 40]]


def test_a_preallocated_cache_takes_small_chunks_from_prefill() -> None:
    model, ids, more = models.make("llama", num_hidden_layers=2), tokens(1, 150), tokens(1, 1, seed=4)
    spec = "snapkv(keep=0.5, window=8)"
    for chunk in (1, 7, 64):
        expected = greedy(model, torch.cat([ids, more], 1), filled(model, spec, ids, chunk)[0], new=6)
        fixed = CompressedCache(spec, model, preallocate=200)
        prefill(model, ids, [fixed], chunk=chunk)
        assert_same(greedy(model, torch.cat([ids, more], 1), fixed, new=6), expected)
    with pytest.warns(KvcompWarning, match=r"by itself: use kvcomp.prefill\(chunk=50\), or chunks of 512"):
        greedy(model, ids, CompressedCache(spec, model, preallocate=200), new=2, prefill_chunk_size=50)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[96], [96, 61]], ids=["alone", "padded"])
def test_chunks_of_modules_that_are_not_causal_by_themselves(lengths: list[int], implementation: str) -> None:
    """They see what their mask shows, whatever the cache on the hooked model: no mask would show later tokens."""
    model = models.make("llama", implementation, num_hidden_layers=2)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    ids, mask = left_padded(lengths)

    def run(cache: Any) -> Any:
        return greedy(model, ids, cache, new=3, attention_mask=mask, prefill_chunk_size=32)

    dense = run(DynamicCache(config=model.config))
    ours = CompressedCache("none", model)
    assert_same(run(DynamicCache(config=model.config)), dense)
    assert_same(run(ours), dense)


def test_chunks_without_padding_need_no_mask() -> None:
    """Their mask hides nothing, and is read as none: attention takes its path without one."""
    mask = mask_function("sdpa")(batch_size=2, q_length=8, kv_length=24, q_offset=16, attention_mask=None, device="cpu")
    assert mask.shape == (2, 24)
    assert read_mask(mask, 16, 8) == Seen(None, None, None)
    padding = torch.ones(2, 24, dtype=torch.long)
    assert mask_function("sdpa")(batch_size=2, q_length=8, kv_length=24, q_offset=16, attention_mask=padding) is padding
