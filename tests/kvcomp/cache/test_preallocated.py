"""A preallocated store is the store that it was taken from, step by step, and looks at nothing on the way."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvcomp import KvcompError, Stack, UnsupportedError
from kvcomp.cache.fixed import FixedStore
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.operator import decode_step
from kvcomp.errors import KvcompWarning
from kvcomp.kernels.dispatch import reference_only

WINDOW = "window(sinks=3, recent=5)"
SETTLED = [  # by the prompt or before: every kind of grid and basis
    "none",
    "int(bits=4)",
    "int(bits=3, symmetric=true, basis=hadamard)",
    "kivi(bits=2, group=16)",
    "turboquant(bits=4)",
    "turboquant(bits=3, variant=prod)",
    "turboquant(bits=2.5)",
    "fp8",
    "mxfp4",
    "nvfp4",
]
ADAPTING = ["klt(bits=2)"]
ROWS, HEADS, GROUP, DIM, PROMPT = 3, 2, 3, 64, 50
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def filled(spec: str, prompt: int = PROMPT, dims: tuple[int, int] = (DIM, DIM)) -> LayerStore:
    """A store of rows of `prompt`, 2 and prompt - 7 tokens after padding; heads of a row keep as many."""
    torch.manual_seed(0)
    store = LayerStore(Stack.parse(f"{spec} + {WINDOW}").plan(0, 1))
    k, v = (torch.randn(ROWS, HEADS, prompt, dim) for dim in dims)
    q = torch.randn(ROWS, HEADS * GROUP, prompt, dims[0])
    valid = torch.arange(prompt) >= torch.tensor([0, prompt - 2, 7])[:, None]
    store.start(k, v)
    store.write(k, v, valid, q)
    return store


def token(seed: int, dims: tuple[int, int] = (DIM, DIM)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (HEADS * GROUP, HEADS, HEADS)
    q, k, v = (torch.randn(ROWS, h, 1, d, generator=generator) for h, d in zip(heads, (dims[0], *dims), strict=True))
    return q, k, v


def stepped(store: LayerStore, seed: int, dims: tuple[int, int] = (DIM, DIM)) -> Tensor:
    """What a step of the store gives, which is then one token longer."""
    q, k, v = token(seed, dims)
    store.append(k, v)
    out = store.attend(q, 0.1).out
    store.settle()
    return out


def taken(spec: str, tokens: int = 120, host: bool = False, **given: Any) -> tuple[FixedStore, LayerStore]:
    """A preallocated store that holds all of a filled one, which is empty."""
    store = filled(spec, **given)
    ahead = FixedStore(store.plan, tokens, host)
    ahead.take(store)
    return ahead, store


def advance(ahead: FixedStore, seed: int, dims: tuple[int, int] = (DIM, DIM)) -> Tensor:
    with nullcontext() if ahead.host else reference_only():  # C kernels would serve tensors on the host
        out = ahead.step(*token(seed, dims), None, ahead.length, 0.1).out
    ahead.length += 1
    return out


def advance_by(ahead: FixedStore, steps: int) -> None:
    for seed in range(steps):
        advance(ahead, seed)


class LooksAtNothing(TorchDispatchMode):
    """Fails where the host would have to wait for a tensor's content, or where shapes follow from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):  # only masks make shapes
            assert all(x is None or x.dtype != torch.bool for x in args[1]), func
        else:
            assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dims", [(64, 64), (64, 32)])
@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("spec", SETTLED)
def test_steps_are_those_of_the_store(spec: str, host: bool, dims: tuple[int, int]) -> None:
    other = filled(spec, dims=dims)
    ahead, store = taken(spec, host=host, dims=dims)
    assert not store.kept.any()  # passed, not copied
    for seed in range(70):
        torch.testing.assert_close(advance(ahead, seed, dims), stepped(other, seed, dims), atol=2e-5, rtol=0)
    ahead.give(store)
    assert store.history.length == other.history.length == PROMPT + 70
    assert store.history.counts.tolist() == other.history.counts.tolist()
    assert store.table.counts.tolist() == other.table.counts.tolist()
    for stream in range(ROWS * HEADS):  # the very same bytes, read back
        for found, expected in zip(store._tokens(stream), other._tokens(stream), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", ADAPTING)
def test_what_adapts_may_do_so_where_counts_are_at_hand(spec: str) -> None:
    other, (ahead, _) = filled(spec), taken(spec, host=True)
    for seed in range(70):  # the short row has its first pages on the way
        torch.testing.assert_close(advance(ahead, seed), stepped(other, seed), atol=2e-5, rtol=0)
    with pytest.raises(UnsupportedError, match=r"adapts to pages as they are written, on the host"):
        taken(spec, host=False)


@pytest.mark.parametrize("spec", SETTLED)
def test_steps_look_at_nothing(spec: str) -> None:
    steps = 70
    ahead, _ = taken(spec)
    places = {name: x.data_ptr() for name, x in vars(ahead).items() if isinstance(x, Tensor)}
    pool, given = ahead.pool.data.data_ptr(), [token(seed) for seed in range(steps)]
    mask = torch.zeros(ROWS, 1, 1, 120, dtype=torch.bool)
    with LooksAtNothing(), reference_only():
        for i, (q, k, v) in enumerate(given):
            for row, first in enumerate([0, PROMPT - 2, 7]):
                mask[row, ..., first : PROMPT + i + 1] = True
            ahead.step(q, k, v, mask, ahead.length, 0.1)
            ahead.length += 1
    size, kept = ahead.plan.page_size, (PROMPT + steps, 2 + steps, PROMPT - 7 + steps)
    assert ahead.pages.tolist() == [(n - 8) // size for n in kept for _ in range(HEADS)]
    assert min(ahead.pages) > 0
    assert ahead.pool.data.data_ptr() == pool
    assert {name: x.data_ptr() for name, x in vars(ahead).items() if isinstance(x, Tensor)} == places


def test_the_check_finds_looks() -> None:
    x = torch.ones(3)
    for look in (lambda: x[0].item(), lambda: x.nonzero(), lambda: bool(x.any()), lambda: x[x > 0], lambda: x.unique()):
        with pytest.raises(AssertionError), LooksAtNothing():
            look()


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("spec", ["none", "kivi(bits=2, group=16)", "turboquant(bits=4)"])
def test_idle_room_is_never_read(spec: str, host: bool) -> None:
    clean, (ahead, _) = filled(spec), taken(spec, host=host)
    for x in (ahead.k, ahead.v):
        x[torch.arange(x.shape[1]) >= ahead.counts[:, None]] = torch.nan
    idle = torch.arange(ahead.ids.shape[1]) >= ahead.pages[:, None]
    ahead.pool.data[ahead.ids[idle].long()] = 0xFF
    ahead.pool.data[-1] = 0xFF
    for seed in range(40):
        torch.testing.assert_close(advance(ahead, seed), stepped(clean, seed), atol=2e-5, rtol=0)


@pytest.mark.parametrize("host", [True, False])
def test_there_is_exactly_the_room_that_was_asked_for(host: bool) -> None:
    """The last step fits, and the one after it is refused before anything is written."""
    ahead, store = taken("kivi(bits=2, group=16)", PROMPT + 30, host)
    other = filled("kivi(bits=2, group=16)")
    for seed in range(30):
        torch.testing.assert_close(advance(ahead, seed), stepped(other, seed), atol=2e-5, rtol=0)
    before = [x.clone() for x in (ahead.k, ahead.v, ahead.counts, ahead.pages, ahead.seen, ahead.pool.data)]
    with pytest.raises(KvcompError if host else RuntimeError, match=r"preallocate=80 tokens per row"):
        advance(ahead, 30)
    now = (ahead.k, ahead.v, ahead.counts, ahead.pages, ahead.seen, ahead.pool.data)
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    ahead.give(store)
    assert store.history.length == PROMPT + 30


def test_there_is_room_for_pages_behind_a_short_window() -> None:
    spec = "window(recent=20) + none"
    store, other = (LayerStore(Stack.parse(spec).plan(0, 1)) for _ in range(2))
    k = torch.randn(ROWS, HEADS, 100, DIM)
    for each in (store, other):
        each.start(k, k)
        each.write(k, k, None)
        each.crop(30)
    ahead = FixedStore(store.plan, 71, host=False)
    ahead.take(store)
    torch.testing.assert_close(advance(ahead, 0), stepped(other, 0), atol=2e-5, rtol=0)


def test_room_follows_what_a_policy_left() -> None:
    spec = "snapkv(budget=24, window=4) + int(bits=4)"
    kept, _ = taken(spec, 200, prompt=150)
    whole, _ = taken("int(bits=4)", 200, prompt=150)
    size = kept.plan.page_size
    assert (kept.ids.shape[1], whole.ids.shape[1]) == ((24 + 50 - 8) // size, (200 - 8) // size)
    other = filled(spec, prompt=150)
    for seed in range(50):  # and it is enough
        torch.testing.assert_close(advance(kept, seed), stepped(other, seed), atol=2e-5, rtol=0)


@pytest.mark.parametrize("host", [True, False])
def test_a_mask_must_show_what_was_written(host: bool) -> None:
    ahead, _ = taken("none", host=host)
    mask = torch.zeros(ROWS, 1, 1, 120)
    mask.masked_fill_(torch.arange(120) > PROMPT, torch.finfo(torch.float32).min)  # no padding: wrong for two rows
    with pytest.raises(UnsupportedError if host else RuntimeError, match="hides or shows other cached tokens"):
        ahead.step(*token(0), mask, ahead.length, 0.1)


@pytest.mark.parametrize("host", [True, False])
def test_pages_of_numbers_that_are_not_finite(host: bool) -> None:
    ahead, store = taken("kivi(bits=2, group=16)", host=host, prompt=20)
    ahead.k[:, 3, 5] = torch.inf  # of the token that the first page begins with
    with pytest.warns(KvcompWarning, match="not finite") if host else nullcontext():
        advance_by(ahead, 40)
    ahead.give(store)
    assert all(x.isfinite().all() for stream in range(ROWS * HEADS) for x in store._tokens(stream))


def test_tensors_are_used_again_where_they_fit() -> None:
    """A graph that knows them stays good; where they are others, their name is too."""
    ahead, store = taken("int(bits=4)")
    name, place = ahead.name, ahead.k.data_ptr()
    advance(ahead, 0)
    ahead.give(store)
    ahead.take(store)
    assert (ahead.name, ahead.k.data_ptr()) == (name, place)
    ahead.take(filled("int(bits=4)", prompt=30))
    assert (ahead.name, ahead.k.data_ptr()) == (name, place)
    ahead.take(filled("int(bits=4)", dims=(64, 32)))
    assert ahead.name != name


class Allocated(TorchDispatchMode):
    """The largest tensor that operations create."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("spec", ["none", "int(bits=4)"])
def test_surgery_finds_tokens_where_they_are(spec: str) -> None:
    """Pages and windows are lent: what is copied are counts."""
    other = filled(spec, prompt=600)
    ahead, store = taken(spec, 800, host=True, prompt=600)
    places = ahead.pool.data.data_ptr(), ahead.k.data_ptr(), ahead.name
    with Allocated() as most:
        for crop in (0, 3):
            ahead.give(store)
            assert torch.equal(store.kept, other.kept)
            for each in (store, other):
                each.crop(crop)
            ahead.take(store)
    assert most.bytes < min(ahead.k.nbytes, ahead.pool.data.nbytes) / 4
    assert places == (ahead.pool.data.data_ptr(), ahead.k.data_ptr(), ahead.name)
    for seed in range(40):
        torch.testing.assert_close(advance(ahead, seed), stepped(other, seed), atol=2e-5, rtol=0)


@pytest.mark.parametrize("rows", [[2, 1, 0], [0, 0, 2], [1, 2]])
@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("spec", ["int(bits=4)", "turboquant(bits=2.5)"])
def test_rows_that_are_selected_bring_their_pages(spec: str, host: bool, rows: list[int]) -> None:
    other, (ahead, store) = filled(spec), taken(spec, host=host)
    for seed in range(30):
        stepped(other, seed)
        advance(ahead, seed)
    ahead.give(store)
    for each in (store, other):
        each.select_rows(torch.tensor(rows))
    ahead.take(store)
    for seed in range(40):
        q, k, v = (x[rows] for x in token(seed))
        other.append(k, v)
        expected = other.attend(q, 0.1).out
        other.settle()
        with nullcontext() if host else reference_only():
            found = ahead.step(q, k, v, None, ahead.length, 0.1).out
        ahead.length += 1
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("spec", ["none", "kivi(bits=2, group=16)"])
def test_a_fork_of_what_is_lent_goes_on_by_itself(spec: str) -> None:
    """Also where neither of the two is taken back at once."""
    other, (ahead, store) = filled(spec), taken(spec, host=True)
    ahead.give(store)
    fork, expected = store.fork(), other.fork()
    for at, (ours, theirs) in enumerate(((store, other), (fork, expected)) * 2):
        for seed in range(40):
            torch.testing.assert_close(stepped(ours, 100 * at + seed), stepped(theirs, 100 * at + seed))
    for ours, theirs in ((store, other), (fork, expected)):
        for stream in range(ROWS * HEADS):
            for found, wanted in zip(ours._tokens(stream), theirs._tokens(stream), strict=True):
                assert torch.equal(found, wanted)


def test_a_turn_is_written_where_the_first_one_lies() -> None:
    spec = "kivi(bits=2, group=16)"
    other, (ahead, store) = filled(spec), taken(spec, 300, host=True)
    place = ahead.pool.data.data_ptr()
    k, v = torch.randn(2, ROWS, HEADS, 90, DIM).unbind()
    ahead.give(store)
    for each in (store, other):
        each.write(k, v, None)
    ahead.take(store)
    assert ahead.pool.data.data_ptr() == place
    for seed in range(40):
        torch.testing.assert_close(advance(ahead, seed), stepped(other, seed), atol=2e-5, rtol=0)


def test_a_copy_has_tensors_of_its_own() -> None:
    ahead, _ = taken("int(bits=4)")
    twin = deepcopy(ahead)
    q, k, v = token(0)
    expected = decode_step(q, k, v, None, twin.length, twin.name, 0.1, 0.0)
    assert ahead.counts.tolist() == [c - 1 for c in twin.counts.tolist()]
    found = decode_step(q, k, v, None, ahead.length, ahead.name, 0.1, 0.0)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_the_operator_keeps_its_promises() -> None:
    ahead, _ = taken("int(bits=4)", dims=(64, 32))
    q, k, v = token(0, (64, 32))
    args = (q, k, v, None, ahead.length, ahead.name, 0.1, 0.0)
    torch.library.opcheck(torch.ops.kvcomp.decode_step.default, args, test_utils=("test_schema", "test_faketensor"))
    ahead.take(filled("int(bits=4)", dims=(64, 32)))
    other = filled("int(bits=4)", dims=(64, 32))
    other.append(k, v)
    part = other.attend(q, 0.1, 5.0)
    torch.testing.assert_close(
        decode_step(q, k, v, None, ahead.length, ahead.name, 0.1, 5.0), (part.out, part.lse), atol=2e-5, rtol=0
    )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("spec", ["none", "kivi(bits=2, group=16)", "turboquant(bits=4)", "nvfp4"])
def test_a_cuda_graph_replays_steps(spec: str) -> None:
    store, other = filled(spec), filled(spec)
    ahead = FixedStore(store.plan, 120)
    on_gpu = LayerStore(store.plan)
    on_gpu.restore(store.state(), DEVICE)
    ahead.take(on_gpu)
    given = [x.to(DEVICE) for x in token(0)]
    graph = torch.cuda.CUDAGraph()
    outs = []
    for seed in range(50):
        for x, new in zip(given, token(seed), strict=True):
            x.copy_(new)
        if seed == 0:
            part = ahead.step(*given, None, ahead.length, 0.1)  # compiles
            ahead.length += 1
        elif seed == 1:
            with torch.cuda.graph(graph):
                part = ahead.step(*given, None, ahead.length, 0.1)
                ahead.length += 1
        if seed:
            graph.replay()
        outs.append(part.out.cpu().clone())
    for seed, out in enumerate(outs):
        torch.testing.assert_close(out, stepped(other, seed), atol=1e-3, rtol=0)
    assert int(ahead.length) == PROMPT + 50
