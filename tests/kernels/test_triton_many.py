"""Many queries over pages that are decoded for all of them at once. Run as test_triton_kernels.py is."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import HIDDEN, Part, attend
from kvcomp.cache.pool import PagePool
from kvcomp.kernels import dispatch, reference
from kvcomp.kernels.backends import using
from kvcomp.kernels.triton_backend import Triton
from kvcomp.stages import PageShape

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from kvcomp.kernels.triton import many  # noqa: E402

CASES = [  # every kind of chunk
    ("none", 64, torch.bfloat16),
    ("kivi(bits=2, group=16)", 64, torch.float16),
    ("kivi(bits=4, group=32)", 128, torch.bfloat16),
    ("int(bits=2)", 80, torch.float16),
    ("int(bits=3)", 96, torch.float16),
    ("int(bits=4, group=24)", 96, torch.bfloat16),
    ("int(bits=5, per=channel)", 64, torch.bfloat16),
    ("int8", 80, torch.bfloat16),
    ("turboquant(bits=4)", 64, torch.float16),
    ("klt(bits=2)", 64, torch.bfloat16),
    ("klt(k=3.5, v=5)", 128, torch.bfloat16),
    ("fp8", 64, torch.bfloat16),
    ("nvfp4", 64, torch.float16),
]
ROWS = 144
COUNTS = [3, 0, 2]


def in_pytorch(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None) -> Part:
    """As torch's kernel for GPUs, where there is none."""
    assert hidden is not None
    assert q.dtype == k.dtype == v.dtype == hidden.dtype != torch.float32
    return attend(q.float(), k.float(), v.float(), scale, key_bias=hidden.float())


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(many, "by_efficient", in_pytorch)


@pytest.mark.parametrize(
    ("spec", "dim", "dtype", "blocks"), [*((*case, 1) for case in CASES), *((*case, 2) for case in CASES[2:5:2])]
)
def test_many_queries_are_the_reference(
    spec: str, dim: int, dtype: torch.dtype, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    stack = Stack.parse(f"{spec} + window(recent=0)").plan(0, 1)
    size = stack.page_size
    codec, layout = stack.build(PageShape(size, dim, dim, 1, dtype, DEVICE, 0))
    pool = PagePool(layout, DEVICE)
    n, streams = sum(COUNTS), torch.zeros(sum(COUNTS), dtype=torch.int64, device=DEVICE)
    pool.data.fill_(255)  # what belongs to no stream
    owned = pool.allocate(n).to(DEVICE)
    k, v = (torch.randn(n, size, dim, device=DEVICE).to(dtype) for _ in range(2))
    codec.fit(streams[:1], k.flatten(0, 1)[None], v.flatten(0, 1)[None])
    pool.write(owned, codec.encode(k, v, streams))
    ids = torch.zeros(len(COUNTS), max(COUNTS), dtype=torch.int64, device=DEVICE)
    for row, (first, count) in enumerate(zip([0, 3, 3], COUNTS, strict=True)):
        ids[row, :count] = owned[first : first + count]
    counts = torch.tensor(COUNTS, device=DEVICE)
    if codec.kernel_layouts() is None or "klt" in spec:  # whose bases are of streams: one for all here
        ids, counts = ids[:1], counts[:1]
    queries = torch.randn(len(ids), ROWS, dim, device=DEVICE).to(dtype)
    monkeypatch.setattr(many, "TOKENS", len(ids) * size * (3 if blocks == 1 else 2))
    expected = reference.attend_pages(queries, pool.data, ids, counts, layout, codec, dim**-0.5)
    with using(Triton(anywhere=DEVICE.type == "cpu")):
        assert isinstance(dispatch.backends.able("attend", case_of(queries, codec, layout))[0], Triton)
        found = dispatch.attend_pages(queries, pool.data, ids, counts, layout, codec, dim**-0.5)
    error = (found.out - expected.out).norm() / expected.out.norm()
    assert error < 1e-2
    seen = expected.lse > -torch.inf
    assert torch.equal(seen, found.lse > -torch.inf)
    assert (found.lse - expected.lse)[seen].abs().max() < 2e-2
    assert (found.out[~seen] == 0).all()


def case_of(queries: Tensor, codec: object, layout: object) -> dispatch.Case:
    sides = codec.kernel_layouts()  # type: ignore[attr-defined]
    asked = queries.shape[1], queries.dtype, layout, codec.rotates, False, False  # type: ignore[attr-defined]
    return dispatch.Case(sides, queries.device, *asked)  # type: ignore[arg-type]


def test_hidden_tokens_weigh_nothing() -> None:
    assert torch.tensor(HIDDEN, dtype=torch.float16).isfinite()
    assert float(torch.tensor(HIDDEN / 2).exp()) == 0
