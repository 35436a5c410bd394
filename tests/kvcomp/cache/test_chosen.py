"""Attention over tokens that a model's own indexer chose: equal to that over the same tokens of what is stored."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import attend
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels.dispatch import reference_only
from kvcomp.stages import Choice
from kvcomp.stages.plan import read_parts

SPECS = [
    *("none", "int(bits=4)", "int8", "int(bits=4, basis=hadamard)", "int(bits=4, per=channel, group=16)"),
    *("kivi(bits=4, group=16)", "kivi(bits=2, group=16)", "fp8", "nvfp4", "mxfp4", "turboquant(bits=4)"),
    *("turboquant(bits=3, variant=prod)", "klt(bits=4)"),
]
WINDOWS = ["window(sinks=2, recent=8)", "window(sinks=0, recent=0)", "window(sinks=40, recent=20)"]
HELD = 301


def store_of(spec: str, rows: int, heads: int, latent: bool, held: int = HELD) -> LayerStore:
    generator = torch.Generator().manual_seed(7)
    keys = torch.randn(rows, heads, held, 96, generator=generator) + 1.0
    values = keys[..., :64] if latent else torch.randn(rows, heads, held, 64, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = LayerStore(replace(Stack.parse(spec).plan(0, 1), latent=latent))
    store.start(keys, values)
    store.write(keys, values, None, torch.randn(rows, heads * 3, held, 96, generator=generator), 0.1)
    return store


def drawn(streams: int, counts: list[int], held: int = HELD, fill: int = 10**6) -> Choice:
    """So many random tokens of each stream, ascending, before places that are none."""
    width = max(counts)
    places = torch.full((streams, width), fill)
    for s, n in enumerate(counts):
        order = torch.randperm(held, generator=torch.Generator().manual_seed(s))
        places[s, :n] = order[:n].sort().values
    return Choice(places, torch.tensor(counts))


def expected(store: LayerStore, q: Tensor, choice: Choice) -> Tensor:
    """[B, Hq, Dv]: attention over what is stored of the chosen tokens, in PyTorch."""
    keys, values = (x.flatten(0, 1).float() for x in store.dense())
    group = q.shape[1] // store.heads
    found = []
    for s, (places, n) in enumerate(zip(choice.positions, choice.valid.tolist(), strict=True)):
        at, row, head = places[:n], s // store.heads, s % store.heads
        own = q[row, head * group : (head + 1) * group, 0]
        found.append(attend(own[None], keys[s, at][None], values[s, at][None], 0.1).out[0])
    return torch.stack(found).unflatten(0, (store.rows, store.heads)).flatten(1, 2)


def near(a: Tensor, b: Tensor, tolerance: float = 3e-5) -> None:
    assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("spec", SPECS)
def test_chosen_tokens_are_all_that_counts(spec: str, window: str, latent: bool) -> None:
    rows, heads = (3, 1) if latent else (2, 2)
    store = store_of(f"{spec} + {window}", rows, heads, latent)
    q = torch.randn(rows, heads * 5, 1, 96, generator=torch.Generator().manual_seed(3))
    for counts in ([40, 77, 5, 64], [1, 2, 3, 4], [HELD] * 4):
        choice = drawn(rows * heads, counts[: rows * heads])
        found = store.attend(q, 0.1, choice=choice).out[:, :, 0]
        near(found, expected(store, q, choice))
        with reference_only():
            near(store.attend(q, 0.1, choice=choice).out[:, :, 0], found)


def paged(store: LayerStore) -> range:
    """The places whose tokens lie in pages."""
    first = store.plan.sinks
    return range(first, first + int(store.table.counts[0]) * store.plan.page_size)


@pytest.mark.parametrize("part", ["sinks", "pages", "window", "edges", "first", "last", "nothing"])
@pytest.mark.parametrize("spec", ["none", "kivi(bits=4, group=16)", "int8"])
def test_a_choice_may_lie_in_any_part(spec: str, part: str) -> None:
    store = store_of(f"{spec} + window(sinks=2, recent=8)", 1, 1, True)
    inside = paged(store)
    assert 2 == inside.start < inside.stop < HELD
    places = {
        "sinks": [0, 1],
        "pages": [*inside],
        "window": [*range(inside.stop, HELD)],
        "edges": [1, 2, inside.stop - 1, inside.stop],
        "first": [0],
        "last": [HELD - 1],
        "nothing": [],
    }[part]
    q = torch.randn(1, 4, 1, 96, generator=torch.Generator().manual_seed(3))
    choice = Choice(torch.tensor([[*places, 0, 0]]), torch.tensor([len(places)]))
    found = store.attend(q, 0.1, choice=choice)
    if not places:
        assert bool((found.lse == -torch.inf).all())
        return
    near(found.out[:, :, 0], expected(store, q, choice))


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("spec", ["none", "int(bits=4)", "int(bits=4) + window(sinks=4, recent=64)", "kivi(bits=4)"])
def test_plans_foretell_what_random_choices_read(spec: str, latent: bool) -> None:
    held, rows, heads, chosen = 6000, 6, 1 if latent else 3, 500
    streams = rows * heads
    store, choice = store_of(spec, rows, heads, latent, held), drawn(streams, [chosen] * streams, held)
    store.attend(torch.randn(rows, heads, 1, 96), 0.1, choice=choice)
    dims = (64, 32) if latent else (96, 64)
    foretold = read_parts(replace(store.plan, chosen_tokens=chosen), *dims, held - 1, torch.float32)
    assert sum(store.read.values()) == pytest.approx(streams * sum(foretold.values()), rel=0.01)
    assert store.read["pages"] == pytest.approx(streams * foretold["pages"], rel=0.01)


def test_before_the_first_page_all_tokens_are_exact() -> None:
    store = store_of("int(bits=4) + window(sinks=4, recent=16)", 2, 1, True, held=30)
    q = torch.randn(2, 4, 1, 96, generator=torch.Generator().manual_seed(3))
    choice = drawn(2, [7, 12], held=30)
    near(store.attend(q, 0.1, choice=choice).out[:, :, 0], expected(store, q, choice))


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("spec", ["none", "int(bits=4)", "kivi(bits=4, group=16)"])
def test_a_step_reads_chosen_tokens_and_nothing_else(spec: str, latent: bool) -> None:
    heads = 1 if latent else 2
    store = store_of(f"{spec} + window(sinks=2, recent=8)", 1, heads, latent)
    q, choice = torch.randn(1, heads, 1, 96), drawn(heads, [50] * heads)
    store.attend(q, 0.1, choice=choice)
    inside, size, layout = paged(store), store.plan.page_size, store.layout
    places = [(s, p) for s, stream in enumerate(choice.positions.tolist()) for p in stream]
    exact = sum(p not in inside for _, p in places)
    of_pages = [(s, (p - inside.start) // size) for s, p in places if p in inside]
    pages = len(of_pages) * layout.token_bytes if layout.tokenwise else len(set(of_pages)) * layout.body_bytes
    if layout.tokenwise and layout.centres:
        pages += heads * len(inside) // size * layout.centre_bytes
    width = 96 * 4 if latent else (96 + 64) * 4
    read = dict(store.read)
    read.pop("constants", 0)
    assert read == {"window": exact * width, "table": 4 * len(of_pages), "pages": pages}
