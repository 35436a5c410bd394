"""Estimates of tokens, pages made of chosen ones and votes, by the Triton kernels; and steps that read nothing on the
host. Run as test_triton_kernels.py is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import Tokens
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels import dispatch, select
from kvcomp.kernels.reference import received as reference
from kvcomp.kernels.triton_backend import Triton
from kvcomp.layout import SUMMARY, Field, PageLayout
from kvcomp.policies import kvzip
from kvcomp.sparse.ranked import RankedSelector
from kvcomp.stages import PageShape, Summaries

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from kvcomp.kernels import triton as kernels  # noqa: E402
from kvcomp.kernels.triton import ops, ops_records, ops_scores, plan  # noqa: E402


def by_triton() -> AbstractContextManager[None]:
    """Inside, the Triton kernels serve what they can, on any device."""
    return dispatch.using(Triton(anywhere=True))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are given to write to is full of nan, or of 0xFF."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        made = real(*args, **kwargs)
        return made if made.is_meta else made.fill_(torch.nan if made.is_floating_point() else 0xFF)

    monkeypatch.setattr(torch, "empty", empty)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert not bool(found.isnan().any())
    return float((found.cpu() - expected.cpu()).abs().max() / expected.abs().max().clamp_min(1e-6).cpu())


CODES = f"{SUMMARY}codes"


def coded(streams: int, rank: int, pages: int, size: int, bits: int) -> tuple[Tensor, Tensor, PageLayout]:
    """Pool, ids [S, n] in any order, and layout of pages with codes of tokens; page 0 is nobody's."""
    codes = Field(CODES, (rank * bits // 8, size), torch.uint8)
    layout = PageLayout(size, (Field("k", (size, 3), torch.uint8), codes))
    pool = torch.randint(0, 256, (9, layout.bytes_per_page), dtype=torch.uint8, device=DEVICE)
    ids = torch.randint(1, 9, (streams, pages + 1), dtype=torch.int32, device=DEVICE)[:, :pages]
    return pool, ids, layout


@pytest.mark.parametrize(
    ("streams", "heads", "rank", "pages", "size", "bits"),
    [
        (2, 3, 16, 5, 48, 4),
        (1, 8, 80, 3, 16, 8),
        (3, 1, 2, 9, 64, 8),
        (2, 4, 6, 3, 16, 4),
        (1, 24, 128, 2, 80, 4),
        (2, 1, 96, 1, 64, 8),
    ],
)
@pytest.mark.parametrize("size_of_q", [1.0, 1e4])
def test_code_dots(streams: int, heads: int, rank: int, pages: int, size: int, bits: int, size_of_q: float) -> None:
    torch.manual_seed(rank)
    pool, ids, layout = coded(streams, rank, pages, size, bits)
    counts = torch.tensor([pages, 1, 0][:streams], device=DEVICE)
    q = torch.randn(streams, heads, rank, device=DEVICE) * size_of_q
    codes = layout.gather(pool, ids, summary=True)[CODES]
    plain = codes.double() if bits == 8 else torch.cat([codes & 15, codes >> 4], 2).double()
    expected = torch.einsum("sjr,snrp->sjnp", q.double(), plain + 0.5 - 2 ** (bits - 1)).flatten(2)
    ids[torch.arange(pages, device=DEVICE) >= counts[:, None]] = 1 << 30  # never looked at
    seen = torch.arange(pages * size, device=DEVICE) < counts[:, None] * size
    found = kernels.code_dots(q, pool, ids, counts, layout, CODES, bits)
    assert error(found, expected.masked_fill(~seen[:, None], 0)) < 2e-6


def test_code_dots_of_spoilt_queries_are_spoilt() -> None:
    """What has no finite query must not look as if it had: `shares` leaves such heads out."""
    (pool, ids, layout), q = coded(1, 16, 1, 16, 4), torch.randn(1, 3, 16, device=DEVICE)
    q[0, 0, 3], q[0, 1, 5] = torch.nan, torch.inf
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)
    found = kernels.code_dots(q, pool, ids, one, layout, CODES, 4)[0].isfinite().sum(-1)
    assert found.tolist() == [0, 0, 16]


LAYOUTS = [
    (16, [("k", 40, torch.uint8), ("scale", 3, torch.float16), ("v", 5, torch.float32)]),
    (48, [("k.codes4", 64, torch.uint8), ("k.scale", 1, torch.float16), ("v", 7, torch.uint8)]),
    (64, [("k", 80, torch.bfloat16), ("v", 256, torch.float32)]),
]


@pytest.mark.parametrize(("size", "rows"), LAYOUTS)
@pytest.mark.parametrize("made", [1, 3])
def test_regroup(size: int, rows: list[tuple[str, int, torch.dtype]], made: int) -> None:
    torch.manual_seed(size)
    fields = tuple(Field(name, (size, n), dtype) for name, n, dtype in rows)
    layout = PageLayout(size, (*fields, Field(f"{SUMMARY}mean", (8,), torch.float16)))
    pool = torch.randint(0, 256, (9, layout.bytes_per_page), dtype=torch.uint8, device=DEVICE)
    ids = torch.randint(0, 9, (3, 8), dtype=torch.int32, device=DEVICE)[:, :5]
    tokens = torch.randint(0, 5 * size, (3, made * size), device=DEVICE)
    found = kernels.regroup(layout, pool, ids, tokens)
    expected = select.regroup(layout, pool.cpu(), ids.cpu(), tokens.cpu())
    assert found.shape == expected.shape == (3 * made, layout.body_bytes)
    for (name, a), b in zip(layout.views(found).items(), layout.views(expected).values(), strict=True):
        assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("batch", "heads", "group", "rows", "keys", "dim", "dtype"),
    [
        (2, 2, 3, 5, 77, 80, torch.float32),
        (1, 2, 4, 64, 300, 128, torch.bfloat16),
        (1, 1, 1, 130, 130, 64, torch.float16),
        (1, 1, 8, 1, 65, 256, torch.float32),
        (1, 1, 1, 33, 2100, 96, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_attention_received(
    batch: int, heads: int, group: int, rows: int, keys: int, dim: int, dtype: torch.dtype, hidden: bool
) -> None:
    """Keys that are hidden get nothing, and queries that see none give nothing."""
    torch.manual_seed(keys)
    q = torch.randn(batch, heads * group, rows, dim).to(dtype) * 2
    k = torch.randn(batch, heads, keys, dim).to(dtype)
    visible = (torch.rand(batch, heads, keys) < 0.5) if hidden else None
    if visible is not None:
        visible[0, 0, : keys - rows + 2] = rows == 1  # then the first queries of a head see none
    expected = reference.received(q, k, dim**-0.5, visible)
    on = None if visible is None else visible.to(DEVICE)
    found = kernels.attention_received(q.to(DEVICE), k.to(DEVICE), dim**-0.5, on)
    assert error(found, expected) < 2e-5
    total = found.sum(-1).cpu()  # each query gives 1
    torch.testing.assert_close(total[-1, -1], torch.tensor(float(rows)) if not hidden else expected[-1, -1].sum())


def test_far_apart_votes() -> None:
    """Weights that underflow but in one split: the others hold nothing to be summed with."""
    q, k = torch.randn(1, 1, 3, 64), torch.randn(1, 1, 2200, 64)
    k[0, 0, 2000] = 90 * q[0, 0, 0]
    found = kernels.attention_received(q.to(DEVICE), k.to(DEVICE), 1.0)
    assert error(found, reference.received(q, k, 1.0)) < 2e-5


@pytest.mark.parametrize(
    ("batch", "heads", "group", "rows", "keys", "dim", "dtype", "softcap"),
    [
        (2, 2, 3, 37, 77, 80, torch.float32, 2.0),
        (1, 2, 4, 64, 300, 128, torch.bfloat16, None),
        (1, 1, 1, 130, 130, 64, torch.float16, 15.0),
        (1, 1, 8, 1, 65, 256, torch.float32, None),
        (1, 1, 1, 5, 2100, 96, torch.bfloat16, None),
    ],
)
def test_the_most_attention_received(
    batch: int,
    heads: int,
    group: int,
    rows: int,
    keys: int,
    dim: int,
    dtype: torch.dtype,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of any query and any head of the group, in the attention matrix: in blocks, and by the kernel that the policy
    takes on a GPU."""
    torch.manual_seed(keys)
    q = torch.randn(batch, heads * group, rows, dim).to(dtype) * 2
    k = torch.randn(batch, heads, keys, dim).to(dtype)
    logits = q.double() @ k.double().repeat_interleave(group, 1).mT * dim**-0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    future = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    weights = logits.masked_fill(future, -torch.inf).softmax(-1).unflatten(1, (heads, group))
    expected = weights.amax((2, 3)).float()
    monkeypatch.setattr(reference, "BLOCK", batch * heads * group * keys * 7)
    assert error(kvzip.most_received(q, k, dim**-0.5, softcap), expected) < 1e-5
    called = []
    real = kernels.attention_received
    monkeypatch.setattr(kernels, "attention_received", lambda *args: called.append(args) or real(*args))
    with by_triton():
        assert error(kvzip.most_received(q.to(DEVICE), k.to(DEVICE), dim**-0.5, softcap), expected) < 2e-5
    assert len(called) == 1


@contextmanager
def nothing_read() -> Iterator[None]:
    """Refuses what waits for a device: numbers of a tensor on the host, and shapes that follow from them."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a number was read on the host")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, name, refuse)
        yield


CAPACITY = Stack.parse("int(bits=4) + quest(dense_layers=0) + window(recent=0)").plan(0, 1)


@pytest.fixture
def capacity() -> tuple[kernels.Pages, Tokens, Tensor]:
    """Pages of int(bits=4) in tables three times wider than needed, and queries."""
    torch.manual_seed(0)
    stack = CAPACITY
    codec, layout = stack.build(PageShape(stack.page_size, 64, 64, 1, torch.float32, DEVICE, 0))
    pool = torch.zeros(8, layout.bytes_per_page, dtype=torch.uint8, device=DEVICE)
    k, v = (torch.randn(7, stack.page_size, 64, device=DEVICE) for _ in range(2))
    sides = codec.kernel_layouts()
    assert sides is not None
    kernels.write(pool, torch.arange(7, device=DEVICE), k, v, kernels.written(sides, layout, DEVICE))
    for name, x in stack.selector.summarize(k, v).items():
        layout.views(pool, summary=True)[name][:7] = x
    pool[7] = 0xFF  # nan in every float: nobody's
    ids = torch.full((3, 20), 7, dtype=torch.int32, device=DEVICE)
    ids[:, :7] = torch.arange(7, device=DEVICE)
    counts = torch.tensor([7, 0, 3], device=DEVICE)
    tokens = Tokens(*(torch.randn(3, 9, 64, device=DEVICE) for _ in range(2)), torch.tensor([9, 2, 0], device=DEVICE))
    made = kernels.prepared(sides, layout, True, DEVICE)
    return kernels.Pages(pool, ids, counts, made), tokens, torch.randn(3, 4, 64, device=DEVICE)


@pytest.mark.parametrize("split", [2, 100])
def test_a_grid_for_the_capacity_serves_all_counts(capacity: tuple[kernels.Pages, Tokens, Tensor], split: int) -> None:
    """What is launched follows from shapes: counts change on the device, as a CUDA graph needs, and idle splits leave
    no trace, though the workspace is full of nan."""
    pages, tokens, q = capacity
    splits = -(-20 // split) + 1
    workspace = torch.empty(ops.workspace_size(3, 4, splits, 64), device=DEVICE)
    for counts in ([7, 0, 3], [1, 7, 0], [0, 0, 0]):
        pages.counts.copy_(torch.tensor(counts))
        workspace.fill_(torch.nan)
        with nothing_read():
            part = kernels.attend(q, pages, tokens, 0.125, lse_of_pages=True, pages_of_split=split, workspace=workspace)
        narrow = pages._replace(ids=pages.ids[:, : max(*counts, 1)])
        expected = kernels.attend(q, narrow, tokens, 0.125, lse_of_pages=True)
        torch.testing.assert_close(part[:2], expected[:2], rtol=1e-5, atol=1e-5)
        assert part.groups is not None
        assert expected.groups is not None
        shown = expected.groups.shape[-1]
        torch.testing.assert_close(part.groups[..., :shown], expected.groups, rtol=1e-5, atol=1e-5)
        assert bool((part.groups[..., shown:] == -torch.inf).all())


def test_a_step_reads_nothing_on_the_host(capacity: tuple[kernels.Pages, Tokens, Tensor]) -> None:
    pages, _, q = capacity
    layout, (pool, ids, of_codes) = pages.prepared.layout, coded(3, 16, 2, 64, 4)
    x = torch.randn(2, layout.page_size, 64, device=DEVICE)
    codec, _ = CAPACITY.build(PageShape(layout.page_size, 64, 64, 1, torch.float32, DEVICE, 0))
    sides = codec.kernel_layouts()
    assert sides is not None
    how = kernels.written(sides, layout, DEVICE)
    with nothing_read():
        kernels.vector_dots({f"{SUMMARY}max": q, f"{SUMMARY}min": -q}, *pages[:3], layout, f"{SUMMARY}scale")
        kernels.code_dots(q[..., :16], pool, ids, pages.counts, of_codes, CODES, 4)
        kernels.regroup(layout, pages.pool, pages.ids, torch.arange(64, device=DEVICE).expand(3, -1))
        kernels.attention_received(q[None], q[None], 0.1, q[None, ..., 0] > 0)
        kernels.attention_received(q[None], q[None], 0.1, None, 5.0, True)
        kernels.write(pages.pool, torch.tensor([7, 5], device=DEVICE), x, x, how)


class NotOnHost(Tensor):
    """A tensor that says it is not on the host; all that is made of it is plain."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cpu = False


@pytest.mark.parametrize("rule", ["pages=5, min_pages=2", "keep=0.5, min_pages=0", "keep=0.1, first=1", "tokens=64"])
@pytest.mark.parametrize("heads", ["own", "common"])
@pytest.mark.parametrize("by_tokens", [False, True])
def test_a_choice_reads_nothing_on_the_host(rule: str, heads: str, by_tokens: bool) -> None:
    """How many pages each stream reads follows from counts on the device."""
    selector = Stack.parse(f"none + quest({rule}, heads={heads})").selector
    assert isinstance(selector, RankedSelector)
    counts, unit = [13, 0, 3, 5], 16 if by_tokens else 1  # 3 and 5 halves: rounded to even numbers
    logits = torch.randn(4, 2, 13 * unit, device=DEVICE)
    on_device = torch.Tensor._make_subclass(NotOnHost, torch.tensor(counts, device=DEVICE))
    held = Summaries({"x": torch.zeros(4, 13)}, on_device, 2, 16, by_tokens)
    with dispatch.reference_only(), nothing_read():  # C kernels would serve logits on the host
        choice = selector.best(logits, 0.1, held)
    wanted = [unit * selector.reads(count, 16) for count in counts]
    assert choice.valid.tolist() == wanted
    assert choice.positions.shape == (4, max(wanted))
    for own, n, count in zip(choice.positions.tolist(), wanted, counts, strict=True):
        assert own[:n] == sorted(set(own[:n]))
        assert not n or own[n - 1] < count * unit


def test_operators_keep_their_promises(capacity: tuple[kernels.Pages, Tokens, Tensor]) -> None:
    pages, _, q = capacity
    fields, *sizes = ops_records.regrouped(pages.prepared.layout)
    chosen = torch.arange(64, device=DEVICE).repeat(3, 1)
    tests = ("test_schema", "test_faketensor")
    flat = [x for field in fields for x in field]
    for op, args in [
        (ops_scores.code_dots, (q[..., :16].contiguous(), *pages[:3], 32, 4, 64)),
        (ops_scores.vector_dots, (torch.stack([q, -q]), *pages[:3], [0, 128], 1, -1, 1)),
        (ops_records.regroup, (pages.pool, pages.ids, chosen, flat, *sizes)),
        (ops_scores.attention_received, (q[None], q[None], None, 0.1, 5.0, True, 1)),
        (ops_scores.attention_received, (q[None], q[None], q[None, ..., 0] > 0, 0.1, 0.0, False, 1)),
    ]:
        torch.library.opcheck(getattr(torch.ops.kvcomp, op.__name__).default, args, test_utils=tests)


def test_splits_of_keys() -> None:
    """No fewer than are worth a program, and enough programs for a chip."""
    assert plan.split_keys(32, 64, 131072, 132) == 131072 // 16
    assert plan.split_keys(32, 64, 500, 132) == 4 * plan.LEAST
    assert plan.split_keys(32, 131072, 131072, 132) == 131072


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a store on the host, with the kernels interpreted")
@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ("snapkv(budget=128) + int(bits=4) + sketch(tokens=32)", {"attention_received", "code_dots", "regroup"}),
        ("int(bits=4) + quest(pages=2)", {"vector_dots"}),
        ("kivi(bits=4) + nsa(pages=2, dense_layers=0)", {"vector_dots"}),
    ],
)
def test_a_store_chooses_and_votes_so(stages: str, names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The places that call these kernels on a GPU: a policy's votes, and what a selector of tokens reads."""
    torch.manual_seed(0)
    k, v = (torch.randn(1, 2, 150, 64) for _ in range(2))
    q, step = torch.randn(1, 6, 150, 64), torch.randn(1, 6, 1, 64)
    layer = Stack.parse(f"{stages} + window(recent=8, sinks=2)").plan(2, 3)

    def attended() -> Tensor:
        store = LayerStore(layer)
        store.start(k, v)
        store.write(k, v, None, q, 0.125)
        return store.attend(step, 0.125).out

    expected, called = attended(), []

    def counted(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: called.append(name) or real(*args)

    for name in ("code_dots", "vector_dots", "regroup", "attention_received"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    with by_triton():
        assert error(attended(), expected) < 1e-5
    assert set(called) == names
