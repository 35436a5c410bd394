"""FlashInfer's decode attention, for pages that hold 16-bit numbers: where it is installed, it reads them in place.

A pool is its paged cache of one KV head, and each stream a request, whose queries are the heads of a group. It plans on
the host, once for a table: tables that are read only once, and CUDA graphs, are left to other kernels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import MutableMapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvcomp.attention import Part
from kvcomp.errors import KvcompWarning
from kvcomp.layout import PageLayout
from kvcomp.segments import Dense, Floats, KVLayout

from .contract import Backend, Case, PagesView

WHERE = "FlashInfer (Triton in graphs, in torch.inference_mode, and for a table that is read once)"
DIMS = (64, 128, 256)
MOST_ROWS = 16  # queries of a stream for which the workspace has room, whatever the version and the GPU
TENSOR_CORES_FROM = 4  # queries of a stream; fewer are served without them
WORKSPACE = 128 << 20  # bytes, shared by all plans of a device: what FlashInfer's documentation recommends
PLAN = 1 << 20  # bytes of a plan, instead of FlashInfer's 8 MiB: space for more than 30,000 streams


class _How(NamedTuple):
    """What a plan holds for, besides a table."""

    rows: int
    dim: int
    page_size: int
    dtype: torch.dtype
    scale: float
    softcap: float


class _Plan(NamedTuple):
    """wrapper: a planned one. empty: bool [S, 1], the streams that have no pages; None: all have some."""

    wrapper: Any
    empty: Tensor | None


class _Table(NamedTuple):
    """A table of ids that was read: its counts, the versions of both, and plans."""

    counts: Tensor
    versions: tuple[int, int]
    plans: dict[_How, _Plan]


# By ids: a plan lives as long as the tensor that it was made of.
_TABLES: MutableMapping[Tensor, _Table] = WeakTensorKeyDictionary()
_failure: str | None = None


@cache
def installed() -> bool:
    return find_spec("flashinfer") is not None


def obstacle(sides: KVLayout, rotates: bool, rows: int, dtype: torch.dtype | None = None) -> str | None:
    """Why FlashInfer cannot read these pages for so many queries of a stream, of this dtype; None: it can."""
    if not installed():
        return "flashinfer is not installed"
    if _failure is not None:
        return _failure
    for name, side in zip("KV", sides, strict=True):
        if any(isinstance(segment, Floats) for segment in side.segments):
            return f"it scales fp8 by one factor a tensor, and {name} has one a block"
        if not (len(side.segments) == 1 and isinstance(side.segments[0], Dense)):
            return f"{name} is not stored as numbers"
    if rotates:
        return "pages are in another basis than queries"
    k, v = _dense(sides)
    if k.dtype not in (torch.float16, torch.bfloat16) or v.dtype != k.dtype or dtype not in (None, k.dtype):
        return f"K in {k.dtype}, V in {v.dtype}, queries in {dtype or k.dtype}: it needs one dtype of 16 bits for all"
    if k.channels not in DIMS or v.channels != k.channels:
        return f"K has {k.channels} and V {v.channels} channels: both must have 64, 128 or 256"
    return f"{rows} queries of a stream are more than {MOST_ROWS}" if rows > MOST_ROWS else None


def attend(
    queries: Tensor,
    pool: Tensor,
    ids: Tensor,
    counts: Tensor,
    layout: PageLayout,
    sides: KVLayout,
    scale: float,
    softcap: float | None = None,
) -> Part | None:
    """As `reference.attend_pages`, of pages that `obstacle` has no reason against. None: no plan; another kernel
    is due.

    A table is planned when it is read for the second time, unless it may not be looked at, in a graph, or does not tell
    when it changes, made in `torch.inference_mode`.
    """
    global _failure
    if (
        _failure is not None
        or torch.compiler.is_compiling()
        or (queries.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return None
    _, rows, dim = queries.shape
    how = _How(rows, dim, layout.page_size, queries.dtype, scale, softcap or 0.0)
    try:
        plan = _planned(ids, counts, how)
    except Exception as error:  # it compiles what it plans for, with a compiler that may be missing
        _failure = f"it failed: {str(error) or type(error).__name__}"
        warnings.warn(f"flashinfer is installed, but cannot be used: {_failure}", KvcompWarning, stacklevel=2)
        return None
    if plan is None:
        return None
    views = layout.views(pool)
    k, v = (views[numbers.field][:, :, None] for numbers in _dense(sides))  # [pages, P, 1, D], where they lie
    out, lse = plan.wrapper.run(queries.contiguous(), (k, v), return_lse=True)
    out, lse = out.float(), lse * math.log(2)  # it was of base 2
    if plan.empty is not None:
        out, lse = out.masked_fill(plan.empty[..., None], 0), lse.masked_fill(plan.empty, -torch.inf)
    return Part(out, lse)


def _dense(sides: KVLayout) -> list[Dense]:
    return [segment for side in sides for segment in side.segments if isinstance(segment, Dense)]


def _planned(ids: Tensor, counts: Tensor, how: _How) -> _Plan | None:
    """The plan of a table that was read before, and has not changed since."""
    if ids.is_inference() or counts.is_inference():
        return None
    versions = ids._version, counts._version
    table = _TABLES.get(ids)
    if table is None or table.counts is not counts or table.versions != versions:
        _TABLES[ids] = _Table(counts, versions, {})
        return None
    if how not in table.plans:
        table.plans[how] = _plan(ids, counts, how)
    return table.plans[how]


def _plan(ids: Tensor, counts: Tensor, how: _How) -> _Plan:
    held = counts.cpu()  # waits for the device, so that memory of plans that are gone is no longer copied from
    taken = held.clamp_min(1)  # an empty stream reads the page 0 that pads its ids, in vain
    used = torch.arange(ids.shape[1], device=ids.device) < taken.to(ids.device)[:, None]
    made = wrapper(ids.device, "NHD", how.rows >= TENSOR_CORES_FROM)
    bounds = torch.cat([taken.new_zeros(1), taken.cumsum(0)]).int()
    last = torch.full_like(bounds[1:], how.page_size)
    dtypes = {"q_data_type": how.dtype, "kv_data_type": how.dtype}
    numbers = {"sm_scale": how.scale, "logits_soft_cap": how.softcap}
    made.plan(bounds, ids[used].int(), last, how.rows, 1, how.dim, how.page_size, **dtypes, **numbers)
    return _Plan(made, (held == 0).to(ids.device)[:, None] if bool((held == 0).any()) else None)


def wrapper(device: torch.device, kv_layout: str, tensor_cores: bool, backend: str = "fa2") -> Any:
    """FlashInfer's wrapper for paged decode, to be planned; the lse of "fa2" is of base 2."""
    create = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    made = create(_workspace(device), kv_layout, use_tensor_cores=tensor_cores, backend=backend)
    made.reset_workspace_buffer(_workspace(device), torch.empty(PLAN, dtype=torch.uint8, device=device))
    return made


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


class FlashInfer(Backend):
    """FlashInfer as a backend, which declines what it has no plan for."""

    name = "FlashInfer"

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def missing(self) -> str | None:
        return None if installed() else "flashinfer is not installed"

    def obstacle(self, operation: str, case: Case) -> str | None:
        if case.obstacle is not None or case.sides is None:
            return case.obstacle
        if case.lse_of_pages or case.in_tokens:
            return "it reads whole pages, and tells no lse of each"
        return obstacle(case.sides, case.rotates, case.rows, case.dtype)

    def told(self, device: torch.device) -> str:
        return f"{WHERE}, {torch.cuda.get_device_name(device)}"

    def attend(
        self,
        queries: Tensor,
        pages: PagesView,
        codec: object,
        case: Case,
        scale: float,
        softcap: float | None,
        *_: object,
    ) -> Part | None:
        pool, ids, counts, layout, sides, _in_tokens, token_bias, skipped = pages
        assert sides is not None
        if token_bias is not None or skipped is not None:
            return None
        return attend(queries, pool, ids, counts, layout, sides, scale, softcap)
