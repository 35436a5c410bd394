"""Latents (MLA): pages of one stream, whose values share the bytes of their keys."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.architecture import LayerKind, LayerShape, Matrices, ModelShape
from kvcomp.attention import attend
from kvcomp.cache import reader
from kvcomp.cache.layer import LayerStore
from kvcomp.cost.bill import bill
from kvcomp.kernels.dispatch import reference_only
from kvcomp.layout import CENTRE
from kvcomp.stages import LatentStage

WINDOW = " + window(sinks=2, recent=8)"
QUANTIZERS = [
    *("none", "int(bits=4)", "int(bits=3)", "int(k=4, v=8)", "int8", "int(bits=4, basis=hadamard)"),
    *("int(bits=4, per=channel, group=16)", "kivi(bits=4, group=16)", "fp8", "nvfp4", "mxfp4"),
    *("turboquant(bits=4)", "turboquant(bits=3.5)", "turboquant(bits=3, variant=prod)", "klt(bits=4)", "klt(bits=2.5)"),
]
SELECTORS = ["quest(pages=2)", "moba(keep=0.5)", "sketch(keep=0.3)", "none + sketch(keep=0.3) + window(recent=16)"]


def store_of(spec: str, latents: Tensor, rank: int, heads: int, seed: int = 1) -> LayerStore:
    """A store of latents [B, 1, n, R + Dr] but for the last, which is a step's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = LayerStore(replace(Stack.parse(spec).plan(2, 4), latent=True))
    prompt, last = latents[:, :, :-1], latents[:, :, -1:]
    store.start(prompt, prompt[..., :rank])
    store.write(prompt, prompt[..., :rank], None, asked(latents, heads, prompt.shape[2], seed), 0.2)
    store.append(last.contiguous(), last[..., :rank])
    return store


def asked(latents: Tensor, heads: int, n: int = 1, seed: int = 2) -> Tensor:
    return torch.randn(len(latents), heads, n, latents.shape[-1], generator=torch.Generator().manual_seed(seed))


def draw(rank: int, rotary: int, tokens: int, rows: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank + rotary)
    return torch.randn(rows, 1, tokens + 1, rank + rotary, generator=generator).to(dtype)


def near(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("spec", QUANTIZERS)
@pytest.mark.parametrize(("rank", "rotary", "heads"), [(64, 32, 5), (96, 64, 20), (160, 32, 1)])
def test_attention_is_that_over_what_is_stored(spec: str, rank: int, rotary: int, heads: int) -> None:
    latents = draw(rank, rotary, 150, rows=2)
    store, q = store_of(spec + WINDOW, latents, rank, heads), asked(latents, heads)
    found = store.attend(q, 0.2)
    keys, values = store.dense()
    assert torch.equal(values, keys[..., :rank])
    near(found.out[:, :, 0], attend(q[:, :, 0], keys[:, 0], values[:, 0], 0.2).out)
    with reference_only():
        near(found.out, store.attend(q, 0.2).out)
    exact = attend(q[:, :, 0], latents[:, 0], latents[:, 0, :, :rank], 0.2).out
    assert float((found.out[:, :, 0] - exact).norm() / exact.norm()) < (1e-5 if spec == "none" else 0.6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [16, 70, 128])
def test_many_heads_over_one_stream(heads: int, dtype: torch.dtype) -> None:
    for spec in ("none", "int(bits=4)"):
        latents = draw(96, 32, 200, dtype=dtype)
        store, q = store_of(spec, latents, 96, heads), asked(latents, heads)
        keys, values = store.dense()
        near(store.attend(q, 0.2).out[:, :, 0], attend(q[:, :, 0], keys[:, 0], values[:, 0], 0.2).out, 1e-2)


def test_latents_without_a_rotary_key() -> None:
    for spec in ("none", "int(bits=8)", "turboquant(bits=4)"):
        latents = draw(64, 0, 150)
        store, q = store_of(spec + WINDOW, latents, 64, 4), asked(latents, 4)
        keys, values = store.dense()
        near(store.attend(q, 0.2).out[:, :, 0], attend(q[:, :, 0], keys[:, 0], values[:, 0], 0.2).out)


@dataclass(frozen=True)
class Some(LatentStage):
    """Pages keep 64 coordinates of latents."""

    def kept(self, channels: int) -> int:
        return 64


@pytest.mark.parametrize("spec", QUANTIZERS)
def test_pages_keep_the_first_coordinates(spec: str) -> None:
    """By the kernel and by the specification: attention over what is stored, and nothing where a page has none."""
    latents, found = draw(96, 0, 150, rows=2), []
    plan = replace(Stack.parse(spec + WINDOW).plan(2, 4), latent=True, joint=Some())
    q = asked(latents, 6)
    for how in (nullcontext(), reference_only()):
        store = LayerStore(plan)
        with how:
            store.start(latents, latents)
            store.write(latents, latents, None, asked(latents, 6, 151, 1), 0.2)
            found.append(store.attend(q, 0.2).out)
        keys, values = store.dense()
        assert torch.equal(keys, values)
        paged = int(store.table.counts[0]) * store.plan.page_size
        assert paged > 0
        assert not keys[:, :, 2 : 2 + paged, 64:].any()
        assert keys[:, :, -8:, 64:].any()
        near(found[-1][:, :, 0], attend(q[:, :, 0], keys[:, 0], values[:, 0], 0.2).out)
    near(*found)


def test_values_are_held_once() -> None:
    latents = draw(64, 32, 150)
    store = store_of("none" + WINDOW, latents, 64, 2)
    assert store.exact.values.data_ptr() == store.exact.k.data_ptr()
    assert store.exact.v.numel() == 0
    assert store.layout.body_bytes == store.plan.page_size * 96 * 4
    assert store.dense_bytes == 151 * 96 * 4
    held = store.held(set())
    assert held["window"] + held["sinks"] == store.exact.k.nbytes


@pytest.mark.parametrize("spec", ["none", "int(bits=8)", "klt(bits=4)", "turboquant(bits=3.5)"])
def test_forks_and_files_go_on_alike(spec: str) -> None:
    latents = draw(64, 32, 150, rows=2)
    store, q = store_of(spec + WINDOW, latents, 64, 4), asked(latents, 4)
    twin, restored = store.fork(), LayerStore(store.plan)
    restored.restore(deepcopy(store.state()), torch.device("cpu"))
    for other in (twin, restored):
        for step in range(70):
            new = draw(64, 32, 1 + step, rows=2)[:, :, -1:]
            for each in (store, other) if other is twin else (other,):
                each.append(new.clone(), new[..., :64])
                each.settle()
        assert torch.equal(store.attend(q, 0.2).out, other.attend(q, 0.2).out)


def test_the_newest_tokens_are_taken_back() -> None:
    latents = draw(64, 32, 150)
    store, q = store_of("none" + WINDOW, latents, 64, 4), asked(latents, 4)
    store.crop(40)
    near(store.attend(q, 0.2).out[:, :, 0], attend(q[:, :, 0], latents[:, 0, :111], latents[:, 0, :111, :64], 0.2).out)


@pytest.mark.parametrize("spec", SELECTORS)
def test_chosen_tokens_alone_are_read(spec: str) -> None:
    latents = draw(64, 32, 400)
    store, q = store_of(spec, latents, 64, 6), asked(latents, 6)
    records, view = store.records, store.storage.view()
    choice, rest = reader.choose(records, view, q[:, :, 0], 0.2)
    assert choice is not None
    assert rest is None
    size, sinks = store.plan.page_size, store.plan.sinks
    seen = torch.zeros(401, dtype=torch.bool)
    paged = int(store.table.counts[0]) * size
    places = choice.positions[0, : int(choice.valid[0])]
    places = places if records.by_tokens else (places[:, None] * size + torch.arange(size)).flatten()
    seen[sinks + places] = True
    seen[:sinks] = seen[sinks + paged :] = True
    assert 0 < int(seen.sum()) < 401
    found = store.attend(q, 0.2)
    near(found.out[:, :, 0], attend(q[:, :, 0], latents[:, 0, seen], latents[:, 0, seen, :64], 0.2).out)


@pytest.mark.parametrize(
    "spec",
    ["snapkv(keep=0.5, window=8)", "tova(keep=0.5)", "keydiff(keep=0.5)", "streaming(recent=32)", "h2o(keep=0.5)"],
)
def test_policies_keep_some_of_the_one_stream(spec: str) -> None:
    latents = draw(64, 32, 300)
    store, q = store_of(f"{spec} + none", latents, 64, 6), asked(latents, 6)
    assert int(store.kept[0]) < 200
    keys, values = store.dense()
    near(store.attend(q, 0.2).out[:, :, 0], attend(q[:, :, 0], keys[:, 0], values[:, 0], 0.2).out)


def test_pages_with_centres_are_still_read() -> None:
    """Of caches that were saved when latents were stored as other keys are."""
    latents = draw(64, 32, 150)
    plan = replace(Stack.parse("int(bits=8)" + WINDOW).plan(0, 1), latent=True)
    store, q = LayerStore(plan), asked(latents, 4)
    store.start(latents, latents[..., :64], centred=True)
    store.write(latents, latents[..., :64], None)
    assert any(field.name.endswith(CENTRE) for field in store.layout.fields)
    keys, values = store.dense()
    near(store.attend(q, 0.2).out[:, :, 0], attend(q[:, :, 0], keys[:, 0], values[:, 0], 0.2).out)
    restored = LayerStore(plan)
    restored.restore(deepcopy(store.state()), torch.device("cpu"))
    assert torch.equal(restored.attend(q, 0.2).out, store.attend(q, 0.2).out)


# -- DeepSeek-V3: a latent of 512 channels, a rotary key of 64 and 128 query heads -------------------------------------

V3 = LayerShape(1, 512, 64, 128, 320, 1088, kind=LayerKind.LATENT)
TOKENS = 4096


@pytest.mark.parametrize(
    ("spec", "most"),
    [("none", 1152), ("int(bits=4)", 330), ("int(bits=4) + sketch(keep=0.1, dense_layers=0)", 60)],
)
def test_bytes_of_a_step_of_deepseek_v3(spec: str, most: int) -> None:
    latents, stack = draw(512, 64, TOKENS, dtype=torch.bfloat16), Stack.parse(spec)
    planned = bill(ModelShape("v3", (V3,), Matrices(1, 1.0)), stack, TOKENS)
    store = store_of(spec, latents, 512, 1)
    store.attend(asked(latents, 128), 0.07)
    read = store.read
    assert sum(read.values()) == pytest.approx(planned.read, rel=0.01)
    paged = store.plan.page_size * int(store.table.counts[0])
    assert (read["pages"] + read.get("summaries", 0)) / paged <= most
    if spec == "none":
        assert read["pages"] == 1152 * paged
    assert "dense copy" not in read


# -- DeepSeek-V2-Lite: 16 heads; what is missed of the attention that all tokens get --------------------------------


def _latents(kind: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Latents [1, 1, n, 576] and queries [1, 16, n, 576]: independent, or of 64 topics, each for 64 tokens in a row."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "random":
        return normal(1, 1, tokens, 576), 0.35 * normal(1, 16, tokens, 576)
    topics = normal(64, 576)
    run = torch.randint(0, 64, (tokens // 64 + 1,), generator=generator).repeat_interleave(64)[:tokens]
    asked = torch.randint(0, 64, (16, tokens), generator=generator)
    latents, queries = topics[run] + 0.7 * normal(tokens, 576), topics[asked] + 0.7 * normal(16, tokens, 576)
    return latents[None, None], 0.3 * queries[None]


@pytest.mark.parametrize(
    ("kind", "spec", "most", "least"),  # bytes a token, and how much of the best choice for all heads together
    [
        ("random", "sketch(keep=0.1, dense_layers=0)", 60, 0.85),
        ("random", "quest(keep=0.1, dense_layers=0)", 180, 0.85),
        ("random", "moba(keep=0.1, dense_layers=0)", 60, 0.85),
        ("topics", "sketch(keep=0.1, dense_layers=0)", 60, 0.55),
        ("topics", "quest(keep=0.1, dense_layers=0)", 180, 0.7),
        ("topics", "moba(keep=0.1, dense_layers=0)", 60, 0.6),
    ],
)
def test_recall_of_attention(kind: str, spec: str, most: float, least: float) -> None:
    """`pytest -s` prints a line for each: the attention that lies on what is read, and bytes read a token."""
    latents, queries = _latents(kind, 4097)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack = Stack.parse(f"int(bits=4) + {spec} + window(sinks=4, recent=64)")
    store, scale, n = LayerStore(replace(stack.plan(2, 4), latent=True)), 576**-0.5, 4096
    prompt = latents[:, :, :n]
    store.start(prompt, prompt[..., :512])
    store.write(prompt, prompt[..., :512], None, queries[:, :, :n], scale)
    q = queries[:, :, -1:]
    exact = (q[0, :, 0] @ prompt[0, 0].T) * scale
    part = store.attend(q, scale)
    received = (part.lse[0, :, 0] - exact.logsumexp(-1)).exp()  # up to what 4 bits change of the logits
    pages, size = store.plan.chosen(int(store.table.counts[0])), store.plan.page_size
    read = pages * size + int(store.exact.counts[0])
    best = exact.softmax(-1).mean(0).topk(read).values.sum()
    nbytes = sum(amount for name, amount in store.read.items() if name in ("pages", "summaries", "table")) / n
    said = f"{received.mean():.3f} of the attention (best choice for all heads: {best:.3f})"
    print(f"{kind}, {spec}: {read / n:.3f} of the tokens, {nbytes:.1f} bytes a token, {said}")
    assert nbytes <= most
    assert float(received.mean()) >= least * float(best)
