"""What a decode step launches besides attention, against its specification: windows, bases, choices."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache import fixed
from kvcomp.cache.fixed import FixedStore
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.reader import Read
from kvcomp.kernels import backends, dispatch
from kvcomp.kernels.reference import select as reference
from kvcomp.kernels.triton_backend import Triton
from kvcomp.ledger import ReadPlan
from kvcomp.quantizers.basis import Basis

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kvcomp.kernels.triton import ops_rotate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = Triton(anywhere=True)


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    with backends.using(TRITON):
        yield


@pytest.mark.parametrize(
    ("dims", "dtype"), [((64, 64), torch.bfloat16), ((80, 24), torch.float32), ((9, 0), torch.float16)]
)
def test_a_token_comes_into_every_window(dims: tuple[int, int], dtype: torch.dtype) -> None:
    """At its own place in each, of keys that lie anyhow; nothing else is touched."""
    k, v = (torch.randn(6, 7, dim, device=DEVICE).to(dtype) for dim in dims)
    counts = torch.tensor([0, 3, 6, 2, 0, 5], device=DEVICE)
    keys, values = (torch.randn(2, 1, 3, 2 * dim, device=DEVICE).to(dtype)[..., :dim].transpose(1, 2) for dim in dims)
    before = k.clone(), v.clone(), counts.clone()
    assert dispatch.append(k, v, counts, keys, values)
    for held, old, new in zip((k, v), before, (keys, values), strict=False):
        old[torch.arange(6), before[2]] = new.reshape(6, -1)
        assert torch.equal(held, old)
    assert torch.equal(counts, before[2] + 1)
    assert not dispatch.append(k, v, counts, keys.double(), values.double())


@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "int(bits=4)",
        "int(bits=4, basis=hadamard)",
        "kivi(bits=2, group=16)",
        "turboquant(bits=4)",
        "nvfp4",
        "snapkv(keep=0.5) + int8",
        "turboquant(bits=3.5)",  # settles the order of channels at the first page
    ],
)
@torch.no_grad()
def test_steps_in_fixed_memory_are_those_of_the_host(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the end of a page in every stream, at different steps; numbers that are not finite become 0 in pages."""
    torch.manual_seed(0)
    rows, heads, dim, prompt = 2, 2, 64, 60
    stores = []
    for _ in range(2):
        torch.manual_seed(1)
        plan = Stack.parse(f"{spec} + window(sinks=2, recent=9)").plan(0, 1)
        store = LayerStore(replace(plan, page_size=16).within(120))
        k, v = torch.randn(2, rows, heads, prompt, dim, device=DEVICE).to(torch.bfloat16).unbind()
        store.start(k, v)
        valid = torch.arange(prompt, device=DEVICE) >= torch.tensor([[0], [5]], device=DEVICE)
        with dispatch.reference_only():
            store.write(k, v, valid, torch.randn(rows, 2 * heads, prompt, dim, device=DEVICE), 0.1)
        store.end_prompt()
        stores.append(store)
    ahead, right = FixedStore(stores[0].plan, 120, host=False), FixedStore(stores[1].plan, 120, host=True)
    with dispatch.reference_only():
        right.take(stores[1])
    ahead.take(stores[0])
    for i in range(17):
        q = torch.randn(rows, 2 * heads, 1, dim, device=DEVICE).to(torch.bfloat16)
        k, v = torch.randn(2, rows, heads, 1, dim, device=DEVICE).to(torch.bfloat16).unbind()
        if i == 2 and spec != "none":  # which keeps what it is given
            k[0, 0, 0, 3], v[0, 1, 0, 5] = torch.inf, torch.nan
        mask = torch.zeros(rows, 1, 1, 120, dtype=torch.bool, device=DEVICE)
        mask[..., : prompt + i + 1] = True
        mask[1, ..., :5] = False
        with dispatch.reference_only():
            expected = right.step(q, k, v, mask, right.length, 0.1)
        if i in (0, 16):  # kernels are interpreted slowly
            found = ahead.step(q, k, v, mask, ahead.length, 0.1)
        else:
            part = expected._replace(out=expected.out.view(4, 2, dim), lse=expected.lse.view(4, 2))
            with monkeypatch.context() as quick:
                quick.setattr(fixed.reader, "attend", lambda *_, part=part: Read([part], None, ReadPlan()))
                ahead.step(q, k, v, mask, ahead.length, 0.1)
        right.length += 1
        ahead.length += 1
        if i in (0, 16):
            worst = (found.out - expected.out).abs().max() / expected.out.abs().max()
            assert float(worst) < 2e-2
            torch.testing.assert_close(found.lse, expected.lse, atol=2e-2, rtol=1e-2)
    assert (ahead.pages > 2).all()
    for name in ("k", "v", "counts", "pages", "seen"):
        assert torch.equal(getattr(ahead, name).nan_to_num(7), getattr(right, name).nan_to_num(7)), name
    layout, held = ahead.records.layout, ahead.pages
    for store in (ahead, right):
        there = torch.arange(store._pages.shape[1], device=DEVICE) < held[:, None]
        store._pages[~there] = 0
    off = (ahead._pages[..., : layout.body_bytes] != right._pages[..., : layout.body_bytes]).float().mean()
    assert float(off) < (1e-2 if "turboquant" in spec or "basis" in spec else 1e-9)


@torch.no_grad()
def test_a_mask_is_looked_at_once_a_step() -> None:
    """By the first layer that is given it; again when it changes, when it comes again, and by other caches."""
    plan = Stack.parse("int8 + window(sinks=2, recent=9)").plan(0, 3)
    k = torch.randn(1, 1, 40, 64, device=DEVICE)
    first = LayerStore(plan)
    stores = [first, LayerStore(Stack.parse("int8 + window(sinks=2, recent=9)").plan(1, 3), first.choices)]
    stores.append(LayerStore(plan))  # of another cache
    ahead = []
    for store in stores:
        store.start(k, k)
        with dispatch.reference_only():
            store.write(k, k, None)
        store.end_prompt()
        ahead.append(FixedStore(store.plan, 60, host=False))
        ahead[-1].take(store)

    def step(layer: FixedStore, mask: Tensor) -> None:
        token = torch.randn(1, 1, 1, 64, device=DEVICE)
        layer.step(token, token, token, mask, layer.length, 0.1)
        layer.length += 1

    mask = torch.arange(60, device=DEVICE).view(1, 1, 1, -1) < 41
    for layer in ahead:
        step(layer, mask)
    wrong = mask.clone()
    for layer in ahead[:1] + ahead[2:]:
        with pytest.raises(RuntimeError, match="hides or shows other"):
            step(layer, wrong)
    with pytest.raises(RuntimeError, match="hides or shows other"):
        step(ahead[0], mask)  # once more, which shows a token too few now
    wrong.logical_or_(torch.arange(60, device=DEVICE) < 45)
    with pytest.raises(RuntimeError, match="hides or shows other"):
        step(ahead[1], wrong)


@pytest.mark.parametrize("heads", [None, 2, 6])
@pytest.mark.parametrize(("rows", "dims"), [(1, (64, 64)), (5, (80, 24)), (20, (40, 136))])
def test_queries_and_outputs_change_their_basis(heads: int | None, rows: int, dims: tuple[int, int]) -> None:
    """As `Basis.read`, `offset` and `inverse`; also of a matrix in float16, some of whose columns are not stored."""
    shape = dims if heads is None else (heads, *dims)
    full = torch.randn(*shape[:-1], dims[1] + 8, device=DEVICE).half()
    matrix, mean = full[..., : dims[1]], torch.randn(shape[:-1], device=DEVICE)
    queries = torch.randn(6, rows, dims[0], device=DEVICE).to(torch.bfloat16)
    basis = Basis(None, matrix, mean)
    exact = Basis(None, matrix.float(), mean)
    found, bias = ops_rotate.rotated(queries, basis)
    torch.testing.assert_close(found, exact.read(queries), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, exact.offset(queries), atol=1e-4, rtol=1e-4)
    y, other, share = torch.randn(6, rows, dims[1]), torch.randn(6, rows, dims[0]), torch.rand(6, rows)
    y, other, share = y.to(DEVICE), other.to(DEVICE), share.to(DEVICE)
    back, _ = ops_rotate.rotate(y, matrix, None, True, other, share)
    right = Basis(None, matrix.float()).inverse(y, torch.arange(6, device=DEVICE)) * share[..., None] + other
    torch.testing.assert_close(back, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("pages", "each", "unit", "heads", "ends"),
    [
        (1, 1, 1, 1, (0, 0)),
        (5, 1, 1, 4, (0, 0)),
        (1100, 1, 1, 3, (1, 2)),
        (70, 4, 1, 1, (0, 1)),
        (40, 16, 16, 5, (1, 1)),
        (30, 1, 1, 17, (0, 0)),
    ],
)
def test_choices_are_the_largest(pages: int, each: int, unit: int, heads: int, ends: tuple[int, int]) -> None:
    """Of streams that have all pages, some and none; with heads of logits that are not finite, which count 0."""
    torch.manual_seed(pages)
    counts = torch.tensor([pages, 0, -(-pages * 2 // 3)], device=DEVICE)
    logits = torch.randn(3, heads, pages * each, device=DEVICE) * 5
    if heads > 1:
        logits[0, 1, 3], logits[2, 0, 2] = torch.inf, torch.nan
    wanted = (counts * unit * 0.4).long().clamp_min(1).minimum(counts * unit)
    width = min(int(wanted.max()) + 3, pages * unit)
    how = 0.3, counts, unit, wanted, width, pages, ends
    assert torch.equal(TRITON.choose(logits.clone(), *how), reference.choose(logits.clone(), *how))


def test_of_equal_shares_the_first_are_chosen() -> None:
    logits = torch.full((2, 1, 50), 0.5, device=DEVICE)
    logits[1, 0, 20] = 1
    counts, wanted = torch.tensor([50, 40], device=DEVICE), torch.tensor([4, 3], device=DEVICE)
    found = TRITON.choose(logits, 1.0, counts, 1, wanted, 5, 50, (0, 1))
    assert found.tolist() == [[0, 1, 2, 49, 49], [0, 20, 39, 49, 49]]


def test_forks_count_for_themselves() -> None:
    """The counts on the device follow appends, and are made anew after all that changes them otherwise."""
    store = LayerStore(Stack.parse("int8 + window(sinks=2, recent=30)").plan(0, 1))
    k = torch.randn(2, 1, 20, 64, device=DEVICE)
    store.start(k, k)
    store.write(k, k, None)
    token = torch.randn(2, 1, 1, 64, device=DEVICE)
    store.append(token, token)
    twin = store.fork()
    copied = deepcopy(store)
    for held in (twin, copied):
        held.append(token, token)
    assert store.exact.counts.tolist() == store.exact.placed.tolist() == [21, 21]
    assert twin.exact.counts.tolist() == twin.exact.placed.tolist() == [22, 22]
    assert copied.exact.counts.tolist() == copied.exact.placed.tolist() == [22, 22]
    store.crop(3)
    store.append(token, token)
    assert store.exact.counts.tolist() == store.exact.placed.tolist() == [19, 19]
