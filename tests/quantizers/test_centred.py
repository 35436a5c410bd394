"""Keys with a large mean: what all tokens of a page share costs no precision, wherever it turns to."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import KvcompError, Stack
from kvcomp.attention import attend
from kvcomp.cache.fixed import FixedStore
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels.dispatch import attend_pages, reference_only
from kvcomp.kernels.select import regroup, token_bias
from kvcomp.ledger import storage_bytes
from kvcomp.quantizers.centred import centre
from kvcomp.stages.plan import read_parts

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
    "turboquant(bits=1, variant=prod)",
    "turboquant(bits=4, variant=prod)",
    "turboquant(bits=2.5, variant=prod)",
    "klt(bits=2)",
    "klt(bits=4)",
]
CENTRED = [spec for spec in SPECS if not spec.startswith(("kivi", "klt")) and spec != "int(bits=4, per=channel)"]
HEADS, DIM, TOKENS = 2, 64, 400
every = pytest.mark.parametrize("spec", SPECS)
centred = pytest.mark.parametrize("spec", CENTRED)


def tokens(
    size: float,
    rows: int = 1,
    n: int = TOKENS,
    channels: tuple[int, ...] = (30, 57),
    dims: tuple[int, int] = (DIM, DIM),
    group: int = 2,
    turn: float = 0.0,
) -> tuple[Tensor, ...]:
    """q [B, 2 G, n, Dk], k [B, 2, n, Dk] and v [B, 2, n, Dv].

    `size` is added to some channels of all keys, turned with channels D / 2 further on by `turn` from a token to the
    next, as rotary embeddings turn a bias.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (group * HEADS, dims[0]), (HEADS, dims[0]), (HEADS, dims[1])
    q, k, v = (torch.randn(rows, heads, n, dim, generator=generator) for heads, dim in shapes)
    angle = turn * torch.arange(n)[:, None]
    at = torch.tensor(channels)
    k[..., at] += size * angle.cos()
    k[..., (at + dims[0] // 2) % dims[0]] += size * angle.sin()
    return q, k, v


def store(spec: str, q: Tensor, k: Tensor, v: Tensor, centred: bool = True) -> LayerStore:
    made = LayerStore(Stack.parse(f"{spec} + {WINDOW}").plan(0, 1))
    made.start(k, v, centred)
    made.write(k, v, None, q, DIM**-0.5)
    return made


def error(spec: str, *given: Tensor, chunk: bool = False, centred: bool = True) -> float:
    """Of the attention output of a decode step, or of one with a pending chunk, relative to the exact one."""
    q, k, v = given
    query, seen, more = q[:, :, -1:], (k, v), None
    if chunk:
        more = k[:, :, :3], v[:, :, :3], None
        query = q[:, :, -3:]
        seen = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2)
    scale = k.shape[-1] ** -0.5
    out = store(spec, q, k, v, centred).attend(query, scale, chunk=more).out
    n, group = query.shape[2], q.shape[1] // HEADS
    visible = torch.ones(n, seen[0].shape[2], dtype=torch.bool).tril(seen[0].shape[2] - n)
    flat = query.reshape(HEADS, group, n, -1).flatten(1, 2), *(x[0] for x in seen)
    wanted = attend(*flat, scale, visible.repeat(group, 1).expand(HEADS, -1, -1)).out.reshape(out.shape)
    return float((out - wanted).norm() / wanted.norm())


@every
@pytest.mark.parametrize("chunk", [False, True])
def test_a_large_mean_costs_nothing(spec: str, chunk: bool) -> None:
    usual = error(spec, *tokens(0), chunk=chunk)
    for size in (30, 60, 100, -200):
        assert error(spec, *tokens(size), chunk=chunk) < 1.5 * usual


@every
def test_a_large_mean_may_turn(spec: str) -> None:
    """By as much as that of medium channels does over a long text, where a stream's mean is no page's."""
    usual = error(spec, *tokens(0, n=1100))
    for turn in (2e-4, 8e-4):
        for size in (30, 100):
            assert error(spec, *tokens(size, n=1100, turn=turn)) < 1.5 * usual


def test_it_is_the_centre_that_helps() -> None:
    """Without it, the same keys cost several times as much."""
    for spec in ("int(bits=4)", "int8", "turboquant(bits=4)"):
        given = tokens(100, n=1100, turn=8e-4)
        assert error(spec, *given, centred=False) > 4 * error(spec, *given)


@every
def test_any_channels_may_have_it(spec: str) -> None:
    usual = error(spec, *tokens(0))
    for channels in ((0,), tuple(range(0, DIM, 3)), tuple(range(DIM))):
        assert error(spec, *tokens(50, channels=channels)) < 1.5 * usual


ANCHORED = [
    "int(bits=8)",
    "int(bits=4)",
    "int(bits=2, basis=hadamard)",
    "int(bits=4, basis=random, group=16)",
    "int(bits=4, symmetric=true)",
    "int8",
    "fp8",
    "fp8(format=e5m2)",
    "mxfp4",
    "mxfp4(basis=random)",
    "nvfp4",
    "turboquant(bits=3)",
    "turboquant(bits=4)",
    "turboquant(bits=3.5)",
]
PAGE = 64


def key_errors(spec: str, k: Tensor) -> Tensor:
    """Squared errors [P] of the tokens of pages, of keys [B, H, n, D]."""
    with reference_only():
        back, _ = Stack.parse(spec).roundtrip(k, k)
    return (back - k).square().unflatten(2, (-1, PAGE)).mean((0, 1, 2, 4))


@pytest.mark.parametrize("spec", ANCHORED)
@pytest.mark.parametrize("size", [0.0, 30.0])
@pytest.mark.parametrize("first", [1.0, 3.0])
def test_the_first_token_of_a_page_is_exact(
    spec: str, size: float, first: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most heads look at the first token of a text. The others pay little for it, however large it is."""
    _, k, _ = tokens(size, n=6 * PAGE)
    k[:, :, ::PAGE] += (first - 1) * k[:, :, ::PAGE].sign()
    found = key_errors(spec, k)
    monkeypatch.setattr("kvcomp.quantizers.centred.anchored", lambda c, x, grid: c)
    usual = key_errors(spec, k)
    share = 0.02
    if spec.startswith(("turboquant", "int(bits=2", "nvfp4")):  # coded twice, it has another norm, or scale of the page
        share = 0.5 if spec == "turboquant(bits=3.5)" else 0.2  # three quarters of whose channels have three bits
    rounding = 4.0**-11 * (1 + size**2 / 16)  # of centres
    assert float(found[0]) < share * float(usual[0]) + rounding
    assert float(found[1:].mean()) < (1.02 + 2 * float(usual[0])) * float(usual[1:].mean()) + rounding


@pytest.mark.parametrize("spec", ANCHORED)
@pytest.mark.parametrize("loud", [1e2, 1e4, 1e15])
def test_a_loud_first_token_does_not_spoil_its_page(spec: str, loud: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVFP4 has a scale per page, which such a token spoils by itself."""
    _, k, _ = tokens(0, n=PAGE)
    usual = float(key_errors(spec, k)[1:].mean())
    k[:, :, 0] = loud * k[:, :, 0].sign()
    found = float(key_errors(spec, k)[1:].mean())
    monkeypatch.setattr("kvcomp.quantizers.centred.anchored", lambda c, x, grid: c)
    assert found < 4 * max(usual, float(key_errors(spec, k)[1:].mean()))


@pytest.mark.parametrize("spec", ["int(bits=4)", "int8", "turboquant(bits=4)", "fp8", "mxfp4"])
@pytest.mark.parametrize(
    ("dims", "group", "n"),
    [
        ((64, 64), 1, 101),
        ((80, 80), 3, 163),
        ((96, 64), 4, 164),
        ((128, 128), 8, 165),
        ((256, 256), 3, 300),
        ((576, 512), 8, 230),
    ],
)
def test_shapes_of_models(spec: str, dims: tuple[int, int], group: int, n: int) -> None:
    """Tokens after the last whole page wait in the window."""
    usual = error(spec, *tokens(0, n=n, dims=dims, group=group))
    assert error(spec, *tokens(80, n=n, dims=dims, group=group, turn=3e-4)) < 1.5 * usual


@centred
def test_kernels_and_reference_agree(spec: str) -> None:
    q, k, v = tokens(50, turn=1e-3)
    fast = store(spec, q, k, v).attend(q[:, :, -1:], 0.125)
    with reference_only():
        slow = store(spec, q, k, v).attend(q[:, :, -1:], 0.125)
    torch.testing.assert_close(fast.out, slow.out, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(fast.lse, slow.lse, atol=2e-3, rtol=2e-3)


@centred
def test_a_page_depends_on_its_tokens_alone(spec: str) -> None:
    """Whatever came before, or lies beside it, or was written together with it."""
    q, k, v = tokens(50, rows=2, turn=1e-3)
    whole = store(spec, q, k, v)
    if "." in spec:  # channels of a stream are ordered by its first tokens
        return
    for row in range(2):
        alone = store(spec, *(x[row : row + 1] for x in (q, k, v)))
        for ours, theirs in zip(alone.dense(), whole.dense(), strict=True):
            torch.testing.assert_close(ours[0], theirs[row])
    later = store(spec, *(torch.cat([x[:, :, :4], x[:, :, 68:]], 2) for x in (q, k, v)))  # without the first page
    at, n = 68, later.table.longest * 64
    for ours, theirs in zip(later.dense(), whole.dense(), strict=True):
        torch.testing.assert_close(ours[:, :, 4 : 4 + n], theirs[:, :, at : at + n])
    steps = store(spec, *(x[:, :, :300] for x in (q, k, v)))
    for t in range(300, TOKENS):
        steps.settle()
        steps.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    pages = 4 + 64 * steps.table.longest
    for ours, theirs in zip(steps.dense(), whole.dense(), strict=True):
        torch.testing.assert_close(ours[:, :, :pages], theirs[:, :, :pages])


@centred
def test_nothing_is_held_but_pages(spec: str) -> None:
    """Rows, forks, files and fixed stores need no more than the records."""
    q, k, v = tokens(50, rows=2)
    k[1] -= 120
    made = store(spec, q, k, v)
    before = made.dense()[0]
    fractional = "." in spec  # the orders of channels are a stream's
    assert bool(made.codec.state()) == bool(made.codec.adapted()) == fractional
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
    twin.write(k[:, :, :200] + 500, v[:, :, :200], None, q[:, :, :200], 0.1)
    assert torch.equal(twin.dense()[0][:, :, : TOKENS - 96], before[:, :, : TOKENS - 96])
    assert torch.equal(other.dense()[0], before)


@centred
def test_files_without_centres_are_read_as_they_were(spec: str) -> None:
    q, k, v = tokens(5)
    old = store(spec, q, k, v, centred=False)
    state = deepcopy(old.state())
    assert not any("centre" in field[0] for field in state["fields"])
    again = LayerStore(old.plan)
    again.restore(state, torch.device("cpu"))
    assert torch.equal(again.dense()[0], old.dense()[0])
    query = q[:, :, -1:]
    torch.testing.assert_close(again.attend(query, 0.1).out, old.attend(query, 0.1).out)
    for each in (old, again):
        each.write(k + 3, v, None, q, 0.1)  # and go on as they are
    assert torch.equal(again.dense()[0], old.dense()[0])


def test_files_with_a_mean_of_each_stream_are_refused() -> None:
    state = store("int(bits=4)", *tokens(5), centred=False).state()
    state["codec"] = {"k.centre.values": torch.zeros(2, DIM), "k.centre.settled": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(KvcompError, match="layer 0 was saved with one mean key a stream"):
        LayerStore(Stack.parse(f"int(bits=4) + {WINDOW}").plan(0, 1)).restore(state, torch.device("cpu"))


@centred
def test_centres_are_counted(spec: str) -> None:
    """Sixteen bits of each channel and page."""
    q, k, v = tokens(50, rows=3)
    made, plain = store(spec, q, k, v), store(spec, q, k, v, centred=False)
    assert made.layout.bytes_per_page == plain.layout.bytes_per_page + 2 * DIM
    assert made.layout.tokenwise == plain.layout.tokenwise
    orders = 2 * ("2.5" in spec or "3.5" in spec)
    assert storage_bytes(made.codec.adapted()) == 3 * HEADS * orders * (DIM * 2 + 1)
    made.attend(q[:, :, -1:], 0.1)
    assert made.read["pages"] == made.table.total * made.layout.body_bytes


SINGLE = ["int(bits=4)", "int(bits=4, basis=hadamard)", "turboquant(bits=4, variant=prod)", "fp8", "mxfp4"]


@pytest.mark.parametrize("spec", SINGLE)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("turn", [0.0, 1e-3])
@pytest.mark.parametrize("most", [5, 3])  # pages: of 80 tokens, more than there are pages, and of 48
def test_single_tokens_of_pages_with_centres(spec: str, reference: bool, turn: float, most: int) -> None:
    """A selector's tokens come from pages whose centres differ, and together make others."""
    q, k, v = tokens(60, n=1100, turn=turn)
    made = LayerStore(Stack.parse(f"{spec} + sketch(tokens=2000) + window(sinks=4, recent=32)").plan(0, 1))
    made.start(k, v)
    made.write(k, v, None, q, 0.125)
    assert made.records.by_tokens
    back = [x[0] for x in made.dense()]
    size, (ids, _), query = made.layout.page_size, made.table.held(), q[0, :, -1:].unflatten(0, (HEADS, 2))[:, :, 0]
    generator = torch.Generator().manual_seed(3)
    chosen = torch.stack(
        [torch.randperm(ids.shape[1] * size, generator=generator)[: most * size] for _ in range(HEADS)]
    )
    with reference_only() if reference else nullcontext():
        every = made.attend(q[:, :, -1:], 0.125).out
        bias = token_bias(query, made.codec, made.layout, made.pool.data, ids, chosen)
        pool = regroup(made.layout, made.pool.data, ids, chosen)
        where = torch.arange(len(pool), dtype=torch.int32).view(HEADS, -1), torch.tensor([most, most - 2])
        few = attend_pages(query, pool, *where, made.layout, made.codec, 0.125, token_bias=bias).out
    expected = attend(q[0, :, -1:], *(x.repeat_interleave(2, 0) for x in back), 0.125).out
    torch.testing.assert_close(every[0], expected, atol=1e-4, rtol=1e-4)
    assert made.read["pages"] == made.table.total * (made.layout.body_bytes + 2 * DIM)
    for head, n in enumerate((most, most - 2)):
        keys, values = (x[head, 4 + chosen[head, : n * size]][None] for x in back)
        expected = attend(query[head : head + 1], keys, values, 0.125).out
        torch.testing.assert_close(few[head : head + 1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("chosen", "centres"), [(32, 32), (2000, 66)])
def test_few_tokens_read_their_own_centres(chosen: int, centres: int) -> None:
    q, k, v = tokens(60, n=1100)
    plan = Stack.parse(f"int(bits=4) + sketch(tokens={chosen}) + window(sinks=4, recent=32)").plan(0, 1)
    made = LayerStore(plan)
    made.start(k, v)
    made.write(k[:, :, :-1], v[:, :, :-1], None, q, 0.125)
    made.append(k[:, :, -1:], v[:, :, -1:])
    made.attend(q[:, :, -1:], 0.125)
    assert made.table.longest == 66
    read = min(chosen, 66 * 16) // 16 * made.layout.body_bytes + centres * 2 * DIM
    assert made.read["pages"] == HEADS * read
    assert read_parts(plan, DIM, DIM, 1099, k.dtype)["pages"] == read


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 70),
    dim=st.sampled_from([1, 8, 33]),
    scale=st.sampled_from([0.01, 1.0, 1e4]),
)
@settings(deadline=None, max_examples=60)
def test_a_centre_is_a_mean(seed: int, size: int, dim: int, scale: float) -> None:
    """Of all tokens, less the least and greatest sums of four."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * (torch.randn(2, size, dim, generator=generator) + 3)
    found = centre(x)
    assert found.shape == (2, 1, dim)
    assert found.dtype == torch.float16
    exact = x.double().mean(1)
    if size % 4 == 0 and size > 8:
        parts = x.double().unflatten(1, (-1, 4)).sum(2).sort(1).values
        exact = parts[:, 1:-1].sum(1) / (size - 8)
    exact = exact.clamp(-65504, 65504)  # of float16
    torch.testing.assert_close(found[:, 0].double(), exact, rtol=2**-10, atol=1e-6)
    kinds = (x, x.half(), x.bfloat16())
    assert all(torch.equal(centre(y), centre(y.float())) for y in kinds)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e30, 3e38])
@pytest.mark.parametrize("page", [16, 32, 64])
def test_a_loud_token_does_not_move_the_centre(size: float, page: int) -> None:
    k = torch.randn(1, page, DIM, generator=torch.Generator().manual_seed(0)) + 5
    usual = centre(k).float()
    k[0, 7] = size
    k[0, 8, 3] = -size
    assert (centre(k).float() - usual).norm() < 0.1 * usual.norm()


def test_extreme_keys_have_finite_centres() -> None:
    extreme = [torch.full((1, 64, DIM), x) for x in (0.0, 3e38, -3e38)]
    extreme.append(torch.where(torch.arange(64)[:, None] % 2 == 0, *extreme[1:]))
    for x in extreme:
        assert centre(x).isfinite().all()
        assert (x - centre(x).float()).isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_the_dtypes_of_models(spec: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tokens(50))
    made = store(spec, q, k, v)
    out = made.attend(q[:, :, -1:], DIM**-0.5).out
    exact = store(spec, *(x.float() for x in (q, k, v))).attend(q[:, :, -1:].float(), DIM**-0.5).out
    assert (out - exact).norm() < 0.02 * exact.norm()
    assert made.dense()[0].dtype == dtype
