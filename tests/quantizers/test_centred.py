"""Keys with a large mean: what all tokens of a stream share costs no precision, and softmax gets it back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import attend
from kvcomp.cache.fixed import FixedStore
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels.dispatch import reference_only
from kvcomp.ledger import storage_bytes
from kvcomp.quantizers.centred import CentredCodec, centre

WINDOW = "window(sinks=4, recent=32)"
SPECS = [
    "int(bits=8)",
    "int(bits=4)",
    "int(bits=2, basis=hadamard)",
    "int(bits=4, basis=random, group=16)",
    "int(bits=4, symmetric=true)",
    "int(bits=4, per=channel)",
    "int(bits=4, per=channel, symmetric=true)",
    "int8",
    "kivi(bits=4, group=16)",
    "fp8",
    "fp8(format=e5m2)",
    "nvfp4",
    "mxfp4",
    *(f"turboquant(bits={bits})" for bits in (1, 2, 2.5, 3.5, 4)),
    "turboquant(bits=4, variant=prod)",
    "turboquant(bits=2.5, variant=prod)",
    "klt(bits=2)",
    "klt(bits=4)",
]
CENTRED = [spec for spec in SPECS if not spec.startswith(("kivi", "klt")) and spec != "int(bits=4, per=channel)"]
HEADS, DIM, TOKENS = 2, 64, 400
every = pytest.mark.parametrize("spec", SPECS)
centred = pytest.mark.parametrize("spec", CENTRED)


def tokens(size: float, rows: int = 1, n: int = TOKENS, channels: tuple[int, ...] = (30, 57)) -> tuple[Tensor, ...]:
    """q [B, 4, n, D], k and v [B, 2, n, D]; `size` is added to some channels of all keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, heads, n, DIM, generator=generator) for heads in (2 * HEADS, HEADS, HEADS))
    k[..., list(channels)] += size
    return q, k, v


def store(spec: str, q: Tensor, k: Tensor, v: Tensor) -> LayerStore:
    made = LayerStore(Stack.parse(f"{spec} + {WINDOW}").plan(0, 1))
    made.start(k, v)
    made.write(k, v, None, q, DIM**-0.5)
    return made


def error(spec: str, size: float, channels: tuple[int, ...] = (30, 57), chunk: bool = False) -> float:
    """Of the attention output of a decode step, or of one with a pending chunk, relative to the exact one."""
    q, k, v = tokens(size, channels=channels)
    query = q[:, :, -1:]
    seen = k, v
    more = None
    if chunk:
        more = k[:, :, :3], v[:, :, :3], None
        query = q[:, :, -3:]
        seen = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2)
    out = store(spec, q, k, v).attend(query, DIM**-0.5, chunk=more).out
    n = query.shape[2]
    visible = torch.ones(n, seen[0].shape[2], dtype=torch.bool).tril(seen[0].shape[2] - n)
    wanted = attend(
        query.reshape(HEADS, 2, n, DIM).flatten(1, 2),
        *(x[0] for x in seen),
        DIM**-0.5,
        visible.repeat(2, 1).expand(HEADS, -1, -1),
    ).out.reshape(out.shape)
    return float((out - wanted).norm() / wanted.norm())


@every
@pytest.mark.parametrize("chunk", [False, True])
def test_a_large_mean_costs_nothing(spec: str, chunk: bool) -> None:
    usual = error(spec, 0, chunk=chunk)
    for size in (30, 60, 100, -200):
        assert error(spec, size, chunk=chunk) < 1.5 * usual


@every
def test_any_channels_may_have_it(spec: str) -> None:
    usual = error(spec, 0)
    for channels in ((0,), tuple(range(0, DIM, 3)), tuple(range(DIM))):
        assert error(spec, 50, channels) < 1.5 * usual


@centred
def test_kernels_and_reference_agree(spec: str) -> None:
    q, k, v = tokens(50)
    fast = store(spec, q, k, v).attend(q[:, :, -1:], 0.125)
    with reference_only():
        slow = store(spec, q, k, v).attend(q[:, :, -1:], 0.125)
    torch.testing.assert_close(fast.out, slow.out, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(fast.lse, slow.lse, atol=2e-3, rtol=2e-3)


@centred
def test_centred_keys_are_coded_as_they_are(spec: str) -> None:
    q, k, v = tokens(0)
    made = store(spec, q, k, v)
    assert isinstance(made.codec, CentredCodec)
    plain = store(spec, q[:, :, :0], k[:, :, :0], v[:, :, :0])
    plain.codec.fix(None)
    plain.write(k, v, None, q, DIM**-0.5)
    if "." in spec:  # outlier channels are still to be found
        assert made.codec.state()["k.centre.values"].count_nonzero() == 0
        return
    for ours, theirs in zip(made.dense(), plain.dense(), strict=True):
        assert torch.equal(ours, theirs)


@centred
def test_means_follow_rows_forks_and_files(spec: str) -> None:
    q, k, v = tokens(50, rows=2)
    k[1] -= 120
    made = store(spec, q, k, v)
    before = made.dense()[0]
    twin = made.fork()
    other = LayerStore(made.plan)
    other.restore(made.state(), torch.device("cpu"))
    ahead, source = FixedStore(made.plan, 600), made.fork()
    ahead.take(source)
    ahead.give(source)
    for same in (twin, other, source):
        assert torch.equal(same.dense()[0], before)
    made.select_rows(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(made.dense()[0], before[[1, 1, 0]])
    twin.write(k[:, :, :200] + 500, v[:, :, :200], None, q[:, :, :200], 0.1)  # a settled mean stays
    assert torch.equal(twin.dense()[0][:, :, : TOKENS - 96], before[:, :, : TOKENS - 96])
    assert torch.equal(other.dense()[0], before)


@centred
def test_files_without_means_are_read_as_they_were(spec: str) -> None:
    q, k, v = tokens(5)
    old = store(spec, q[:, :, :0], k[:, :, :0], v[:, :, :0])
    old.codec.fix(None)
    old.write(k, v, None, q, DIM**-0.5)
    state = old.state()
    assert not any(name.startswith("k.centre") for name in state["codec"])
    again = LayerStore(old.plan)
    again.restore(state, torch.device("cpu"))
    assert torch.equal(again.dense()[0], old.dense()[0])
    query = q[:, :, -1:]
    torch.testing.assert_close(again.attend(query, 0.1).out, old.attend(query, 0.1).out)


@centred
def test_means_are_counted(spec: str) -> None:
    q, k, v = tokens(50, rows=3)
    made = store(spec, q, k, v)
    held = storage_bytes(made.codec.adapted())
    orders = 2 * ("2.5" in spec or "3.5" in spec)
    assert held == 3 * HEADS * (DIM * 4 + 1 + orders * (DIM * 2 + 1))
    made.attend(q[:, :, -1:], 0.1)
    assert made.read["constants"] == held


@pytest.mark.parametrize("size", [1e3, 1e6, 1e30, 3e38])
def test_a_loud_token_does_not_move_the_mean(size: float) -> None:
    k = torch.randn(1, 256, DIM, generator=torch.Generator().manual_seed(0)) + 5
    usual = centre(k)
    k[0, 7] = size
    k[0, 8, 3] = -size
    assert (centre(k) - usual).norm() < 0.05 * usual.norm()


def test_extreme_keys_have_finite_means() -> None:
    for x in (torch.zeros(1, 64, DIM), torch.full((1, 64, DIM), 3e38), torch.full((1, 64, DIM), -3e38)):
        assert centre(x).isfinite().all()
        assert (x - centre(x)[:, None]).isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_the_dtypes_of_models(spec: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tokens(50))
    made = store(spec, q, k, v)
    out = made.attend(q[:, :, -1:], DIM**-0.5).out
    exact = store(spec, *(x.float() for x in (q, k, v))).attend(q[:, :, -1:].float(), DIM**-0.5).out
    assert (out - exact).norm() < 0.02 * exact.norm()
    assert made.dense()[0].dtype == dtype
