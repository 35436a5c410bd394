"""Attention of many queries: chunks of a prompt, what follows a shared prefix, second turns.

Pages are decoded some tokens at a time, to 16 bits, and attended to by torch's kernel, which gives the lse as well:
what decoding costs is shared by all queries. A block is a kernel and an operator, whatever the number of pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcomp.attention import HALVES, Part, by_efficient, seen_by_some
from kvcomp.kernels.contract import Case

from . import ops
from .memory import integers, records

if TYPE_CHECKING:
    from . import Pages

TOKENS = 1 << 18  # of all streams that are decoded at once: 64 MiB of keys, at 128 channels


def serves(case: Case) -> bool:
    """Whether torch's kernel takes such numbers: of 16 bits, in runs of 16 bytes."""
    if case.dtype not in HALVES or case.lse_of_pages or case.layout is None or case.sides is None:
        return False
    return not any(n % 8 for n in (case.layout.page_size, *(side.channels for side in case.sides)))


def attend(
    queries: Tensor, pages: Pages, scale: float, dtype: torch.dtype, bias: Tensor | None, in_tokens: bool
) -> Part:
    """As `triton.attend`, of queries [S, R, Dk] in the coordinates of the pages, with products in `dtype`."""
    pool, ids, counts, how = pages
    records(pool, how.body_bytes)
    on, streams = pool.device, len(queries)
    ids, counts = integers("ids", ids, on, 2), integers("counts", counts, on, (streams,)).contiguous()
    q = queries.to(dtype)
    block = max(TOKENS // (streams * how.layout.page_size), 1)
    found: Part | None = None
    for at in range(0, ids.shape[1], block):
        most = min(block, ids.shape[1] - at)
        k, v, hidden = ops.decode_pages(
            *(pool, ids, counts, how.k_codebook, how.v_codebook, how.description, at, most, in_tokens, dtype)
        )
        part = by_efficient(q, k, v, scale, hidden)
        found = part if found is None else _both(found, part)
    assert found is not None
    out, lse, _ = seen_by_some(found)
    return Part(out, lse if bias is None else lse + bias * scale)


def _both(a: Part, b: Part) -> Part:
    """The merge of two parts whose lse are finite, in few operators."""
    lse = torch.logaddexp(a.lse, b.lse)
    return Part(a.out.lerp_(b.out, (b.lse - lse).exp_()[..., None]), lse)
