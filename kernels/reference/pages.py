"""The specification of attention over pages, in plain PyTorch: decode a block of pages, attend, merge, go on.

It never holds more than one block of decoded tokens, and reads exactly the pages it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.attention import Part, attend, joined
from kvcomp.kernels.contract import PageCodec
from kvcomp.layout import PageLayout

MAX_DECODED = 1 << 19  # decoded elements of K (and of V) at once: 2 MiB of float32, which caches hold


def attend_pages(
    queries: Tensor,
    pool: Tensor,
    ids: Tensor,
    counts: Tensor,
    layout: PageLayout,
    codec: PageCodec,
    scale: float,
    softcap: float | None = None,
    lse_of_pages: bool = False,
    ragged: bool | None = None,
    in_tokens: bool = False,
    token_bias: Tensor | None = None,
    skipped: Tensor | None = None,
) -> Part:
    """Attention of queries [S, R, Dk] over each stream's pages, in original coordinates.

    pool [pages, bytes_per_page] uint8; ids [S, n] page ids, of which a stream's first counts [S] are valid. The other
    entries are never decoded into the result: what they point at may be anything. With `lse_of_pages` the part's groups
    are the lse of each page, -inf where there is none. `ragged`: whether some count may be less than n; None: they are
    looked at, on the host. `in_tokens`: counts are of tokens, and a stream's last page may be filled in part; what lies
    after it is not read either. token_bias [S, R, n * P]: what is added to each q . k, too. skipped [S]: so many tokens
    at the start of a stream's first page are not seen.
    """
    streams, n = ids.shape
    size = layout.page_size
    rotated, bias = codec.read_query(queries.float())
    if token_bias is not None:
        bias = token_bias if bias is None else token_bias + bias[..., None]
    block = max(MAX_DECODED // (streams * size * max(queries.shape[-1], 1)), 1)
    held, longest = counts if in_tokens else counts * size, n * size
    if ragged is None:
        least, most = (int(x) for x in held.aminmax())
        ragged = least < longest
        if 0 < least == most and not lse_of_pages:  # all end at the same token: no masks
            longest, ragged = most, False
    parts = []
    for at in range(0, -(-longest // size), block):
        piece = ids[:, at : at + block]
        m = piece.shape[1]
        keys, values = (
            x.reshape(streams, m * size, -1)[:, : longest - at * size]
            for x in codec.decode(layout.gather(pool, piece.flatten()))
        )
        visible = None
        if ragged:
            exists = torch.arange(at * size, (at + m) * size, device=ids.device) < held[:, None]
            keys, values = (x.masked_fill(~exists[..., None], 0) for x in (keys, values))
            visible = exists[:, None]
        if skipped is not None and at == 0:
            later = (torch.arange(m * size, device=ids.device)[: keys.shape[1]] >= skipped[:, None])[:, None]
            visible = later if visible is None else visible & later
        group = size if lse_of_pages else None
        own = bias if bias is None or bias.dim() == 2 else bias[..., at * size : at * size + keys.shape[1]]
        parts.append(attend(rotated, keys, values, scale, visible, softcap, own, group))
    part = joined(parts)
    return part._replace(out=codec.read_output(part.out))
