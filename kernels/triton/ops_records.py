"""Operators of `torch.ops.kvcomp` that write page records. As in `ops`, nothing looks into a tensor."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kvcomp.layout import PageLayout
from kvcomp.operators import operator

from . import encode, pieces, tokens

COPIED, WORDS = 64, 2048  # tokens of a program, and words of them


def encode_constants(layout: pieces.Description, record_bytes: int, single: bool = False) -> dict[str, Any]:
    """What `encode_kernel` is compiled for, and how: without fused operations, which round otherwise. record_bytes:
    from a page of the pool to the next; single: of tokens one by one."""
    return {
        "PIECES": layout.pieces,
        "GAPS": layout.gaps,
        "K_DIM": layout.k_dim,
        "V_DIM": layout.v_dim,
        "PAGE": layout.tokens,
        "BYTES": record_bytes,
        "SINGLE": single,
        "num_warps": layout.warps,
        "enable_fp_fusion": False,
    }


@operator("write_pages", lambda: None, mutates=("pool",))
def write_pages(
    pool: Tensor,
    ids: Tensor,
    keys: Tensor,
    values: Tensor,
    k_thresholds: Tensor,
    v_thresholds: Tensor,
    description: str,
    rows: Tensor | None = None,
) -> None:
    """Encode keys [M, P, Dk] and values [M, P, Dv], as `Codec.kernel_input` gives them, into the pages ids int64 [M] of
    a pool uint8 [pages, bytes]: all that attention reads of them, and 0 between fields; not the summaries. Negative ids
    are no page's.

    rows int64 [M]: of K and V [M, 1, D], single tokens, where in those pages they go; nothing else is touched.
    description: of `pieces.Description`; k_thresholds, v_thresholds: as of `pieces.thresholds`.
    """
    layout = pieces.parsed(description)
    if len(ids) == 0:
        return
    with torch.cuda.device_of(pool):
        encode.encode_kernel[(len(ids), layout.programs)](
            *(keys, values, pool, ids, ids if rows is None else rows, k_thresholds, v_thresholds),
            **encode_constants(layout, pool.stride(0), rows is not None),
        )


def regrouped(layout: PageLayout) -> tuple[tuple[tuple[int, int], ...], int, int, int]:
    """What `regroup_kernel` gets to know of a layout: (offset, bytes a token) of each of its `token_fields`, tokens and
    bytes of a page, and those bytes of it that attention reads."""
    fields = tuple((layout.offsets[f.name], f.nbytes // layout.page_size) for f in layout.token_fields)
    return fields, layout.page_size, layout.bytes_per_page, layout.body_bytes


def regroup_constants(
    fields: tuple[tuple[int, int], ...], page_size: int, page_bytes: int, body_bytes: int
) -> dict[str, Any]:
    """As `encode_constants`, of `regroup_kernel`."""
    widest = max(tokens.room(field) for field in fields)
    return {
        "FIELDS": fields,
        "PAGE": page_size,
        "BYTES": page_bytes,
        "BODY": body_bytes,
        "TOKENS": max(min(COPIED, WORDS // widest), 1),
        "num_warps": 4,
    }


def _records(pool: Tensor, chosen: Tensor, page_size: int, body_bytes: int) -> Tensor:
    return torch.empty(chosen.numel() // page_size, body_bytes, dtype=torch.uint8, device=pool.device)


@operator("regroup", _records)
def regroup(
    pool: Tensor, ids: Tensor, chosen: Tensor, fields: list[int], page_size: int, page_bytes: int, body_bytes: int
) -> Tensor:
    """Records uint8 [S * m, body_bytes] made of single tokens: chosen int64 [S, m * P] of the pages ids [S, n] of a
    pool uint8 [pages, page_bytes], in their order.

    fields: offset and bytes a token of each, in a row.
    """
    streams, count = chosen.shape
    records = _records(pool, chosen, page_size, body_bytes)
    if len(records) == 0:
        return records
    constants = regroup_constants(tuple(zip(fields[::2], fields[1::2], strict=True)), page_size, page_bytes, body_bytes)
    with torch.cuda.device_of(pool):
        tokens.regroup_kernel[(streams, triton.cdiv(count, constants["TOKENS"]))](
            pool, ids, chosen, records, count, ids.stride(0), **constants
        )
    return records
