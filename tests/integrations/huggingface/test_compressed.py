"""Evicting, quantizing, selecting stacks: rows do not touch each other, and attention is over exactly what is held."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvcomp import CompressedCache

POLICY = "window(sinks=2, recent=8) + snapkv(budget=32, window=8)"
STACKS = (
    f"{POLICY} + kivi(bits=4, group=16)",
    f"{POLICY} + int(bits=4, basis=hadamard)",
    f"{POLICY} + kivi(bits=4, group=16) + quest(pages=1000, dense_layers=0)",
    "streaming(sinks=2, recent=24) + int(bits=8)",
)
LENGTHS = [65, 80, 41]
IDS, MASK = left_padded(LENGTHS)
pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gptoss"])
@pytest.mark.parametrize("stack", STACKS)
def test_padded_rows_equal_rows_alone(name: str, stack: str) -> None:
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    batch = greedy(model, IDS, CompressedCache(stack, model), new=40, attention_mask=MASK)
    for row, length in enumerate(LENGTHS):
        alone = greedy(model, IDS[row : row + 1, -length:], CompressedCache(stack, model), new=40)
        assert alone.sequences[0, length:].tolist() == batch.sequences[row, IDS.shape[1] :].tolist()
        apart = [float((a[0] - b[row]).abs().max()) for a, b in zip(alone.logits, batch.logits, strict=True)]
        assert max(apart[:8]) < 1e-4
        assert max(apart) < 1e-2  # sums in another order may put a code of a new page on its other side


@pytest.mark.parametrize("name", ["llama", "gptoss"])
def test_padding_is_never_stored(name: str) -> None:
    model = models.make(name, "eager" if name in models.EAGER_ONLY else "sdpa")
    cache = CompressedCache("kivi(bits=2, group=16) + window(recent=16)", model)
    greedy(model, IDS, cache, new=2, attention_mask=MASK)
    for layer in cache._compressed():
        kept = layer.store.kept.view(len(LENGTHS), -1)
        assert kept.tolist() == [[length + 1] * kept.shape[1] for length in LENGTHS]
        assert layer.store.table.total == layer.store.pool.capacity - len(layer.store.pool.free)


# -- a dense reference --------------------------------------------------------------------------------------------

VISIBLE: dict[int, Tensor] = {}  # layer -> bool [B, Hkv, S]: cached tokens that were not evicted


def _masked_reference(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Softmax over all cached columns with the evicted ones masked, written out in full."""
    (b, hq, n, _), (_, hkv, length, _) = query.shape, key.shape
    mask = torch.ones(n, length, dtype=torch.bool).tril(length - n) if attention_mask is None else attention_mask
    mask = mask.expand(b, 1, n, length).expand(-1, hkv, -1, -1)
    if length > n and module.layer_idx in VISIBLE:
        seen = VISIBLE[module.layer_idx]
        mask = mask & F.pad(seen, (0, length - seen.shape[-1]), value=True)[:, :, None]
    group = hq // hkv
    k, v, mask = (x.repeat_interleave(group, 1) for x in (key, value, mask))
    logits = (query @ k.mT * scaling).masked_fill(~mask, -torch.inf)
    if (sinks := kwargs.get("s_aux")) is not None:
        logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(b, -1, n, 1)], -1)
    weights = logits.softmax(-1).nan_to_num(0)[..., :length]
    return (weights @ v).transpose(1, 2).contiguous(), None


AttentionInterface.register("test_reference", _masked_reference)
AttentionMaskInterface.register("test_reference", sdpa_mask)


class Reference:
    """A dense DynamicCache whose kept columns are overwritten with what the compressed cache decodes to."""

    def __init__(self, name: str, stack: str, policies: str) -> None:
        implementation = "eager" if name in models.EAGER_ONLY else "sdpa"
        self.model = models.make(name, implementation)
        self.cache = CompressedCache(stack, self.model)
        twin_model = models.make(name, implementation)
        self.dense_model = models.make(name, implementation)
        self.dense_model.set_attn_implementation("test_reference")
        self.dense = DynamicCache(config=self.dense_model.config)
        self.mask = MASK
        VISIBLE.clear()
        twin = CompressedCache(policies, twin_model)  # the same policies over unquantized pages tell who was kept
        logits = [self._forward(m, c, IDS) for m, c in ((self.model, self.cache), (self.dense_model, self.dense))]
        self._forward(twin_model, twin, IDS)
        torch.testing.assert_close(logits[0][:, -1], logits[1][:, -1], atol=1e-4, rtol=0)
        self.kept: dict[int, Tensor] = {}
        for i, layer in enumerate(twin.layers):
            if hasattr(layer, "store"):
                self.kept[i] = self._find(layer.store, self.dense.layers[i].keys)

    def _forward(self, model: PreTrainedModel, cache: Any, ids: Tensor) -> Tensor:
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.no_grad():
            out = model(ids, attention_mask=self.mask, position_ids=positions, past_key_values=cache)
        return out.logits

    def _find(self, store: Any, keys: Tensor) -> Tensor:
        """bool [B, Hkv, S]: columns of the dense keys that the store holds, found by value."""
        kept = torch.zeros(keys.shape[:3], dtype=torch.bool)
        for s in range(len(store.kept)):
            b, h = divmod(s, store.heads)
            held, _ = store._tokens(s)
            distance = torch.cdist(held, keys[b, h], compute_mode="donot_use_mm_for_euclid_dist")
            assert (distance.min(1).values < 1e-5).all()
            kept[b, h, distance.argmin(1)] = True
            assert kept[b, h].sum() == len(held)
        return kept & self.mask[:, None].bool()

    def step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the compressed and of the dense model for more tokens."""
        for i, kept in self.kept.items():
            store, dense = self.cache.layers[i].store, self.dense.layers[i]
            new = dense.keys.shape[2] - kept.shape[2]
            kept = self.kept[i] = F.pad(kept, (0, new), value=True)
            dense.keys, dense.values = dense.keys.clone(), dense.values.clone()
            for s in range(len(store.kept)):
                b, h = divmod(s, store.heads)
                dense.keys[b, h, kept[b, h]], dense.values[b, h, kept[b, h]] = store._tokens(s)
            VISIBLE[i] = kept
        self.mask = F.pad(self.mask, (0, ids.shape[1]), value=1)
        ours = self._forward(self.model, self.cache, ids)
        return ours, self._forward(self.dense_model, self.dense, ids)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gptoss"])
@pytest.mark.parametrize("stack", STACKS[:3])
def test_logits_equal_a_dense_masked_reference(name: str, stack: str) -> None:
    pair = Reference(name, stack, POLICY)
    evicted = sum(int((~kept).sum()) for kept in pair.kept.values())
    assert evicted > 0
    for i in range(20):  # single tokens: the window overflows into pages on the way
        ours, dense = pair.step(tokens(3, 1, seed=100 + i))
        torch.testing.assert_close(ours, dense, atol=1e-4, rtol=0)
    ours, dense = pair.step(tokens(3, 9, seed=7))  # a second turn
    torch.testing.assert_close(ours, dense, atol=1e-4, rtol=0)
    ours, dense = pair.step(tokens(3, 1, seed=8))
    torch.testing.assert_close(ours, dense, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stack", [*STACKS, "kivi(bits=2, group=16) + window(recent=16)"])
def test_prompt_lookup_equals_plain_greedy(stack: str) -> None:
    """Verification writes and crops chunks; what stays must be what one token at a time would have written."""
    ids = IDS[1:2].repeat(1, 2)
    model = models.make("llama")
    plain = greedy(model, ids, CompressedCache(stack, model), new=30)
    lookup = greedy(model, ids, CompressedCache(stack, model), new=30, prompt_lookup_num_tokens=4)
    assert lookup.sequences.tolist() == plain.sequences.tolist()


def test_beams_share_pages() -> None:
    model = models.make("llama")
    cache = CompressedCache("kivi(bits=4, group=16) + window(recent=16)", model)
    one = CompressedCache("kivi(bits=4, group=16) + window(recent=16)", model)
    ids = tokens(1, 400)
    greedy(model, ids, one, new=8)
    greedy(model, ids, cache, new=8, num_beams=4)
    beams, single = (c.memory().parts for c in (cache, one))
    # four beams were prefilled as four rows, then reordered onto few ancestors
    assert beams["pages"] < 3 * single["pages"]


def test_batch_surgery_keeps_rows_apart() -> None:
    model = models.make("llama")
    stack = STACKS[0]
    cache = CompressedCache(stack, model)
    with torch.no_grad():
        model(IDS, attention_mask=MASK, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
        step = tokens(3, 1, seed=5)
        order = [2, 0, 1]
        mask = F.pad(MASK[order], (0, 1), value=1)
        ours = model(step, attention_mask=mask, past_key_values=cache).logits
        fresh = CompressedCache(stack, model)
        model(IDS[order], attention_mask=MASK[order], past_key_values=fresh)
        theirs = model(step, attention_mask=mask, past_key_values=fresh).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_reset_starts_over() -> None:
    model = models.make("llama")
    cache = CompressedCache(STACKS[0], model)
    first = greedy(model, IDS, cache, attention_mask=MASK)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.memory().held == 0
    assert_same(greedy(model, IDS, cache, attention_mask=MASK), first)


def test_streaming_generates_for_ever_in_flat_memory() -> None:
    model = models.make("llama", num_hidden_layers=1)
    cache = CompressedCache("streaming(sinks=4, recent=64)", model)
    held = []
    ids = tokens(1, 100)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for i in range(400):
            model(ids[:, i % 100 : i % 100 + 1], past_key_values=cache)
            held.append(cache.memory().held)
    assert max(held[100:]) <= 1.02 * max(held[:100])
    assert cache.get_seq_length() == 500
