"""Whatever tensors the C operators are given, they read what those hold, or refuse them: never foreign memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import Part, Tokens
from kvcomp.cache.pool import PagePool
from kvcomp.errors import KvcompError
from kvcomp.kernels import cpu
from kvcomp.kernels.contract import PagesView
from kvcomp.kernels.cpu import encode, select
from kvcomp.layout import SUMMARY, PageLayout, Summary
from kvcomp.stages import Codec, PageShape

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="the C kernel is not installed: no compiler")

STREAMS, ROWS, DIM, PAGES, EACH = 3, 2, 64, 9, 2  # the pages of a stream: two
Given = dict[str, Tensor]


class Door(NamedTuple):
    """An operator: the tensors that it takes by name, and what it gives for them."""

    given: Given
    call: Callable[[Given], Any]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pool_of(spec: str, centred: bool = True) -> tuple[PagePool, PageLayout, Codec]:
    plan = Stack.parse(f"{spec} + window(recent=0)").plan(0, 1)
    shape = PageShape(plan.page_size, DIM, DIM, 1, torch.float32, torch.device("cpu"), 0, centred)
    codec, layout = plan.build(shape)
    pool, streams = PagePool(layout, torch.device("cpu")), torch.zeros(PAGES, dtype=torch.int64)
    k, v = (numbers(PAGES, plan.page_size, DIM, seed=seed) for seed in (1, 2))
    codec.fit(streams[:1], k.flatten(0, 1)[None], v.flatten(0, 1)[None])
    numbered = {f.name: numbers(PAGES, *f.shape, seed=3) for f in layout.fields if f.name.startswith(SUMMARY)}
    summaries = {f.name: (numbered[f.name] * 50).to(f.dtype) for f in layout.fields if f.name in numbered}
    pool.write(pool.allocate(PAGES), codec.encode(k, v, streams) | summaries)
    return pool, layout, codec


IDS = torch.tensor([[0, 5], [3, 1], [8, 2]], dtype=torch.int32)
COUNTS = torch.tensor([2, 1, 2])


def attend(spec: str) -> Door:
    pool, layout, codec = pool_of(spec)
    sides = codec.kernel_layouts()
    assert sides is not None
    given = {
        "queries": numbers(STREAMS, ROWS, DIM),
        "pool": pool.data,
        "ids": IDS,
        "counts": COUNTS,
        "keys": numbers(STREAMS, 5, DIM, seed=3),
        "values": numbers(STREAMS, 5, DIM, seed=4),
        "held": torch.tensor([5, 2, 4]),
        "bias": numbers(STREAMS, ROWS, seed=5),
        "token bias": numbers(STREAMS, ROWS, IDS.shape[1] * layout.page_size, seed=8),
        "prior.out": numbers(STREAMS, ROWS, DIM, seed=6),
        "prior.lse": numbers(STREAMS, ROWS, seed=7),
    }

    def call(x: Given) -> Any:
        pages = PagesView(x["pool"], x["ids"], x["counts"], layout, sides, False, x["token bias"])
        prior, tokens = Part(x["prior.out"], x["prior.lse"]), Tokens(x["keys"], x["values"], x["held"])
        return cpu.attend(x["queries"], pages, tokens, 0.125, None, x["bias"], prior, True)

    return Door(given, call)


def write(spec: str, single: bool = False) -> Door:
    pool, layout, codec = pool_of(spec, centred=not single)
    sides = codec.kernel_layouts()
    assert sides is not None
    tokens = 1 if single else layout.page_size
    made = codec.kernel_input(
        *(numbers(2, tokens, DIM, seed=seed) for seed in (8, 9)), torch.zeros(2, dtype=torch.int64)
    )
    assert made is not None
    given = {"pool": pool.data, "ids": torch.tensor([4, PAGES - 1]), "keys": made[0], "values": made[1]}
    if single:
        given["rows"] = torch.tensor([3, 0])

    def call(x: Given) -> Tensor:
        before = x["pool"].clone()
        encode.write(x["pool"], x["ids"], x["keys"], x["values"], sides, layout, x.get("rows"))
        after = x["pool"].clone()
        x["pool"].copy_(before)
        return after[:, : layout.bytes_per_page]

    return Door(given, call)


def append() -> Door:
    given = {
        "k": numbers(STREAMS, 6, DIM),
        "v": numbers(STREAMS, 6, 32, seed=1),
        "counts": torch.tensor([5, 2, 0]),
        "keys": numbers(1, STREAMS, 1, DIM, seed=2),
        "values": numbers(1, STREAMS, 1, 32, seed=3),
    }

    def call(x: Given) -> Any:
        k, v, counts = (x[name].clone() for name in ("k", "v", "counts"))
        kept = {**x, "k": k, "v": v, "counts": counts}  # clones keep strides
        if not select.append(*kept.values()):
            raise KvcompError("not done")
        return k, v, counts

    return Door(given, call)


def summaries(call: Callable[[Given, Summary], Any], spec: str, more: Given) -> Door:
    pool, layout, _ = pool_of(spec)
    given = {**more, "pool": pool.data, "ids": IDS, "counts": COUNTS}
    return Door(given, lambda x: call(x, Summary(layout, x["pool"], x["ids"], x["counts"])))


def vector_dots(spec: str) -> Door:
    _, layout, _ = pool_of(spec)
    names = tuple(f.name for f in layout.fields if f.name.startswith(SUMMARY) and "scale" not in f.name)
    scale = next((f.name for f in layout.fields if f.name.startswith(SUMMARY) and "scale" in f.name), None)

    def call(x: Given, summary: Summary) -> Tensor:
        dots = select.vector_dots(x["queries"], summary, names, scale)
        return dots.masked_fill(torch.arange(dots.shape[-1]) >= dots.shape[-1] // EACH * COUNTS[:, None, None], 0)

    return summaries(call, spec, {"queries": numbers(STREAMS, ROWS, DIM)})


def code_dots() -> Door:
    _, layout, _ = pool_of("sketch(pages=1, dense_layers=0) + int(bits=4)")
    codes = next(f for f in layout.fields if f.dtype == torch.uint8 and f.name.startswith(SUMMARY))
    more = {"queries": numbers(STREAMS, ROWS, codes.shape[0] * 2), "offset": numbers(STREAMS, ROWS, 1, seed=1)}

    def call(x: Given, summary: Summary) -> Tensor:
        dots = select.code_dots(x["queries"], x["offset"], summary, codes.name, 4)
        return dots.masked_fill(torch.arange(dots.shape[-1]) >= dots.shape[-1] // EACH * COUNTS[:, None, None], 0)

    return summaries(call, "sketch(pages=1, dense_layers=0) + int(bits=4)", more)


def shares() -> Door:
    given = {"logits": numbers(STREAMS, ROWS, 12), "counts": torch.tensor([12, 3, 0])}
    return Door(given, lambda x: select.shares(x["logits"].clone(), x["counts"]))


def choose() -> Door:
    given = {"logits": numbers(STREAMS, ROWS, 12), "counts": torch.tensor([6, 3, 5]), "wanted": torch.tensor([2, 2, 3])}

    def call(x: Given) -> Tensor:
        return select.choose(x["logits"].clone(), 0.5, x["counts"], 1, x["wanted"], 4, 6, (1, 1))

    return Door(given, call)


def largest() -> Door:
    given = {"x": numbers(STREAMS, 12), "wanted": torch.tensor([2, 0, 4])}
    return Door(given, lambda x: select.largest(x["x"], x["wanted"], 4))


def regroup() -> Door:
    pool, layout, _ = pool_of("int(bits=4)")
    size = layout.page_size
    tokens = torch.randint(0, EACH * size, (STREAMS, size), generator=torch.Generator().manual_seed(0))
    made = torch.zeros(STREAMS, layout.body_bytes, dtype=torch.uint8)

    def call(x: Given) -> Tensor:
        select.regroup(layout, x["pool"], x["ids"], x["tokens"], x["made"])
        return x["made"].clone()

    return Door({"pool": pool.data, "ids": IDS, "tokens": tokens, "made": made}, call)


def runs() -> Door:
    given = {"x": torch.arange(40), "starts": torch.tensor([[3, 0], [17, 30], [8, 9]])}
    return Door(given, lambda x: select.runs(x["x"], x["starts"], 5))


DOORS: dict[str, Callable[[], Door]] = {
    "attend, uniform": lambda: attend("int(bits=4)"),
    "attend, codebooks": lambda: attend("turboquant(bits=2)"),
    "attend, numbers": lambda: attend("none"),
    "write, uniform": lambda: write("int(bits=4)"),
    "write, codebooks": lambda: write("klt(bits=2)"),
    "write, numbers": lambda: write("none"),
    "write, tokens": lambda: write("int8", single=True),
    "append": append,
    "vector_dots, float16": lambda: vector_dots("quest(pages=1, dense_layers=0) + int(bits=4)"),
    "vector_dots, int8": lambda: vector_dots("quest(pages=1, dense_layers=0, summary_bits=8) + int(bits=4)"),
    "code_dots": code_dots,
    "shares": shares,
    "choose": choose,
    "largest": largest,
    "regroup": regroup,
    "runs": runs,
}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)},
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.int64, torch.int32, torch.int16)},
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in (torch.bool, torch.complex64, torch.float32)},
    "bytes as int8": lambda x: x.view(torch.int8) if x.dtype == torch.uint8 else x,
    "columns apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "rows apart": lambda x: torch.stack([x, x], 1)[:, 0],
    "transposed memory": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "at an odd place": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "on meta": lambda x: x.to("meta"),
    "a row less": lambda x: x[:-1],
    "a column less": lambda x: x[..., :-1],
    "one more dimension": lambda x: x[None],
    "one dimension less": lambda x: x[0],
    "requires grad": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
}
NAMES = [(door, name) for door, made in DOORS.items() for name in made().given] if cpu.library() is not None else []


def alike(found: Any, expected: Any, exact: bool) -> bool:
    if isinstance(expected, Tensor):
        tolerance = 0.0 if exact else 0.05
        return found.shape == expected.shape and torch.allclose(
            found.to(expected.dtype), expected, atol=tolerance, rtol=tolerance, equal_nan=True
        )
    return all(alike(f, e, exact) for f, e in zip(found, expected, strict=True))


FREE = {  # how many elements, columns or slots there are; and runs are of elements of any kind
    "a row less": {("runs", "x"), ("runs", "starts"), ("largest", "x")},
    "a column less": {("runs", "x"), ("runs", "starts"), ("largest", "x"), ("shares", "logits")},
    "one more dimension": {("runs", "starts")},
    "one dimension less": {("runs", "starts")},
    "torch.bool": {("runs", "x")},
    "torch.complex64": {("runs", "x")},
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # conversion to these rounds
SERVED = ("at an odd place", "requires grad")  # what no operator refuses


@pytest.mark.parametrize(("door", "name"), NAMES)
def test_a_tensor_is_read_as_what_it_is_or_refused(door: str, name: str) -> None:
    given, call = DOORS[door]()
    expected = call(dict(given))
    for change, made in CHANGES.items():
        changed = made(given[name])
        with nullcontext() if change in SERVED else suppress(KvcompError):
            found = call({**given, name: changed})
            if (door, name) in FREE.get(change, ()):
                continue
            if not (change == "one more dimension" and door.startswith("write") and name in ("keys", "values")):
                assert change not in FREE, "it took another shape, or bits for numbers"  # those are pages of one stream
            rounded = changed.dtype in FLOATS and changed.dtype != given[name].dtype
            if rounded and door.startswith("write"):  # another code, here and there
                assert (found != expected).float().mean() < 0.2, change
            else:
                assert alike(found, expected, exact=not rounded), change


@pytest.mark.parametrize("count", [-1, 10**6, -(2**62)])
@pytest.mark.parametrize(("door", "name"), [x for x in NAMES if x[1] in ("counts", "held", "wanted")])
def test_counts_of_more_than_there_is_are_refused(door: str, name: str, count: int) -> None:
    given, call = DOORS[door]()
    counts = given[name].clone()
    counts[1] = count
    with pytest.raises(KvcompError, match="counts, ids or places are below 0"):
        call({**given, name: counts})


def test_counts_of_ids_that_were_not_handed_are_refused() -> None:
    given, call = attend("int(bits=4)")
    few = {"token bias": given["token bias"][..., : given["token bias"].shape[2] // 2]}
    with pytest.raises(KvcompError, match="counts, ids or places are below 0"):
        call({**given, **few, "ids": torch.zeros(STREAMS, 9, dtype=torch.int32)[:, :1]})
