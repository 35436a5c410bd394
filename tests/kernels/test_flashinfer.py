"""FlashInfer over our pages, and as a peer of `kvcomp speed`: against a stand-in that has its documented interface."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.benchmarks import peers, speed
from kvcomp.cache.pool import PagePool
from kvcomp.errors import KvcompWarning
from kvcomp.kernels import backends, dispatch, flashinfer, reference
from kvcomp.kernels.cpu.backend import C
from kvcomp.kernels.triton_backend import Triton
from kvcomp.layout import PageLayout
from kvcomp.segments import KVLayout
from kvcomp.stages import Codec, PageShape
from kvcomp.stages.stack import Stack

CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)  # that both 0.5 and 0.7 compile
HALF = torch.bfloat16
NEAR = {"rtol": 1e-2, "atol": 4e-3}  # outputs are rounded to 16 bits


class Wrapper:
    """`flashinfer.BatchDecodeWithPagedKVCacheWrapper` in PyTorch, as strict as its documentation and its kernels."""

    plans = 0

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str, use_tensor_cores: bool = False, backend: str = "auto"
    ) -> None:
        assert kv_layout in ("NHD", "HND")
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.numel() == 128 << 20
        assert int(float_workspace_buffer[:4096].max()) == 0
        self.nhd, self.tensor_cores, self.backend = kv_layout == "NHD", use_tensor_cores, backend

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert indptr[0] == 0
        assert indptr[-1] == len(indices)
        assert len(indptr) == len(last_page_len) + 1
        assert bool((indptr.diff() > 0).all())
        assert bool(((last_page_len >= 1) & (last_page_len <= page_size)).all())
        assert head_dim in (64, 128, 256)
        assert num_qo_heads % num_kv_heads == 0
        assert self.tensor_cores or num_qo_heads // num_kv_heads in CUDA_CORE_GROUPS
        self.rows = [indices[a:b].long() for a, b in pairwise(indptr)]  # copied, as to the device
        self.lengths = ((indptr.diff() - 1) * page_size + last_page_len).tolist()
        self.heads, self.page = (num_qo_heads, num_kv_heads, head_dim), page_size
        self.cap, self.scale = logits_soft_cap or 0.0, head_dim**-0.5 if sm_scale is None else sm_scale
        self.dtypes = q_data_type, q_data_type if kv_data_type is None else kv_data_type
        Wrapper.plans += 1

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], return_lse: bool = False) -> Any:
        k, v = paged_kv_cache
        query_heads, heads, dim = self.heads
        assert k.stride() == v.stride()  # it knows those of K only
        assert k.stride(-1) == 1
        assert all((x.storage_offset() * x.itemsize) % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 for x in (k, v))
        assert (q.dtype, k.dtype) == self.dtypes
        assert q.shape == (len(self.rows), query_heads, dim)
        assert k.shape[1:] == v.shape[1:]
        assert k.shape[1:] == ((self.page, heads, dim) if self.nhd else (heads, self.page, dim))
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        for i, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
            keys, values = (
                (x[row] if self.nhd else x[row].transpose(1, 2)).flatten(0, 1)[:length].double() for x in (k, v)
            )  # [tokens, heads, D]
            grouped = q[i].double().unflatten(0, (heads, -1))
            logits = torch.einsum("hgd,nhd->hgn", grouped, keys) * self.scale
            logits = self.cap * torch.tanh(logits / self.cap) if self.cap else logits
            out[i] = torch.einsum("hgn,nhd->hgd", logits.softmax(-1), values).flatten(0, 1).to(q.dtype)
            lse[i] = logits.logsumexp(-1).flatten() / math.log(2)
        return (out, lse) if return_lse else out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Wrapper]]:
    module = ModuleType("flashinfer")
    module.__spec__ = ModuleSpec("flashinfer", None)
    module.BatchDecodeWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer, "_failure", None)
    monkeypatch.setattr(Wrapper, "plans", 0)
    flashinfer.installed.cache_clear()
    flashinfer._workspace.cache_clear()
    yield Wrapper
    flashinfer.installed.cache_clear()
    flashinfer._workspace.cache_clear()


def built(spec: str, dims: tuple[int, int], dtype: torch.dtype) -> tuple[Codec, PageLayout, KVLayout]:
    plan = Stack.parse(f"{spec} + window(recent=0)").plan(0, 1)
    codec, layout = plan.build(PageShape(plan.page_size, *dims, 1, dtype, torch.device("cpu"), 0))
    sides = codec.kernel_layouts()
    assert sides is not None
    return codec, layout, sides


class Case:
    """Streams with so many pages, out of order in a pool whose other pages are NaN, the padding of the table too."""

    def __init__(self, counts: list[int], rows: int, dim: int, dtype: torch.dtype = HALF, spec: str = "none") -> None:
        torch.manual_seed(rows * dim + len(counts))
        self.codec, self.layout, self.sides = built(spec, (dim, dim), dtype)
        pages, size = sum(counts) + 3, self.layout.page_size
        self.records = PagePool(self.layout, torch.device("cpu"))
        every = self.records.allocate(pages)
        k, v = torch.randn(2, pages, size, dim).to(dtype)
        fields = self.codec.encode(k, v, torch.zeros(pages, dtype=torch.int64))
        views = {f.name: torch.zeros(pages, *f.shape, dtype=f.dtype) for f in self.layout.fields}
        self.records.write(every, views | fields)
        order = torch.randperm(pages - 1) + 1
        self.ids = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
        self.counts, at = torch.tensor(counts), 0
        for s, count in enumerate(counts):
            self.ids[s, :count] = order[at : at + count]
            at += count
        self.records.data[torch.cat([order[at:], torch.zeros(1, dtype=torch.int64)])] = 0xFF
        self.q = torch.randn(len(counts), rows, dim).to(dtype)

    @property
    def pages(self) -> tuple[Tensor, Tensor, Tensor, PageLayout]:
        return self.records.data, self.ids, self.counts, self.layout

    def attend(self, scale: float = 0.2, softcap: float | None = None) -> Part | None:
        return flashinfer.attend(self.q, *self.pages, self.sides, scale, softcap)

    def right(self, scale: float = 0.2, softcap: float | None = None) -> Part:
        return reference.attend_pages(self.q, *self.pages, self.codec, scale, softcap)


def same(found: Part | None, right: Part) -> None:
    assert found is not None
    assert found.out.dtype == found.lse.dtype == torch.float32
    torch.testing.assert_close(found.out, right.out, **NEAR)
    torch.testing.assert_close(found.lse, right.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, HALF])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [1, 3, 4, 8])
@pytest.mark.parametrize(("counts", "softcap"), [([3], None), ([2, 0, 5, 1], None), ([4, 4], 1.5), ([0, 0, 1], None)])
def test_pages_are_read_where_they_lie(
    stand_in: type[Wrapper], counts: list[int], softcap: float | None, rows: int, dim: int, dtype: torch.dtype
) -> None:
    case = Case(counts, rows, dim, dtype)
    assert flashinfer.obstacle(case.sides, case.codec.rotates, rows, dtype) is None
    assert case.attend(softcap=softcap) is None  # a table that is read for the first time
    same(case.attend(softcap=softcap), case.right(softcap=softcap))
    assert stand_in.plans == 1


def test_summaries_behind_the_numbers_are_passed_over(stand_in: type[Wrapper]) -> None:
    case = Case([2, 3], 4, 64, spec="none + quest(dense_layers=0)")
    assert case.layout.summary_bytes
    case.attend()
    same(case.attend(), case.right())


def test_a_plan_holds_until_the_table_changes(stand_in: type[Wrapper]) -> None:
    case = Case([2, 3], 4, 64)
    case.attend()
    for _ in range(3):
        same(case.attend(), case.right())
    assert stand_in.plans == 1
    same(case.attend(scale=0.3), case.right(scale=0.3))  # other steps over it have plans of their own
    case.q = case.q.repeat(1, 2, 1)
    same(case.attend(), case.right())
    assert stand_in.plans == 3
    case.counts[1] = 1  # in place
    assert case.attend() is None
    same(case.attend(), case.right())
    case.ids = case.ids.flip(0).clone()
    case.counts = case.counts.flip(0)
    assert case.attend() is None
    same(case.attend(), case.right())
    case.counts = torch.tensor([1, 1])  # new counts of the same ids
    assert case.attend() is None
    same(case.attend(), case.right())
    assert stand_in.plans == 6


def test_plans_go_with_their_tables(stand_in: type[Wrapper]) -> None:
    before = len(flashinfer._TABLES)
    case = Case([2], 1, 64)
    case.attend(), case.attend()
    assert len(flashinfer._TABLES) == before + 1
    del case
    assert len(flashinfer._TABLES) == before


def test_pages_may_move_to_a_larger_pool(stand_in: type[Wrapper]) -> None:
    case = Case([2, 3], 2, 64)
    case.attend(), case.attend()
    case.records.allocate(9)
    same(case.attend(), case.right())
    assert stand_in.plans == 1


def test_tables_that_do_not_tell_when_they_change_get_no_plan(
    stand_in: type[Wrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        case = Case([2, 3], 4, 64)
        assert all(case.attend() is None for _ in range(3))
    assert flashinfer.obstacle(case.sides, False, 4) is None  # others do
    case = Case([2, 3], 4, 64)
    case.attend()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert case.attend() is None
    assert stand_in.plans == 0


@pytest.mark.parametrize(
    ("spec", "dims", "dtype", "rows", "asked", "words"),
    [
        ("kivi", (64, 64), HALF, 4, HALF, "K is not stored as numbers"),
        ("fp8", (64, 64), HALF, 4, HALF, "K has one a block"),
        ("none", (80, 80), HALF, 4, HALF, "80 and V 80"),
        ("none", (128, 64), HALF, 4, HALF, "128 and V 64"),
        ("none", (64, 64), torch.float32, 4, torch.float32, "one dtype of 16 bits"),
        ("none", (64, 64), HALF, 4, torch.float16, "queries in torch.float16"),
        ("none", (64, 64), HALF, 17, HALF, "17 queries"),
    ],
)
def test_what_it_cannot_read(
    stand_in: type[Wrapper],
    spec: str,
    dims: tuple[int, int],
    dtype: torch.dtype,
    rows: int,
    asked: torch.dtype,
    words: str,
) -> None:
    codec, _, sides = built(spec, dims, dtype)
    assert words in (flashinfer.obstacle(sides, codec.rotates, rows, asked) or "")


def test_rotated_pages_and_where_it_is_not_installed(stand_in: type[Wrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, sides = built("none", (64, 64), HALF)
    assert flashinfer.obstacle(sides, False, 4) is None
    assert "another basis" in (flashinfer.obstacle(sides, True, 4) or "")
    flashinfer.installed.cache_clear()
    monkeypatch.setattr(flashinfer, "find_spec", lambda _: None)
    assert flashinfer.obstacle(sides, False, 4) == "flashinfer is not installed"


def test_one_that_cannot_compile_is_told_once_and_left_alone(
    stand_in: type[Wrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: object, **__: object) -> None:
        raise RuntimeError("Could not find nvcc")

    monkeypatch.setattr(Wrapper, "plan", plan)
    case = Case([2, 3], 4, 64)
    case.attend()
    with pytest.warns(KvcompWarning, match="Could not find nvcc"):
        assert case.attend() is None
    assert flashinfer.obstacle(case.sides, False, 4) == "it failed: Could not find nvcc"


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; all that is made of it is plain."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True
    device = torch.device("cuda")  # type: ignore[assignment]


class ByTriton(Triton):
    """The specification in the place of kernels that need a GPU; `groups` tell that it was asked."""

    def obstacle(self, operation: str, case: Any) -> None:
        return None

    def joins(self, *_: Any) -> bool:
        return False

    def attend(self, *args: Any) -> Part:
        return backends.REFERENCE.attend(*args)._replace(groups=torch.zeros(1))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    with dispatch.using(flashinfer.FlashInfer(), ByTriton(), C()):
        yield


def dispatched(case: Case, pool: Tensor, **how: Any) -> Part:
    return dispatch.attend_pages(case.q, pool, case.ids, case.counts, case.layout, case.codec, 0.2, **how)


@pytest.mark.usefixtures("gpu")
def test_it_is_chosen_on_gpus_alone(stand_in: type[Wrapper]) -> None:
    case = Case([2, 0, 3], 4, 64)
    pool = torch.Tensor._make_subclass(OnGpu, case.records.data)
    for _ in range(3):
        dispatched(case, case.records.data)
    assert stand_in.plans == 0
    assert dispatched(case, pool).groups is not None  # by Triton
    found = dispatched(case, pool)
    assert found.groups is None
    same(found, case.right())
    assert dispatched(case, pool, lse_of_pages=True).groups is not None
    held = torch.tensor([3, 1, 5])
    tokens = Tokens(torch.randn(3, 6, 64).to(HALF), torch.randn(3, 6, 64).to(HALF), held)
    same(
        dispatched(case, pool, tokens=tokens),
        reference_with(case, tokens),
    )
    case = Case([2, 3], 4, 64, spec="kivi(bits=4)")
    pool = torch.Tensor._make_subclass(OnGpu, case.records.data)
    assert all(dispatched(case, pool).groups is not None for _ in range(3))
    assert stand_in.plans == 1


def reference_with(case: Case, tokens: Tokens) -> Part:
    with dispatch.reference_only():
        return dispatched(case, case.records.data, tokens=tokens)


@pytest.mark.usefixtures("gpu")
def test_which_kernel_is_told_and_why(stand_in: type[Wrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    codec, layout, _ = built("none", (64, 64), HALF)
    assert dispatch.explain(codec, layout, device) == f"{flashinfer.WHERE}, H200"
    assert dispatch.explain(codec, layout, device, 32).startswith("Triton, H200; not FlashInfer: 32 queries")
    codec, layout, _ = built("kivi", (64, 64), HALF)
    assert dispatch.explain(codec, layout, device) == "Triton, H200; not FlashInfer: K is not stored as numbers"
    flashinfer.installed.cache_clear()
    monkeypatch.setattr(flashinfer, "find_spec", lambda _: None)
    assert dispatch.explain(codec, layout, device) == "Triton, H200; not FlashInfer: flashinfer is not installed"


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("tokens", [5, 48, 100])
def test_peers_agree_with_torch(
    stand_in: type[Wrapper], monkeypatch: pytest.MonkeyPatch, tokens: int, heads: int
) -> None:
    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: int, softmax_scale: float
    ) -> Tensor:
        assert k_cache.shape == v_cache.shape == (3, tokens, heads, 64)
        assert all(x.stride(-1) == 1 for x in (q, k_cache, v_cache))
        q, k, v = (x.transpose(1, 2) for x in (q, k_cache[:, :cache_seqlens], v_cache[:, :cache_seqlens]))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    torch.manual_seed(tokens)
    query = torch.randn(3, 4, 1, 64).to(HALF)
    k, v = torch.randn(2, 3, heads, tokens, 64).to(HALF)
    right = torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=True)
    for peer in peers.PEERS:
        assert callable(peers.ready(peer, query, k, v, right)), peer.label
        assert "off by" in str(peers.ready(peer, query, k, v, right + 0.1))
        assert "off by" in str(peers.ready(peer, query, k, v.roll(1, 2), right))
        assert "it failed" in str(peers.ready(peer, query, k, v[..., :32], right))


def test_which_peers_are_timed(stand_in: type[Wrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"flashinfer": object()}
    monkeypatch.setattr(peers, "find_spec", there.get)
    gpu, geometry = torch.device("cuda"), speed.Geometry(8, 2, 64, 64)
    dense, fp8, flash = peers.PEERS
    assert dense.obstacle(geometry, HALF, gpu) is fp8.obstacle(geometry, HALF, gpu) is None
    assert flash.obstacle(geometry, HALF, gpu) == "flash_attn is not installed"
    assert "no NVIDIA GPU" in (dense.obstacle(geometry, HALF, torch.device("cpu")) or "")
    assert "--dtype bfloat16" in (dense.obstacle(geometry, torch.float32, gpu) or "")
    assert "80 and 80" in (dense.obstacle(speed.Geometry(8, 2, 80, 80), HALF, gpu) or "")
    assert "192 and 128" in (fp8.obstacle(speed.Geometry(8, 2, 192, 128), HALF, gpu) or "")


def test_peers_stand_behind_torch_with_their_bytes(stand_in: type[Wrapper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.Peer, "obstacle", lambda self, *_: None if self.module == "flashinfer" else "not here")
    told: list[str] = []
    device, geometry = torch.device("cpu"), speed.Geometry(4, 2, 64, 64)
    found = speed.attention(geometry, ["kivi(bits=2)"], 100, 2, 4, HALF, device, 0, told.append)
    assert [timing.label for timing in found] == [speed.SDPA, "FlashInfer", "FlashInfer fp8", "kivi(bits=2)"]
    assert found[1].read == found[0].read == 2 * found[2].read
    assert told == ["not timed: flash-attention: not here"]
