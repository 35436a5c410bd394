"""Layers with a sliding window, packed by the quantizer: the same as transformers' own layer, within its loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from letters import Letters
from reachable import reachable_bytes
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvcomp import CompressedCache, KvcompWarning, Stack, UnsupportedError, prefill
from kvcomp.cost.bill import bill
from kvcomp.integrations.huggingface.calibrate import calibrate
from kvcomp.integrations.huggingface.layer import CompressedLayer
from kvcomp.integrations.huggingface.lockstep import can_step_together, lockstep
from kvcomp.integrations.huggingface.shapes import shape_of
from kvcomp.integrations.huggingface.sliding import MANY, SlidingLayer

WINDOW = 100
EXACT = "none + window(recent=8)"
KIVI = "kivi(bits=4, group=16) + window(sinks=2, recent=16)"
NAMES = ("mistral", "gemma2", "gemma3", "gptoss")
IDS, MASK = left_padded([150, 110])
SIZES = [[100] + [1] * 110, [1 + i % 3 for i in range(80)], [7, 250, 1, 1, 99, 1, 64, 1, 1]]  # of chunks


def make(name: str, implementation: str | None = None, window: int = WINDOW, **changes: Any) -> PreTrainedModel:
    implementation = implementation or ("eager" if name in (*models.EAGER_ONLY, "gemma2") else "sdpa")
    if name != "gemma2":
        return models.make(name, implementation, sliding_window=window, **changes)
    torch.manual_seed(0)  # soft caps of logits in layers with a window
    given = {**models.COMMON, "head_dim": 32, "layer_types": models.MIXED, "attn_logit_softcapping": 2.0, **changes}
    config = Gemma2Config(**given, sliding_window=window, attn_implementation=implementation)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    model.generation_config.pad_token_id = 0
    return model


def sliding(cache: CompressedCache) -> list[SlidingLayer]:
    return [layer for layer in cache.layers if isinstance(layer, SlidingLayer)]


def dense(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


@pytest.fixture(scope="module", params=NAMES)
def pair(request: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and its twin that is never hooked."""
    return make(request.param), make(request.param)


# -- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_mask": MASK},
        {"prefill_chunk_size": 33},
        {"prefill_chunk_size": 33, "attention_mask": MASK},
        {"num_beams": 3},
        {"num_beams": 2, "attention_mask": MASK},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("stack", [EXACT])
def test_tokens_and_logits_equal_dynamic_cache(pair: Any, options: dict[str, Any], stack: str) -> None:
    model, twin = pair
    cache = CompressedCache(stack, model)
    assert len(sliding(cache)) == (4 if model.config.model_type == "mistral" else 2)
    assert_same(greedy(model, IDS, cache, 70, **options), greedy(twin, IDS, dense(twin), 70, **options))
    assert all(int(layer.store.table.left.min()) > 0 for layer in sliding(cache) if "num_beams" not in options)


@pytest.mark.parametrize("gap", [0, 5, 64, 130])
def test_turns_with_padding_between(pair: Any, gap: int) -> None:
    """One row goes on at once, the other after a gap of padding, which the window counts."""
    model, twin = pair
    mask = torch.ones(2, 160 + gap + 40, dtype=torch.int64)
    mask[1, 160 : 160 + gap] = 0
    mask[0, :30] = 0
    ids = tokens(2, mask.shape[1], seed=9) * mask
    ids[mask == 0] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    ours, theirs = CompressedCache(EXACT, model), dense(twin)
    cuts = [0, 150, 160, 160 + gap] if gap else [0, 150, 160]
    cuts += [cuts[-1] + 1, cuts[-1] + 2, cuts[-1] + 20, *range(cuts[-1] + 21, cuts[-1] + 41)]
    with torch.no_grad():
        for a, b in pairwise(cuts):
            given = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
            x = model(ids[:, a:b], past_key_values=ours, **given).logits
            y = twin(ids[:, a:b], past_key_values=theirs, **given).logits
            there = mask[:, a:b].bool()
            torch.testing.assert_close(x[there], y[there], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_any_chunks(pair: Any, sizes: list[int]) -> None:
    model, twin = pair
    ours, theirs, at = CompressedCache(EXACT, model), dense(twin), 0
    ids = tokens(2, sum(sizes), seed=4)
    with torch.no_grad():
        for n in sizes:
            x, y = (m(ids[:, at : at + n], past_key_values=c).logits for m, c in ((model, ours), (twin, theirs)))
            torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
            at += n


def test_a_row_that_ended_early(pair: Any) -> None:
    """What generate says after a row's end counts as padding in the next turn: those tokens are dropped."""
    model, twin = pair
    ours, theirs = CompressedCache(EXACT, model), dense(twin)
    first = [greedy(m, IDS, c, 40, attention_mask=MASK) for m, c in ((model, ours), (twin, theirs))]
    assert_same(*first)
    longer = torch.cat([first[0].sequences, tokens(2, 9)], 1)
    mask = F.pad(MASK, (0, 49), value=1)
    mask[1, 170:190] = 0
    assert_same(
        greedy(model, longer, ours, 30, attention_mask=mask), greedy(twin, longer, theirs, 30, attention_mask=mask)
    )


def test_lookup_turns_forks_and_files(pair: Any, tmp_path: Path) -> None:
    model, twin = pair
    longer = torch.cat([IDS[:1], tokens(1, 60, seed=3)], 1)
    ours, theirs = CompressedCache(EXACT, model), dense(twin)
    assert_same(*(greedy(m, longer, c, 9, suppress_tokens=[0]) for m, c in ((model, ours), (twin, theirs))))
    fork = ours.fork()
    ours.save(tmp_path / "x.kv")
    loaded = CompressedCache.load(tmp_path / "x.kv", model)
    held = greedy(twin, longer, dense(twin), 9, suppress_tokens=[0]).sequences
    second = torch.cat([held, tokens(1, 11, seed=8)], 1)
    expected = greedy(twin, second, theirs, 80, suppress_tokens=[0])
    for cache in (ours, fork, loaded):
        assert_same(greedy(model, second, cache, 80, suppress_tokens=[0]), expected)
    repeated = tokens(1, 40).repeat(1, 4)
    plain = greedy(twin, repeated, dense(twin), 40, suppress_tokens=[0])
    options = {"suppress_tokens": [0], "prompt_lookup_num_tokens": 4}
    lookup = greedy(model, repeated, CompressedCache(EXACT, model), 40, **options)
    assert lookup.sequences.tolist() == plain.sequences.tolist()


def test_weights_and_gradients(pair: Any) -> None:
    model, twin = (make(pair[0].config.model_type.replace("_text", "").replace("_", ""), "eager") for _ in range(2))
    ours, theirs = CompressedCache(EXACT, model), dense(twin)
    for a, b in ((0, 150), (150, 151), (151, 160)):
        x = model(IDS[:1, a:b] if b <= 150 else tokens(1, b - a), past_key_values=ours, output_attentions=True)
        y = twin(IDS[:1, a:b] if b <= 150 else tokens(1, b - a), past_key_values=theirs, output_attentions=True)
        torch.testing.assert_close(x.logits, y.logits, atol=1e-4, rtol=0)
        for one, other in zip(x.attentions, y.attentions, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "stack",
    [
        KIVI,
        "int(bits=4) + window(recent=8)",
        "turboquant(bits=4)",
        "klt(bits=3) + window(recent=8)",
        "snapkv(keep=0.5, window=8) + int8 + window(recent=8)",
        "h2o(budget=96) + int(bits=6)",
        f"quest(keep=0.5, dense_layers=0) + {KIVI}",
    ],
)
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_compressing_stacks_equal_a_dense_masked_reference(name: str, stack: str) -> None:
    """Every step's attention, over what pages decode to, under the mask of the window, written out in full."""
    equals_a_dense_masked_reference(make(name), stack)


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("gemma2", "oscar(bits=4, {})"),
        ("gemma2", "svd(rank=0.5, bits=4, {})"),
        ("mistral", "think(keep=0.5, {})"),
        ("mistral", "klt({})"),
        ("gemma3", "klt(bits=4, {})"),
    ],
)
def test_calibration_files_know_layers_with_a_window(name: str, stack: str, tmp_path: Path) -> None:
    """So they are packed, and held as planned without the file; those of an older file, which knows none, are not."""
    model, text, path = make(name, dtype="float32"), tmp_path / "text", tmp_path / "file"
    text.write_text("".join(map(chr, tokens(1, 600, seed=9).clamp(32, 120)[0].tolist())))
    method, spec = stack.partition("(")[0], stack + " + window(recent=8)"
    found = calibrate(model, Letters(), method, [text], tokens=512, context=256)
    found.save(path)
    calibrated = spec.format(f"calibration={str(path)!r}")
    equals_a_dense_masked_reference(model, calibrated)
    cache = CompressedCache(calibrated, model)
    prefill(model, IDS, [cache])
    foretold = bill(shape_of(model.config, name), spec.format("calibration='no such file'"), IDS.shape[1], 2)
    packed = [i for i, layer in enumerate(cache.layers) if isinstance(layer, SlidingLayer)]
    assert cache.memory().parts["pages"] == foretold.held_parts["pages"]
    full = {name: x for name, x in found.tensors.items() if int(name.partition(".")[0]) not in packed}
    if full:
        replace(found, tensors=full).save(path)
        assert not sliding(CompressedCache(calibrated, model))


def equals_a_dense_masked_reference(model: PreTrainedModel, stack: str) -> None:
    cache, seen = CompressedCache(stack, model), []
    assert sliding(cache)
    ids = tokens(2, 230, seed=3)

    class Checked(SlidingLayer):
        def attention(self, call: Any) -> Any:
            if call.query.shape[2] > 1:
                return super().attention(call)
            assert self.pending is not None
            k, v = (torch.cat(pair, 2) for pair in zip(self.in_full(), self.pending[:2], strict=True))
            assert k.shape[2] == WINDOW
            seen.append((super().attention(call), _written_out(call, k, v)))
            return seen[-1][0]

    for layer in sliding(cache):
        layer.__class__ = Checked
        assert not layer.plan.policies
        assert layer.plan.selector is None
    with torch.no_grad():
        model(ids[:, :170], past_key_values=cache)
        for t in range(170, 230):
            model(ids[:, t : t + 1], past_key_values=cache)
    assert len(seen) == 60 * len(sliding(cache)) > 0
    for (found, _), expected in seen:
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def _written_out(call: Any, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """[B, n, Hq, D]: softmax over the tokens that each query sees, bool [B, n, N]; None: all of them."""
    group = call.query.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = call.query @ k.mT * call.scaling
    if (cap := call.kwargs.get("softcap")) is not None:
        logits = torch.tanh(logits / cap) * cap
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("stack", [EXACT, KIVI, "int(bits=4) + window(recent=8)", "klt(bits=3) + window(recent=8)"])
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_drafts_read_pages_as_a_dense_masked_reference_reads_what_they_decode_to(
    name: str, stack: str, padded: bool
) -> None:
    """Chunks of n drafts, of which a few stay: every query under the mask of its own window, written out in full."""
    model = make(name)
    cache, seen = CompressedCache(stack, model), []
    ids, valid = tokens(2, 1000, seed=3), torch.ones(2, 1000, dtype=torch.bool)
    if padded:
        valid[0, :40] = valid[1, 160:180] = valid[0, 250:253] = False

    class Checked(SlidingLayer):
        def attention(self, call: Any) -> Any:
            n, past = call.query.shape[2], self.store.history.length
            if not past:
                return super().attention(call)
            assert self.pending is not None
            k, v = (torch.cat(pair, 2) for pair in zip(self.in_full(), self.pending[:2], strict=True))
            own = torch.arange(past, past + n)[:, None]
            column = torch.arange(past + n - k.shape[2], past + n)
            shown = (column <= own) & (column > own - WINDOW) & valid[:, None, past + n - k.shape[2] : past + n]
            exact = self.store.exact.counts.view(2, -1).amax(1)
            last = shown.expand(2, -1, -1)[:, -1, :-n].sum(-1)  # tokens held that the last query sees
            whole = bool(valid[:, past : past + n].all()) and bool((exact <= last).all())
            answer = super().attention(call)
            seen.append((answer[0], _written_out(call, k, v, shown), valid[:, past : past + n]))
            served.append(("dense copy" not in self.store.read, whole and n <= MANY))
            return answer

    served: list[tuple[bool, bool]] = []  # whether no window was decoded, and whether that can be
    for layer in sliding(cache):
        layer.__class__ = Checked
    cache.activate_past_recording()
    at, positions = 0, (valid.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for n, back in [(200, 0), *((n, n - 1 - n // 3) for n in (2, 5, 1, 11, 16, 30, 32, 5, 5, 7) * 3), (40, 0)]:
            now = slice(at, at + n)
            mask = {"attention_mask": valid[:, : at + n].long(), "position_ids": positions[:, now]} if padded else {}
            model(ids[:, now], past_key_values=cache, **mask)
            cache.crop(-max(back, 0))
            at += n - max(back, 0)
    assert len(seen) == 31 * len(sliding(cache))
    for found, expected, there in seen:
        torch.testing.assert_close(found[there], expected[there], atol=2e-4, rtol=1e-3)
    assert [found for found, _ in served] == [expected for _, expected in served]
    assert 0.7 < sum(found for found, _ in served) / len(served) < 1


def test_drafts_under_a_mask_that_is_no_window() -> None:
    """Moshi's shows each of several tokens all that transformers' own layer holds."""
    model, twin = make("mistral"), make("mistral")
    ours, theirs = CompressedCache(EXACT, model), dense(twin)
    ids, at = tokens(1, 300), 0
    with torch.no_grad():
        for n in (150, 9, 1, 20, 2):
            mask = torch.ones(1, 1, n, min(at, WINDOW - 1) + n, dtype=torch.bool).tril(min(at, WINDOW - 1))
            given = {"attention_mask": mask} if n > 1 else {}
            x, y = (
                m(ids[:, at : at + n], past_key_values=c, **given).logits for m, c in ((model, ours), (twin, theirs))
            )
            torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
            at += n
    assert "dense copy" in ours.traffic().parts


@pytest.mark.parametrize("n", [1, 5, 20])
def test_drafts_read_little_more_than_one_token(n: int) -> None:
    model = make("gemma3", dtype="float32")
    cache, ids = CompressedCache(KIVI, model), tokens(1, 400)
    prefill(model, ids, [cache])
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
        alone = cache.traffic().read
        cache.activate_past_recording()
        model(ids[:, :n], past_key_values=cache)
    found, chunk = cache.traffic(), n * sum(2 * x.store.k_dim * x.store.heads * 4 for x in cache.layers)  # type: ignore
    pages = sum(x.store.layout.body_bytes * x.store.table.counts.numel() for x in sliding(cache))
    assert found.parts["chunk"] == chunk
    assert alone - chunk // n <= found.read - chunk <= alone + 2 * pages


# -- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stack", "window", "packed"),
    [
        (EXACT, WINDOW, True),
        (KIVI, 32, True),
        (KIVI, 31, False),  # the exact window and a page are larger
        ("kivi(bits=4, group=16)", WINDOW, False),  # as above: 128 recent tokens
        (f"snapkv(keep=0.5) + {KIVI}", WINDOW, True),
        ("snapkv(keep=0.5) + window(recent=8)", WINDOW, False),  # no quantizer
        ("int(bits=4) + window(sliding=dense)", WINDOW, False),
        ("int(bits=4) + window(recent=8, sliding=dense)", WINDOW, False),
    ],
)
def test_which_layers_are_packed(stack: str, window: int, packed: bool) -> None:
    model = make("gemma3", window=window)
    cache = CompressedCache(stack, model)
    assert len(sliding(cache)) == (2 if packed else 0)
    assert [type(x) is DynamicSlidingWindowLayer for x in cache.layers] == [not packed, False] * 2
    greedy(model, IDS, cache, 4)


def test_specs() -> None:
    for spec in ("kivi(bits=4) + window(sinks=4, recent=32)", "int(bits=4)", "window(sinks=2) + int8"):
        assert "sliding" not in str(Stack.parse(spec))
    packed, left = (Stack.parse(f"int(bits=4) + window(recent=8{x})") for x in (", sliding=packed", ", sliding=dense"))
    assert packed.hash == Stack.parse("int(bits=4) + window(recent=8)").hash == "488eb24576ea"
    assert left.hash != packed.hash
    assert str(left) == "int(bits=4) + window(sinks=0, recent=8, sliding=dense)"
    alone = Stack.parse("kivi(bits=4) + window(sliding=dense)")
    assert str(alone) == "kivi(bits=4) + window(sliding=dense)"
    assert (alone.window.sinks, alone.window.recent) == (0, 128)  # as KIVI publishes it
    assert Stack.parse(str(alone)) == alone


def test_a_model_of_windows_alone_is_compressed_or_says_why_not() -> None:
    model = make("mistral", window=400)
    with pytest.warns(KvcompWarning, match="nothing is compressed"):
        CompressedCache("snapkv(keep=0.5)", model)
    cache = CompressedCache("snapkv(keep=0.5, window=8) + int(bits=4)", model)
    greedy(model, tokens(1, 500), cache, 5)
    assert cache.memory().ratio > 2


# -- surgery ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [EXACT, KIVI])
def test_crops_are_exact_or_refused(stack: str) -> None:
    model = make("gemma3")
    ids = tokens(1, 300, seed=5)

    def after(n: int) -> tuple[CompressedCache, Tensor]:
        cache = CompressedCache(stack, model)
        with torch.no_grad():
            model(ids[:, :n], past_key_values=cache)
            return cache, model(ids[:, n : n + 1], past_key_values=cache).logits

    refused = 0
    for remove in range(1, 40):
        cache, _ = after(250)
        try:
            cache.crop(-remove)
        except UnsupportedError:
            refused += 1
            continue
        with torch.no_grad():
            at = 251 - remove
            found = model(ids[:, at : at + 1], past_key_values=cache).logits
        if stack == EXACT:
            torch.testing.assert_close(found, after(at)[1], atol=1e-4, rtol=0)
    assert 0 < refused < 39
    with pytest.raises(UnsupportedError, match=r"sees a sliding window of 100 tokens.*crop at most"):
        after(250)[0].crop(-39)


def test_reuse_starts_over_where_the_window_has_moved_on() -> None:
    model, twin = make("gemma3"), make("gemma3")
    cache = CompressedCache(EXACT, model)
    first = greedy(model, IDS[:1], cache, 70).sequences
    again = torch.cat([first[:, :120], tokens(1, 20)], 1)
    assert cache.reuse(again) == 0
    assert_same(greedy(model, again, cache, 5), greedy(twin, again, dense(twin), 5))


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("stack", [EXACT, KIVI])
def test_rows_and_files_to_the_last_bit(name: str, stack: str, tmp_path: Path) -> None:
    model = make(name)
    cache = CompressedCache(stack, model)
    greedy(model, IDS, cache, 50, attention_mask=MASK)
    cache.save(tmp_path / "x.kv")
    copies = cache.fork(), CompressedCache.load(tmp_path / "x.kv", model)
    for other in (cache, *copies):
        other.batch_select_indices(torch.tensor([1, 0, 1]))
    mask = F.pad(MASK, (0, 49 + 40), value=1)[[1, 0, 1]]
    with torch.no_grad():
        for i in range(40):
            step = tokens(3, 1, seed=i)
            given = {"attention_mask": mask[:, : 200 + i], "position_ids": mask[:, : 200 + i].sum(-1, keepdim=True) - 1}
            one, *others = (model(step, past_key_values=c, **given).logits for c in (cache, *copies))
            assert all(torch.equal(one, other) for other in others)


def test_old_files_go_on_with_dense_windows(tmp_path: Path) -> None:
    """Versions before this one left layers with a window to transformers, under the same stack."""
    model = make("gemma3")
    stack = "int(bits=4) + window(recent=8)"
    old = CompressedCache("int(bits=4) + window(recent=8, sliding=dense)", model)
    old.stack = Stack.parse(stack)
    greedy(model, tokens(2, 150), old, 30)
    old.save(tmp_path / "old.kv")
    assert not sliding(old)
    loaded = CompressedCache.load(tmp_path / "old.kv", model)
    assert loaded.stack.hash == old.stack.hash
    assert not sliding(loaded)
    for i in range(40):
        with torch.no_grad():
            a, b = (model(tokens(2, 1, seed=i), past_key_values=c).logits for c in (old, loaded))
        assert torch.equal(a, b)
    loaded.save(tmp_path / "again.kv")
    assert not sliding(CompressedCache.load(tmp_path / "again.kv", model))


def test_caches_that_pack_and_those_that_do_not_share_a_prefill() -> None:
    model = make("gemma3")
    specs = [EXACT, "int(bits=4) + window(recent=8, sliding=dense)", KIVI, "snapkv(keep=0.5, window=8)"]
    for order in (specs, specs[::-1]):
        together = [CompressedCache(spec, model) for spec in order]
        prefill(model, IDS, together, attention_mask=MASK)
        for spec, cache in zip(order, together, strict=True):
            alone = CompressedCache(spec, model)
            prefill(model, IDS, [alone], attention_mask=MASK)
            step = {"attention_mask": F.pad(MASK, (0, 1), value=1), "position_ids": MASK.sum(-1, keepdim=True)}
            with torch.no_grad():
                a, b = (model(IDS[:, -1:], past_key_values=c, **step).logits for c in (cache, alone))
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_rows_of_several_caches_step_together() -> None:
    model = make("gemma3")
    ids = tokens(2, 180)
    stacks = KIVI, "int(bits=4) + window(recent=8, sliding=dense)"
    caches, alone = ([CompressedCache(stack, model) for stack in stacks] for _ in range(2))
    for row, both in enumerate(zip(caches, alone, strict=True)):
        for cache in both:
            prefill(model, ids[row : row + 1], [cache])
    assert all(map(can_step_together, caches))
    with torch.no_grad():
        for i in range(30):
            step = tokens(2, 1, seed=i)
            found = model(step, past_key_values=lockstep(caches)).logits
            for row, cache in enumerate(alone):
                own = model(step[row : row + 1], past_key_values=cache).logits
                torch.testing.assert_close(found[row : row + 1], own, atol=1e-3, rtol=0)
    assert [cache.memory() for cache in caches] == [cache.memory() for cache in alone]


def test_what_is_read_between_forwards_is_the_window() -> None:
    model, twin = make("gemma3"), make("gemma3")
    ours, theirs = CompressedCache(EXACT, model), dense(twin)
    assert_same(greedy(model, tokens(2, 150), ours, 30), greedy(twin, tokens(2, 150), theirs, 30))
    with pytest.warns(KvcompWarning, match="dense tensors"):
        found = list(ours)
    for (k, v, window), (k2, v2, window2) in zip(found, theirs, strict=True):
        torch.testing.assert_close(k, k2, atol=1e-5, rtol=0)
        torch.testing.assert_close(v, v2, atol=1e-5, rtol=0)
        assert window == window2 if window2 is not None else window is None


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [EXACT, KIVI, f"snapkv(keep=0.5, window=8) + {KIVI}", "klt(bits=2) + window()"])
@pytest.mark.parametrize("length", [90, 100, 700])
def test_held_is_the_allocators_and_as_planned(stack: str, length: int) -> None:
    model = make("gemma3", dtype="float32")
    cache, ids = CompressedCache(stack, model), tokens(1, length)
    prefill(model, ids, [cache])
    told = bill(shape_of(model.config, "gemma3"), stack, length)
    memory = cache.memory()
    assert memory.held == reachable_bytes(cache)
    assert memory.dense == told.dense[0]
    history = memory.parts.pop("history")
    assert memory.held - history == pytest.approx(told.held, rel=1e-4)
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
        traffic = cache.traffic()
        assert traffic.read == pytest.approx(told.read, rel=1e-4)
        assert traffic.dense == told.dense[1]
        for i in range(150):
            model(ids[:, i % length :][:, :1], past_key_values=cache)
    assert cache.memory().held == reachable_bytes(cache)
    for layer in sliding(cache):
        pages = layer.store.table.counts * layer.plan.page_size + layer.store.exact.counts
        assert int(pages.max()) < WINDOW + layer.plan.page_size
        assert layer.store.pool.capacity <= 2 * int(layer.store.table.counts.sum()) + 2


@pytest.mark.parametrize(("tokens_held", "least"), [(2048, 3.5), (32768, 5.0)])
def test_gemma_3_geometry(tokens_held: int, least: float) -> None:
    """Five of six layers see 512 tokens, one KV head of 256 channels, float32."""
    geometry: dict[str, Any] = {"num_hidden_layers": 6, "head_dim": 256, "num_key_value_heads": 1, "dtype": "float32"}
    geometry["layer_types"] = ["sliding_attention"] * 5 + ["full_attention"]
    model = make("gemma3", window=512, max_position_embeddings=65536, **geometry)
    stack = "kivi(bits=4) + window(sinks=4, recent=32)"
    told = bill(shape_of(model.config, "gemma3"), stack, tokens_held)
    cache, given = CompressedCache(stack, model), torch.randn(2, 1, 1, tokens_held, 256)
    for layer in cache.layers:  # as a prompt does, without its attention
        assert isinstance(layer, CompressedLayer)
        layer.store.start(*given)
        layer.lazy_initialization(*given)
        layer.store.write(*given, None)
    memory = cache.memory()
    assert memory.held == pytest.approx(told.held, rel=1e-3)
    assert memory.ratio > least
    assert told.held_ratio > least
