"""Sinks and window in fewer bits: what is held, how near it is to what came in, and what happens to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcomp import SpecError, Stack
from kvcomp.cache.fixed import why_not
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.rows import Rows
from kvcomp.stages.plan import held_parts, read_parts

NEAR = {16: 2.0**-11, 8: 0.02}  # errors over the size of what is coded
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(n: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [2, 2, n, dim] and q [2, 4, n, dim]."""
    g = torch.Generator().manual_seed(seed)
    k, v, q = (torch.randn(2, h, n, dim, generator=g).to(dtype) for h in (2, 2, 4))
    return k, v, q


def store_of(window: str, k: Tensor, v: Tensor, q: Tensor | None = None, quantizer: str = "int(bits=8)") -> LayerStore:
    store = LayerStore(Stack.parse(f"{quantizer} + window({window})").plan(0, 1))
    store.start(k, v)
    store.write(k, v, None, q)
    return store


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 31, 64, 80, 256])
@pytest.mark.parametrize("bits", [16, 8])
def test_rows_are_near_and_made_again_from_what_they_decode_to(bits: int, dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    rows = Rows(bits, dtype)
    coded = rows.encode(x)
    assert coded.shape == (3, 5, rows.width(dim))
    assert coded.dtype == rows.stored
    back = rows.decode(coded, dim)
    assert back.dtype == dtype
    allowed = NEAR[bits] * x.float().abs().amax() + torch.finfo(dtype).eps * x.float().abs().amax()
    assert bool(((back - x).abs() <= allowed).all())
    if dtype == torch.float32:
        assert torch.equal(rows.encode(back), coded)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e5, 1e30, 3e38])
def test_any_size_stays_finite(bits: int, size: float) -> None:
    x = torch.full((2, 3, 48), size)
    x[0, 0, 0] = -size
    assert Rows(bits, torch.float32).decode(Rows(bits, torch.float32).encode(x), 48).isfinite().all()


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("length", [3, 100, 300])
def test_attention_is_near_and_bytes_are_those_of_the_plan(bits: int, length: int) -> None:
    k, v, q = tokens(length, 64)
    exact, small = (store_of(f"sinks=4, recent=64{b}", k, v) for b in ("", f", bits={bits}"))
    for store in (exact, small):
        store.append(k[:, :, :1], v[:, :, :1])
    expected, found = (store.attend(q[:, :, :1], 0.125) for store in (exact, small))
    torch.testing.assert_close(found.out, expected.out, rtol=0, atol=4 * NEAR[bits])
    plan, parts = small.plan, small.read
    read = read_parts(plan, 64, 64, length, torch.float32)
    assert {name: 4 * read.get(name, 0) for name in ("sinks", "window")} == {
        name: parts.get(name, 0) for name in ("sinks", "window")
    }
    held, planned = (
        store_of(f"sinks=4, recent=64, bits={bits}", k, v).held(set()),
        held_parts(plan, 64, 64, length, torch.float32),
    )
    for name in ("sinks", "window"):
        assert held[name] == 4 * planned.get(name, 0)
    assert held["window"] < 0.6 * exact.held(set())["window"]


@pytest.mark.parametrize("bits", [16, 8])
def test_keys_with_a_large_bias_are_coded_without_it(bits: int) -> None:
    k, v, _ = tokens(60, 64)
    k = k + 300 * (torch.arange(64) == 5)
    back = store_of(f"sinks=4, recent=64, bits={bits}", k, v).dense()[0]
    others = torch.arange(64) != 5
    assert (back - k)[..., others].square().mean().sqrt() < 0.02


@pytest.mark.parametrize("bits", [16, 8])
def test_a_state_gives_the_same_rows_and_takes_those_of_full_precision(bits: int) -> None:
    k, v, q = tokens(200, 64)
    window = f"sinks=4, recent=64, bits={bits}"
    store = store_of(window, k, v)
    for step in range(70):  # windows become pages
        store.append(k[:, :, step : step + 1], v[:, :, step : step + 1])
        store.settle()
    twin = LayerStore(store.plan)
    twin.restore(store.state(), torch.device("cpu"))
    for found, expected in zip(twin.dense(), store.dense(), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(twin.attend(q[:, :, :1], 0.125).out, store.attend(q[:, :, :1], 0.125).out)
    if bits == 16:
        old = LayerStore(store.plan)
        old.restore(store_of("sinks=4, recent=64", k, v).state(), torch.device("cpu"))
        assert torch.equal(old.exact.k, store_of(window, k, v).exact.k)


@pytest.mark.parametrize("bits", [16, 8])
def test_rows_follow_beams_forks_and_crops(bits: int) -> None:
    k, v, _ = tokens(150, 64)
    store = store_of(f"sinks=4, recent=64, bits={bits}", k, v)
    before = store.dense()
    fork = store.fork()
    fork.append(k[:, :, :1], v[:, :, :1])
    for now, then in zip(store.dense(), before, strict=True):
        assert torch.equal(now, then)
    store.select_rows(torch.tensor([1, 0, 1]))
    for now, then in zip(store.dense(), before, strict=True):
        assert torch.equal(now, then[[1, 0, 1]])
    store.crop(30)
    for now, then in zip(store.dense(), before, strict=True):
        torch.testing.assert_close(now, then[[1, 0, 1], :, :120], rtol=0, atol=0.04)


def test_a_step_at_a_time_from_nothing() -> None:
    k, v, _ = tokens(40, 64)
    store = store_of("sinks=4, recent=64, bits=8", k[:, :, :1], v[:, :, :1])
    for step in range(1, 40):
        store.append(k[:, :, step : step + 1], v[:, :, step : step + 1])
    for back, x in zip(store.dense(), (k, v), strict=True):
        assert (back - x).square().mean().sqrt() < 0.02


def test_sixteen_bits_are_no_change_for_models_of_sixteen() -> None:
    k, v, _ = tokens(90, 64, torch.bfloat16)
    exact, small = (store_of(f"sinks=4, recent=64{b}", k, v) for b in ("", ", bits=16"))
    assert torch.equal(exact.exact.k, small.exact.k)


@pytest.mark.parametrize("bits", [0, 4, 12, 32])
def test_other_numbers_are_refused(bits: int) -> None:
    with pytest.raises(SpecError, match="16, 8 or None"):
        Stack.parse(f"window(bits={bits})")


def test_specs_without_bits_are_the_ones_of_before() -> None:
    stack = Stack.parse("kivi(bits=2) + window(sinks=4, recent=128)")
    assert stack.hash == "8c9c2f2ef828"
    assert str(Stack.parse("window(sinks=4, recent=8, bits=8)")) == "window(sinks=4, recent=8, bits=8)"
    assert "bits=8" in str(why_not(Stack.parse("window(bits=8)").plan(0, 1)))


def test_bits_alone_leave_the_published_window() -> None:
    window = Stack.parse("klt(bits=2) + window(bits=8)").window
    assert (window.sinks, window.recent, window.bits) == (4, 128, 8)
    assert str(Stack.parse("klt(bits=2) + window(bits=8)")) == "klt(bits=2) + window(bits=8)"
    assert Stack.parse("klt(bits=2) + window(sliding=dense)").window.bits == 16
    assert Stack.parse("klt(bits=2) + window(sinks=4, recent=128)").window.bits is None
