"""One layer's store against a list of tokens per row: same content, same attention, and bytes that are really there."""

from __future__ import annotations

import gc
import re
import types
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvcomp import KvcompError, KvcompWarning, Stack, UnsupportedError
from kvcomp.cache import layer as layer_module
from kvcomp.cache import reader
from kvcomp.cache.layer import LayerStore
from kvcomp.sparse.quest import Quest

DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 128), (192, 128), (96, 80)]


def make(spec: str) -> LayerStore:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KvcompWarning)
        return LayerStore(Stack.parse(spec).plan(0, 1))


def started(spec: str, rows: int = 1, heads: int = 1, dim: int = 32, dtype: torch.dtype = torch.float32) -> LayerStore:
    store, x = make(spec), torch.zeros(rows, heads, 1, dim, dtype=dtype)
    store.start(x, x)
    return store


# -- the model --------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """The plain cache: per row a list of columns, each a token's (k [H, Dk], v [H, Dv]) or None for padding."""

    columns: list[list[tuple[Tensor, Tensor] | None]]
    heads: int
    v_dim: int

    def tokens(self, row: int) -> list[tuple[Tensor, Tensor]]:
        return [c for c in self.columns[row] if c is not None]

    @property
    def length(self) -> int:
        return len(self.columns[0])

    def attend(
        self,
        q: Tensor,
        scale: float,
        softcap: float | None,
        chunk: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Dense attention in float64 of q [B, Hq, n, Dk], one row, head and query at a time."""
        out, lse = [], []
        for b, h, i in [(b, h, i) for b in range(q.shape[0]) for h in range(q.shape[1]) for i in range(q.shape[2])]:
            kv = h // (q.shape[1] // self.heads)
            keys = [k[kv] for k, _ in self.tokens(b)]
            values = [v[kv] for _, v in self.tokens(b)]
            if chunk is not None:
                seen = chunk[2].expand(q.shape[0], q.shape[2], -1)[b, i]
                keys += list(chunk[0][b, kv, seen])
                values += list(chunk[1][b, kv, seen])
            if not keys:
                out.append(torch.zeros(self.v_dim, dtype=torch.float64))
                lse.append(torch.tensor(-torch.inf, dtype=torch.float64))
                continue
            logits = torch.stack(keys).double() @ q[b, h, i].double() * scale
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            out.append(logits.softmax(0) @ torch.stack(values).double())
            lse.append(logits.logsumexp(0))
        shape = q.shape[:3]
        return torch.stack(out).float().view(*shape, -1), torch.stack(lse).float().view(shape)


def assert_attends(
    store: LayerStore,
    model: Rows,
    group: int,
    n: int = 1,
    softcap: float | None = None,
    chunk: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    q = torch.randn(len(model.columns), store.heads * group, n, store.k_dim)
    scale = store.k_dim**-0.5
    part = store.attend(q, scale, softcap, chunk)
    out, lse = model.attend(q, scale, softcap, chunk)
    assert part.out.shape == out.shape
    torch.testing.assert_close(part.out, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.lse, lse, rtol=1e-5, atol=1e-5)


def assert_holds(store: LayerStore, model: Rows) -> None:
    """The store holds the model's tokens, each in its place, and no padding."""
    rows, length = len(model.columns), model.length
    assert store.history.length == length
    assert store.history.counts.tolist() == [len(model.tokens(b)) for b in range(rows)]
    k, v = store.padded()
    expected_k = torch.zeros(rows, store.heads, length, store.k_dim)
    expected_v = torch.zeros(rows, store.heads, length, store.v_dim)
    for b, columns in enumerate(model.columns):
        for t, column in enumerate(columns):
            if column is not None:
                expected_k[b, :, t], expected_v[b, :, t] = column
    assert torch.equal(k, expected_k)
    assert torch.equal(v, expected_v)
    size, sinks = store.plan.page_size, store.plan.sinks
    for stream, pages in enumerate(store.table.counts.tolist()):
        real = len(model.tokens(stream // store.heads))
        assert pages <= max(real - sinks, 0) // size  # padding is in no page
        assert pages * size + int(store.exact.counts[stream]) == real
    used = store.pool.capacity - len(store.pool.free)
    assert used <= store.table.total


@st.composite
def operations(draw: st.DrawFn) -> list[tuple]:
    names = ["write", "write", "append", "append", "crop", "select", "attend"]
    return [(draw(st.sampled_from(names)), draw(st.integers(0, 2**31))) for _ in range(draw(st.integers(2, 8)))]


@given(
    operations=operations(),
    sinks=st.integers(0, 6),
    recent=st.sampled_from([0, 1, 7, 16, 40]),
    quest=st.booleans(),
    heads=st.integers(1, 2),
    rows=st.integers(1, 3),
    dims=st.sampled_from(DIMS),
    group=st.sampled_from([1, 3, 4, 8]),
    softcap=st.sampled_from([None, None, 3.0]),
)
@settings(deadline=None, max_examples=60)
def test_any_sequence_of_operations_leaves_what_a_list_would_hold(
    operations: list[tuple],
    sinks: int,
    recent: int,
    quest: bool,
    heads: int,
    rows: int,
    dims: tuple[int, int],
    group: int,
    softcap: float | None,
) -> None:
    # quest makes pages of 16; with more pages allowed than there are, it reads everything
    spec = f"window(sinks={sinks}, recent={recent})" + (" + quest(pages=999, dense_layers=0)" if quest else "")
    store, model = make(spec), Rows([[] for _ in range(rows)], heads, dims[1])
    store.start(torch.zeros(rows, heads, 1, dims[0]), torch.zeros(rows, heads, 1, dims[1]))
    for name, seed in operations:
        torch.manual_seed(seed)
        rows = len(model.columns)
        small = int(torch.randint(0, 2, ()))
        if name in ("write", "attend"):
            n = int(torch.randint(1, 6 if small else 110, ()))
            k, v = torch.randn(rows, heads, n, dims[0]), torch.randn(rows, heads, n, dims[1])
            valid = None if seed % 3 == 0 else torch.rand(rows, n) < float(torch.rand(()))
            if name == "attend":
                n = min(n, 4)  # queries: the last n columns of the chunk, causally, real keys only
                causal = torch.ones(n, k.shape[2], dtype=torch.bool).tril(k.shape[2] - n)
                visible = causal[None] if valid is None else causal & valid[:, None]
                assert_attends(store, model, group, n, softcap, (k, v, visible))
            else:
                store.write(k, v, valid)
                for b in range(rows):
                    real = [True] * n if valid is None else valid[b].tolist()
                    model.columns[b] += [(k[b, :, t], v[b, :, t]) if real[t] else None for t in range(n)]
        elif name == "append":
            for _ in range(int(torch.randint(1, 4 if small else 70, ()))):
                k, v = torch.randn(rows, heads, 1, dims[0]), torch.randn(rows, heads, 1, dims[1])
                store.append(k, v)
                for b in range(rows):
                    model.columns[b].append((k[b, :, 0], v[b, :, 0]))
                if small:
                    assert_attends(store, model, group, 1, softcap)
                store.settle()
        elif name == "crop":
            n = int(torch.randint(0, model.length + 1, ()))
            store.crop(n)
            model.columns = [columns[: len(columns) - n] for columns in model.columns]
        elif name == "select":
            chosen = torch.randint(0, rows, (int(torch.randint(1, 4, ())),))
            store.select_rows(chosen)
            model.columns = [list(model.columns[b]) for b in chosen.tolist()]
        assert_holds(store, model)
        if any(model.tokens(b) for b in range(len(model.columns))):
            assert_attends(store, model, group, int(torch.randint(1, 3, ())), softcap)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_attention_at_every_shape(dims: tuple[int, int], group: int) -> None:
    torch.manual_seed(0)
    store, model = make("window(sinks=2, recent=9) + quest(pages=999, dense_layers=0)"), Rows([[], []], 2, dims[1])
    k, v = torch.randn(2, 2, 70, dims[0]), torch.randn(2, 2, 70, dims[1])
    valid = torch.arange(70) >= torch.tensor([[0], [33]])
    store.start(k, v)
    store.write(k, v, valid)
    for b in range(2):
        model.columns[b] = [(k[b, :, t], v[b, :, t]) if valid[b, t] else None for t in range(70)]
    assert store.table.counts.unique().numel() == 2  # really ragged
    for softcap in (None, 2.0):
        assert_attends(store, model, group, 1, softcap)
        chunk = torch.randn(2, 2, 3, dims[0]), torch.randn(2, 2, 3, dims[1]), torch.ones(1, 3, 3).tril().bool()
        assert_attends(store, model, group, 3, softcap, chunk)


# -- crop -------------------------------------------------------------------------------------------------------------


def crop_or_refuse(store: LayerStore, tokens: int, message: str) -> int:
    """How many tokens went: all, or none and an error that says so."""
    try:
        store.crop(tokens)
    except UnsupportedError as error:
        refusal = str(error)
    else:
        return tokens
    assert re.search(message, refusal)
    return 0


@given(
    spec=st.sampled_from(["kivi", "int(bits=8, basis=hadamard)", "int + quest(dense_layers=0)"]),
    sinks=st.integers(0, 5),
    recent=st.integers(0, 60),
    tokens=st.integers(1, 200),
    appended=st.integers(0, 70),
    crop=st.integers(0, 80),
)
@settings(deadline=None, max_examples=40)
def test_a_crop_over_lossy_pages_is_exact_or_refused(
    spec: str, sinks: int, recent: int, tokens: int, appended: int, crop: int
) -> None:
    torch.manual_seed(tokens)
    store = started(f"{spec} + window(sinks={sinks}, recent={recent})", heads=2)
    k, v = torch.randn(2, 1, 2, tokens, 32).unbind()
    store.write(k, v, None)
    for _ in range(appended):
        store.append(*torch.randn(2, 1, 2, 1, 32).unbind())
        store.settle()
    before, crop = store.dense(), min(crop, tokens + appended)
    if crop <= recent:  # a promised window can always be cropped
        store.crop(crop)
    else:
        crop = crop_or_refuse(store, crop, rf"crop\({-crop}\).*window\(recent={crop}\)")
    after = store.dense()
    assert store.history.length == after[0].shape[2] == tokens + appended - crop
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a, b[:, :, : a.shape[2]])


@given(
    spec=st.sampled_from(
        ["streaming(sinks=3, recent=40)", "snapkv(budget=50, window=8)", "snapkv(keep=0.3, window=4)"]
    ),
    window=st.sampled_from(["", " + window(sinks=3, recent=20)"]),
    steps=st.lists(
        st.tuples(st.sampled_from(["write", "append", "crop", "crop"]), st.integers(1, 130)), min_size=3, max_size=8
    ),
)
@settings(deadline=None, max_examples=60)
def test_a_crop_past_evicted_tokens_is_exact_or_refused(spec: str, window: str, steps: list[tuple[str, int]]) -> None:
    """Every token carries its position as its value, so what is held can be read off."""
    torch.manual_seed(0)
    store, seen = started(spec + window, heads=3, dim=8), 0

    def held() -> list[list[int]]:
        return store.dense()[1][0, :, :, 0].long().tolist()  # heads evict different tokens

    for name, n in [("write", 90), *steps]:
        if name == "crop":
            before, n = held(), min(n if n % 3 == 0 else n // 6, seen)  # small ones mostly: they are often granted
            n = crop_or_refuse(store, n, rf"crop\({-n}\).*evicted")
            seen -= n
            gone = list(range(seen, seen + n))
            assert all(head[len(head) - n :] == gone for head in before)  # all that goes was there
            assert held() == [head[: len(head) - n] for head in before]
        else:
            for part in [n] if name == "write" else [1] * n:
                k = torch.randn(1, 3, part, 8)
                v = torch.arange(seen, seen + part).float()[:, None].expand(1, 3, -1, 8)
                if name == "write":
                    store.write(k, v, None, torch.randn(1, 6, part, 8), 0.3)
                else:
                    store.append(k, v)
                    store.settle()
                seen += part
        assert store.history.length == seen


@pytest.mark.parametrize("spec", ["snapkv(budget=50, window=8)", "streaming(recent=40)"])
def test_what_was_just_written_can_be_cropped(spec: str) -> None:
    torch.manual_seed(0)
    store = started(spec)
    x = torch.randn(1, 1, 200, 32)
    store.write(x, x, None, x, 1.0)
    for _ in range(30):
        store.append(x[:, :, :1], x[:, :, :1])
        store.settle()
    kept = store.kept.clone()
    store.crop(30)
    assert store.kept.tolist() == [int(kept) - 30]
    store.crop(8)  # SnapKV's own window and streaming's newest
    with pytest.raises(UnsupportedError, match=r"crop\(-150\)"):
        store.crop(150)


def test_a_row_that_holds_nothing_does_not_forbid_others_a_crop() -> None:
    """Streaming in a batch where one row is still all padding when pages of the other expire."""
    store = started("streaming(sinks=4, recent=16) + quest(dense_layers=0)", rows=2)
    x = torch.randn(2, 1, 40, 32)
    for _ in range(3):
        store.write(x, x, torch.tensor([[True], [False]]).expand(2, 40))
    store.crop(0)
    store.crop(5)
    assert store.history.counts.tolist() == [115, 0]
    assert store.kept[0] >= 4 + 16 - 5


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["none + window(recent=8)", "kivi", "int", "snapkv(keep=0.4, window=8) + kivi"])
def test_a_padded_row_is_the_same_as_alone(spec: str) -> None:
    torch.manual_seed(0)
    lengths, n = [200, 137, 64], 200
    k, v, q = torch.randn(3, 3, 2, n, 64).unbind()
    valid = torch.arange(n) >= torch.tensor([[n - length] for length in lengths])
    batch = make(spec)
    batch.start(k, v)
    batch.write(k, v, valid, q, 0.125)
    new = torch.randn(2, 3, 2, 1, 64)
    batch.append(*new.unbind())
    query = torch.randn(3, 4, 1, 64)
    together = batch.attend(query, 0.125)
    for b, length in enumerate(lengths):
        alone = make(spec)
        row = (slice(b, b + 1), slice(None), slice(n - length, None))
        alone.start(k[row], v[row])
        alone.write(k[row], v[row], None, q[row], 0.125)
        alone.append(new[0][b : b + 1], new[1][b : b + 1])
        torch.testing.assert_close(alone.attend(query[b : b + 1], 0.125).out[0], together.out[b], rtol=1e-5, atol=1e-5)
        assert alone.kept.tolist() == batch.kept.view(3, 2)[b].tolist()


def test_selected_rows_share_pages_until_they_part() -> None:
    torch.manual_seed(0)
    store = started("kivi + window(recent=0)", rows=2, heads=2)
    k, v = torch.randn(2, 2, 2, 320, 32).unbind()
    store.write(k, v, None)
    before = store.dense()
    store.select_rows(torch.tensor([1, 1, 1, 0]))
    assert store.pool.capacity - len(store.pool.free) == 2 * 2 * 10  # four rows, the pages of two
    for a, b in zip(store.dense(), before, strict=True):
        assert torch.equal(a, b[[1, 1, 1, 0]])
    new = torch.randn(2, 4, 2, 40, 32)
    store.write(new[0], new[1], None)
    assert torch.equal(store.dense()[0][:, :, :320], before[0][[1, 1, 1, 0]])
    store.select_rows(torch.tensor([3]))
    assert store.pool.capacity * 3 <= 4 * 2 * 11  # what only the others owned is given back, but for a quarter
    assert torch.equal(store.dense()[0][:, :, :320], before[0][:1])


# -- bytes held -------------------------------------------------------------------------------------------------------


def reachable(root: object) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object, by the garbage collector's own references; without what kernels
    remember of a layout, which all layers of the process share (`segments.memo`)."""
    stack, seen = [root], set()
    skip = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.FrameType)
    skip += (WeakKeyDictionary,)
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, skip):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        stack += gc.get_referents(item)


def storage_sizes(tensors: Iterator[Tensor]) -> int:
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


@pytest.mark.parametrize("tokens", [1, 100, 5000])
@pytest.mark.parametrize("prefill", [0.0, 0.6])
@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "kivi",
        "int(basis=hadamard)",
        "snapkv(keep=0.25) + kivi",
        "streaming(recent=300) + int + quest(dense_layers=0)",
        "quest(dense_layers=0) + kivi",
    ],
)
def test_held_bytes_are_the_live_storages(spec: str, prefill: float, tokens: int) -> None:
    torch.manual_seed(0)
    rows, heads, first = 2, 2, int(prefill * tokens)
    store = started(spec, rows, heads, 64, torch.bfloat16)
    if first:
        k, v, q = torch.randn(3, rows, heads, first, 64, dtype=torch.bfloat16).unbind()
        store.write(k, v, (torch.arange(first) >= torch.tensor([[0], [first // 7]])), q, 0.125)
        del k, v, q
    for _ in range(tokens - first):
        new = torch.randn(2, rows, heads, 1, 64, dtype=torch.bfloat16)
        store.append(new[0], new[1])
        store.settle()
    store.attend(torch.randn(rows, heads, 1, 64, dtype=torch.bfloat16), 0.125)
    seen: set[int] = set()
    parts = store.held(seen)
    assert sum(parts.values()) == storage_sizes(reachable(store))
    assert all(value >= 0 for value in parts.values())
    assert sum(store.held(set()).values()) == sum(parts.values())
    if tokens == 5000:
        assert parts["slack"] < 0.08 * (parts["pages"] + parts["summaries"]) or "streaming" in spec
    assert store.dense_bytes == int(store.history.counts.sum()) * heads * 2 * 64 * 2


def test_bytes_held_are_counted_once_over_layers_and_rows() -> None:
    a, b = (started("int(basis=hadamard)", dim=64) for _ in range(2))
    x = torch.randn(1, 1, 1, 64)
    a.append(x, x)
    b.append(x, x)
    seen: set[int] = set()
    first, second = a.held(seen), b.held(seen)
    assert first["constants"] == 64 * 64 * 4
    assert second["constants"] == 0  # all layers share the matrix
    assert second["window"] == first["window"] > 0
    assert LayerStore(a.plan).held(seen) == {}
    assert LayerStore(a.plan).dense_bytes == 0


def test_memory_goes_back_when_tokens_do() -> None:
    store = started("none", dim=64)
    x = torch.randn(1, 1, 6400, 64)
    store.write(x, x, None)
    full = sum(store.held(set()).values())
    store.crop(6000)
    assert sum(store.held(set()).values()) < 0.15 * full


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that operations create."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.bytes += t.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("spec", ["none", "kivi", "quest(dense_layers=0) + kivi", "streaming(recent=512) + int"])
def test_a_step_never_copies_the_whole_cache(spec: str) -> None:
    """Appending costs a constant number of allocated bytes a token, however long the cache is."""

    def cost(prefilled: int, steps: int = 512) -> tuple[int, int, int]:
        store = started(spec, heads=2, dim=64)
        x = torch.randn(1, 2, prefilled, 64)
        store.write(x, x, None)
        moved, largest, counted = 0, [], Allocations()
        for _ in range(steps):
            pool, before = store.pool.data.data_ptr(), counted.bytes
            with counted:
                store.append(x[:, :, :1], x[:, :, :1])
                store.settle()
            moved += store.pool.data.data_ptr() != pool
            largest.append(counted.bytes - before)
        return moved, counted.bytes, sorted(largest)[len(largest) // 2]

    short, long = cost(1000), cost(16000)
    assert long[0] <= short[0] <= 512 // 16
    token = 2 * 2 * 64 * 4
    assert long[2] <= 2 * token  # an ordinary step
    assert long[1] < 512 * 40 * token  # all steps, growth included: copying the cache would take 512 * 16000 tokens
    assert long[1] < 5 * short[1] + (1 << 20)


# -- bytes read -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "kivi",
        "int(bits=8) + window(sinks=5, recent=33)",
        "quest(pages=4, dense_layers=0) + kivi",
        "quest(pages=4, dense_layers=0)",
        "snapkv(keep=0.3, window=8) + int + quest(pages=2, dense_layers=0)",
    ],
)
@pytest.mark.parametrize("tokens", [3, 90, 700])
def test_read_is_what_attention_was_handed(spec: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, heads, dim = 2, 2, 64
    store = started(spec, rows, heads, dim, torch.bfloat16)
    k, v, q = torch.randn(3, rows, heads, tokens, dim, dtype=torch.bfloat16).unbind()
    store.write(k, v, torch.arange(tokens) >= torch.tensor([[0], [tokens // 2]]), q, 0.125)
    handed: dict[str, int] = {"pages": 0, "summaries": 0, "exact": 0}
    pages, chosen, exact, exact_tokens, select = (
        reader.attend_pages,
        reader.attend_chosen,
        layer_module.attend,
        reader.attend_tokens,
        Quest.select,
    )

    def count_pages(ids, counts, codec, tokens):
        # every field of these stacks is a multiple of 16 bytes, so nothing is added for alignment
        page = sum(prod(f.shape) * f.dtype.itemsize for f in codec.fields)
        for row, count in zip(ids, counts.tolist(), strict=True):
            assert len(set(row[:count].tolist())) == count  # no page twice
            handed["pages"] += count * page
        handed["exact"] += 0 if tokens is None else tokens.nbytes

    def watched_pages(queries, pool, ids, counts, layout, codec, scale, softcap, lse, tokens, *rest, **options):
        count_pages(ids, counts, codec, tokens)
        return pages(queries, pool, ids, counts, layout, codec, scale, softcap, lse, tokens, *rest, **options)

    def watched_chosen(queries, pool, ids, places, valid, layout, codec, scale, softcap, lse, tokens, **options):
        assert not options["by_tokens"]
        count_pages(ids.gather(1, places), valid, codec, tokens)
        return chosen(queries, pool, ids, places, valid, layout, codec, scale, softcap, lse, tokens, **options)

    def watched_exact(queries, keys, values, *rest):
        handed["exact"] += keys.nbytes + values.nbytes
        return exact(queries, keys, values, *rest)

    def watched_tokens(queries, tokens, *rest, **options):
        handed["exact"] += tokens.nbytes
        return exact_tokens(queries, tokens, *rest, **options)

    def watched_select(self, queries, scale, held):
        page = sum(t[0, 0].nbytes for t in held.fields.values())
        handed["summaries"] += int(held.counts.sum()) * page
        return select(self, queries, scale, held)

    monkeypatch.setattr(reader, "attend_pages", watched_pages)
    monkeypatch.setattr(reader, "attend_chosen", watched_chosen)
    monkeypatch.setattr(layer_module, "attend", watched_exact)  # chunks that are not written yet
    monkeypatch.setattr(reader, "attend_tokens", watched_tokens)
    monkeypatch.setattr(Quest, "select", watched_select)
    store.attend(torch.randn(rows, 2 * heads, 1, dim, dtype=torch.bfloat16), 0.125)
    read = store.read
    assert read.get("pages", 0) == handed["pages"]
    assert read.get("summaries", 0) == handed["summaries"]
    assert read.get("sinks", 0) + read.get("window", 0) == handed["exact"]
    assert read.get("table", 0) == 4 * rows * heads * int(store.table.counts.max())
    real = tokens + tokens - tokens // 2
    assert store.dense_read == real * heads * 2 * dim * 2

    chunk = torch.randn(2, rows, heads, 3, dim, dtype=torch.bfloat16)
    handed.update(pages=0, summaries=0, exact=0)
    query = torch.randn(rows, 2 * heads, 3, dim, dtype=torch.bfloat16)
    store.attend(query, 0.125, None, (chunk[0], chunk[1], torch.ones(1, 3, 3).tril().bool()))
    assert handed["summaries"] == 0  # several queries read every page
    assert store.read.get("summaries", 0) == 0
    assert store.read.get("pages", 0) == handed["pages"]
    assert sum(store.read.get(name, 0) for name in ("sinks", "window", "chunk")) == handed["exact"]


def test_reading_less_reads_less() -> None:
    torch.manual_seed(0)
    x, q = torch.randn(1, 1, 2000, 64), torch.randn(1, 2, 1, 64)
    read = {}
    for spec in ("none", "kivi", "quest(pages=8, dense_layers=0)", "quest(pages=8, dense_layers=0) + kivi"):
        store = started(spec, dim=64)
        store.write(x, x, None)
        store.attend(q, 0.125)
        read[spec] = sum(store.read.values())
        assert store.dense_read == 2000 * 2 * 64 * 4
    dense, *less = read.values()
    assert dense >= 2000 * 2 * 64 * 4
    assert all(value < 0.4 * dense for value in less)


# -- set-up -----------------------------------------------------------------------------------------------------------


def test_a_policy_that_needs_queries_says_so_when_there_are_none() -> None:
    store = started("snapkv")
    with pytest.raises(UnsupportedError, match=r"snapkv.*queries="):
        store.write(torch.randn(1, 1, 9, 32), torch.randn(1, 1, 9, 32), None)


def test_uneven_streams_are_not_stacked_and_evicted_ones_not_padded() -> None:
    store = started("none", rows=2)
    x = torch.randn(2, 1, 9, 32)
    store.write(x, x, torch.tensor([[True] * 9, [False] * 4 + [True] * 5]))
    with pytest.raises(UnsupportedError, match="5 to 9"):
        store.dense()
    store = started("streaming(recent=5, sinks=0)", rows=2)
    store.write(x, x, None)
    with pytest.raises(UnsupportedError, match="evicted"):
        store.padded()


def test_a_copy_lives_its_own_life() -> None:
    torch.manual_seed(0)
    store = started("kivi + window(recent=16)")
    x = torch.randn(1, 1, 300, 32)
    store.write(x, x, None)
    copy, before = deepcopy(store), store.dense()[0]
    copy.write(x, x, None)
    copy.crop(5)
    assert torch.equal(store.dense()[0], before)
    assert store.history.length == 300
    assert copy.history.length == 595


def test_a_crop_of_more_than_there_is() -> None:
    store = started("none", dim=64)
    x = torch.randn(1, 1, 10, 64)
    store.write(x, x, None)
    with pytest.raises(KvcompError, match="holds 10 tokens"):
        store.crop(11)
