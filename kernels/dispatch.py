"""Which kernel attends over pages: chosen by device, by what the codec says of its pages, and by what is installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvcomp.attention import Part, attend, merge
from kvcomp.errors import KvcompWarning
from kvcomp.exact import ExactBuffer, Tokens
from kvcomp.kernel_layout import Sides
from kvcomp.pages import PageLayout, PagePool
from kvcomp.stages import Codec

from . import cpu, flashinfer, reference
from .cpu import encode

MOST_ROWS = 64  # queries of a stream from which on it is faster to decode pages for all of them, and multiply matrices
NO_TRITON = (
    "triton is not installed, so attention over compressed pages runs in PyTorch on the GPU, several times slower: "
    "pip install triton"
)
_reference: ContextVar[bool] = ContextVar("reference", default=False)  # of each thread
OLDEST_GPU = (8, 0)  # compute capability: the first with products of bfloat16


def attend_pages(
    queries: Tensor,
    pool: Tensor,
    ids: Tensor,
    counts: Tensor,
    layout: PageLayout,
    codec: Codec,
    scale: float,
    softcap: float | None = None,
    lse_of_pages: bool = False,
    tokens: Tokens | None = None,
    in_tokens: bool = False,
    token_bias: Tensor | None = None,
) -> Part:
    """As `reference.attend_pages`, by the fastest kernel that there is for these pages, and over exact `tokens` too."""
    sides = codec.kernel_sides()
    if sides is None or obstacle(codec, layout, pool.device, queries.shape[1]) is not None:
        ragged = None if pool.is_cpu else True  # elsewhere, to look would be to wait
        args = queries, pool, ids, counts, layout, codec, scale, softcap, lse_of_pages, ragged, in_tokens, token_bias
        return _with_tokens(queries, tokens, scale, softcap, reference.attend_pages(*args))
    if pool.is_cuda:
        whole = not (lse_of_pages or in_tokens or token_bias is not None)
        if whole and flashinfer.obstacle(sides, codec.rotates, queries.shape[1], queries.dtype) is None:
            dense = flashinfer.attend(queries, pool, ids, counts, layout, sides, scale, softcap)
            if dense is not None:
                return _with_tokens(queries, tokens, scale, softcap, dense)
        asked = queries, pool, ids, counts, layout, codec, sides, scale, softcap, lse_of_pages, tokens
        return by_triton(*asked, in_tokens, token_bias=token_bias)
    pages = cpu.Pages(pool, ids, counts, layout, sides, in_tokens)
    if codec.rotates or (tokens is not None and not cpu.readable(tokens)):
        rotated, bias = codec.read_query(queries.float())
        part = cpu.attend(rotated, pages, None, scale, softcap, bias, None, lse_of_pages, token_bias)
        return _with_tokens(queries, tokens, scale, softcap, part._replace(out=codec.read_output(part.out)))
    return cpu.attend(queries, pages, tokens, scale, softcap, None, None, lse_of_pages, token_bias)


def by_triton(
    queries: Tensor,
    pool: Tensor,
    ids: Tensor,
    counts: Tensor,
    layout: PageLayout,
    codec: Codec,
    sides: Sides,
    scale: float,
    softcap: float | None,
    lse_of_pages: bool,
    tokens: Tokens | None,
    in_tokens: bool = False,
    workspace: Tensor | None = None,
    token_bias: Tensor | None = None,
) -> Part:
    """As `attend_pages`, by the Triton kernels; exact where queries are float32. workspace: see `triton.attend`."""
    from . import triton

    pages = triton.Pages(pool, ids, counts, triton.prepared(sides, layout, queries.dtype == torch.float32, pool.device))
    how: dict[str, Any] = {"lse_of_pages": lse_of_pages, "workspace": workspace, "in_tokens": in_tokens}
    how["token_bias"] = token_bias
    if not codec.rotates:
        one = triton.plan.together(codec.rotates, bool(layout.centres), queries.shape[1])
        part = triton.attend(queries, pages, tokens if one else None, scale, softcap, **how)
        if one:
            return part
    else:
        rotated, bias = codec.read_query(queries.float())
        part = triton.attend(rotated, pages, None, scale, softcap, bias, **how)
        part = part._replace(out=codec.read_output(part.out))
    if tokens is None:
        return part
    both = triton.attend(queries, None, tokens, scale, softcap, prior=part, workspace=workspace)
    return both._replace(groups=part.groups)


def write_pages(
    pool: PagePool,
    ids: Tensor,
    codec: Codec,
    keys: Tensor,
    values: Tensor,
    streams: Tensor,
    summaries: Mapping[str, Tensor],
) -> None:
    """Store keys [M, P, Dk] and values [M, P, Dv] of `streams` int64 [M] as the codec encodes them, and summary fields
    [M, ...], in the pages ids int64 [M] of the pool: in one pass, where a kernel can."""
    if not encode_pages(pool.data, ids, pool.layout, codec, keys, values, streams):
        pool.write(ids, codec.encode(keys, values, streams) | dict(summaries))
        return
    for name, view in pool.layout.views(pool.data, summary=True).items():
        view[ids.to(view.device)] = summaries[name]


def encode_pages(
    pool: Tensor,
    ids: Tensor,
    layout: PageLayout,
    codec: Codec,
    keys: Tensor,
    values: Tensor,
    streams: Tensor,
    rows: Tensor | None = None,
) -> bool:
    """As `write_pages`, by a kernel, into the records ids of a pool uint8 [records, bytes]; summaries are then still to
    be written. False, and nothing is done, where no kernel can write these pages.

    rows int64 [M]: keys [M, 1, Dk] and values [M, 1, Dv] are single tokens, written where these tokens of a page lie,
    of a layout that is `tokenwise`. On a GPU, ids below 0 are written nowhere.
    """
    sides = codec.kernel_sides()
    if sides is None or not writable(pool, sides):
        return False
    x = codec.kernel_input(keys, values, streams)
    if x is None:
        return False
    if on_gpu(pool):
        from . import triton

        triton.write(pool, ids, *x, triton.written(sides, layout, pool.device, rows is not None), rows)
    else:
        encode.write(pool, ids, *x, sides, layout, rows)
    return True


def writable(pool: Tensor, sides: Sides) -> bool:
    """Whether a kernel writes pages of this pool whose K and V are to be read as `sides` say, or single tokens."""
    if not all(side.channels for side in sides):
        return False
    if on_gpu(pool):
        from . import triton

        return triton.write_obstacle(sides) is None
    available = pool.is_cpu and not _reference.get() and cpu.library() is not None
    return available and encode.obstacle(sides) is None


def on_gpu(x: Tensor) -> bool:
    """Whether the Triton kernels take x."""
    return x.is_cuda and not _reference.get() and _gpu_obstacle(x.device) is None


def attend_tokens(
    queries: Tensor, tokens: Tokens, scale: float, softcap: float | None = None, prior: Part | None = None
) -> Part:
    """Attention of queries [S, R, Dk] over exact tokens and what `prior` attended to."""
    few = queries.shape[1] <= MOST_ROWS and not _reference.get()
    few = few and tokens.keys.shape[2] > 0 and tokens.values.shape[2] > 0
    if few and on_gpu(queries):
        from . import triton

        return triton.attend(queries, None, tokens, scale, softcap, prior=prior)
    if few and cpu.library() is not None and cpu.readable(tokens):
        return cpu.attend(queries, None, tokens, scale, softcap, prior=prior)
    longest, visible = tokens.keys.shape[1], None
    if tokens.counts.is_cpu:
        longest = int(tokens.counts.max())
    keys, values = tokens.keys[:, :longest], tokens.values[:, :longest]
    if not tokens.counts.is_cpu or bool((tokens.counts < longest).any()):  # to look would be to wait
        there = (torch.arange(longest, device=tokens.counts.device) < tokens.counts[:, None]).to(queries.device)
        keys, values = (x.masked_fill(~there[..., None], 0) for x in (keys, values))  # it may be anything
        visible = there[:, None]
    part = attend(queries, keys, values, scale, visible, softcap)
    return part if prior is None else merge([prior, part])


def runs(x: Tensor, starts: Tensor, width: int) -> Tensor:
    """[..., width]: of x [N] the runs of so many elements that begin at starts int64 [...]."""
    if x.is_cpu and cpu.library() is not None:
        return cpu.runs(x, starts, width)
    return x[starts[..., None] + torch.arange(width, device=x.device)]


def append_token(exact: ExactBuffer, keys: Tensor, values: Tensor) -> None:
    """One more token for every stream of a buffer: keys [B, Hkv, 1, Dk], values [B, Hkv, 1, Dv]."""
    if keys.is_cpu and cpu.library() is not None and keys.is_contiguous() and values.is_contiguous():
        exact.make_room()
        if cpu.append(exact.k, exact.v, exact.counts, keys, values):
            exact.grown()
            return
    streams = len(exact.counts)
    exact.append(keys.reshape(streams, -1), values.reshape(streams, -1))


def _with_tokens(queries: Tensor, tokens: Tokens | None, scale: float, softcap: float | None, part: Part) -> Part:
    """The part and exact tokens; its groups stay."""
    return part if tokens is None else attend_tokens(queries, tokens, scale, softcap, part)._replace(groups=part.groups)


def explain(codec: Codec, layout: PageLayout, device: torch.device, rows: int = 1) -> str:
    """Which kernel `attend_pages` takes for `rows` queries of a stream, and why it is no faster one."""
    why = obstacle(codec, layout, device, rows)
    if why is not None:
        return f"PyTorch: {why}"
    if device.type == "cuda":
        sides = codec.kernel_sides()
        assert sides is not None
        other, name = flashinfer.obstacle(sides, codec.rotates, rows), torch.cuda.get_device_name(device)
        return f"{flashinfer.WHERE}, {name}" if other is None else f"Triton, {name}; not FlashInfer: {other}"
    return f"C, {cpu.LEVELS[cpu.level()]}, {torch.get_num_threads()} threads"


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside, this thread computes everything by the reference: what kernels are checked against."""
    before = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(before)


def obstacle(codec: Codec, layout: PageLayout, device: torch.device, rows: int = 1) -> str | None:
    """Why pages are read by the reference; None: they are not."""
    if _reference.get():
        return "it was asked for"
    if device.type not in ("cpu", "cuda"):
        return f"there is no other kernel for {device.type}"
    sides = codec.kernel_sides()
    if sides is None:
        return f"{type(codec).__name__} does not tell kernels how to read its pages"
    if not all(side.channels for side in sides):
        return "keys or values of no channels"
    why = _gpu_obstacle(device, sides) if device.type == "cuda" else _cpu_obstacle(sides, layout)
    if why is None and rows > MOST_ROWS:
        return f"{rows} queries of a stream are more than {MOST_ROWS}"
    return why


def _cpu_obstacle(sides: Sides, layout: PageLayout) -> str | None:
    for side in sides:
        if (why := cpu.described(side, layout).obstacle) is not None:
            return why
    if cpu.library() is None:
        _warn(cpu.missing())
        return cpu.missing()
    return None


def _gpu_obstacle(device: torch.device, sides: Sides | None = None) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"a GPU of compute capability {capability[0]}.{capability[1]}, before {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    if find_spec("triton") is None:
        _warn(NO_TRITON)
        return NO_TRITON
    from . import triton

    return None if sides is None else triton.obstacle(sides)


@cache
def _warn(what: str) -> None:
    """Once in a process."""
    warnings.warn(what, KvcompWarning, stacklevel=2)
