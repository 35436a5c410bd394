"""Decode steps that are planned on the device, so that a CUDA graph records one and replays it for other requests.

Each request brings one token, which is written into its page and attends to itself exactly, and to those before it as
their pages have them. What is launched follows from how many requests there are, and from the longest there may be;
everything else is in buffers whose addresses stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomp.attention import Tokens
from kvcomp.kernels import dispatch
from kvcomp.layout import PageLayout
from kvcomp.stages import Codec

from .centres import middle, turns
from .pages import Cells, Pages


def obstacle(pages: Pages, rows: int, device: torch.device) -> str | None:
    """Why tokens of a layer cannot be decoded so, with `rows` queries a KV head; None: they can."""
    if pages.token_codec is None:
        return "its tokens are not written into pages one by one"
    if (why := dispatch.obstacle(pages.codec, pages.layout, device, rows)) is not None:
        return why
    codec, on = pages.token_codec, pages.pool.device
    sides = codec.kernel_layouts()
    token = torch.zeros(1, 1, pages.setup.dim, dtype=torch.float32, device=on)
    if sides is None or codec.kernel_input(token, token, torch.zeros(1, dtype=torch.int64, device=on)) is None:
        return "no kernel writes its tokens"
    return dispatch.write_obstacle(sides, pages.layout, device)


def most_channels(codecs: Sequence[Codec], dim: int) -> int:
    """Of values, in the coordinates of the codecs' pages, and of new tokens, which have `dim`."""
    return max(dim, *(sides[1].channels for codec in codecs if (sides := codec.kernel_layouts()) is not None))


@dataclass(frozen=True)
class DecodeStep:
    """R requests that bring one token each, the first R of a batch; H KV heads.

    ids int32 [R * H, n]: records of the pool that each head reads, oldest first, as many as the longest context has.
    counts int64 [R * H]: tokens in them, without the new one; own: 1 for that, or 0 where the request is padding.
    cells: where the new tokens go, nowhere where records are below 0. workspace: of the kernels, float32.
    """

    ids: Tensor
    counts: Tensor
    own: Tensor
    cells: Cells
    workspace: Tensor

    def attend(
        self,
        pages: Pages,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:
        """Write tokens of key and value [T, H, D], and attention of query [T, Hq, D] to out [T, Hq, D]; T is R or more.
        sinks: as of `BlockLayer`.

        Rows of padding become 0, those after R stay.
        """
        pages.write_tokens(key, value, self.cells)
        streams, requests = len(self.ids), len(self.ids) // pages.heads
        q = query[:requests].reshape(streams, -1, query.shape[2])  # [S, G, D]
        k, v = (x[:requests].reshape(streams, 1, -1) for x in (key, value))
        part = dispatch.attend_pages(
            *(q, pages.pool, self.ids, self.counts, pages.layout, pages.codec, scale, softcap),
            tokens=Tokens(k, v, self.own),
            in_tokens=True,
            workspace=self.workspace,
        )
        found = part.out
        if sinks is not None:
            logits = sinks.to(part.lse.dtype).view(-1, part.lse.shape[1]).repeat(requests, 1)
            found = found * torch.sigmoid(part.lse - logits)[..., None]
        out[:requests] = found.view(requests, -1, out.shape[2])

    def read(self, layout: PageLayout) -> int:
        """Bytes of the cache that a layer loaded: tokens of pages, which share nothing but centres, and pages' ids.
        Waits."""
        size, held = layout.page_size, self.counts
        pages = (held + size - 1) // size
        return int(held.sum()) * layout.token_bytes + int(pages.sum()) * (layout.centre_bytes + self.ids.itemsize)


def workspace_size(streams: int, step: int, rows: int, pages: int, page_size: int, v_dim: int, processors: int) -> int:
    """Float32 numbers that attention needs between its kernels for `step`, 2 `step`, ... or `streams` streams of up to
    `pages` pages, with `rows` queries each and values of `v_dim` channels in pages."""
    from kvcomp.kernels.triton import ops, plan

    sizes = []
    for some in range(step, streams + 1, step):  # the fewer streams, the more splits
        each = plan.split_pages(some, rows, pages, page_size, processors)
        sizes.append(ops.workspace_size(some, rows, -(-pages // each) + 1, v_dim))  # and one of the new tokens
    return max(sizes)


class Decoder:
    """Plans steps into buffers that are allocated once, on the device of the workspace: for up to `requests` requests
    of up to `pages` pages of `page_size` tokens, with `heads` KV heads."""

    def __init__(
        self, requests: int, pages: int, page_size: int, heads: int, workspace: Tensor, frequencies: Tensor
    ) -> None:
        self.requests, self.page_size, self.heads, self.workspace = requests, page_size, heads, workspace
        streams, device = requests * heads, workspace.device
        self.ids = torch.zeros(streams, pages, dtype=torch.int32, device=device)
        self.counts, self.own, self.records, self.rows = torch.zeros(4, streams, dtype=torch.int64, device=device)
        self.head = torch.arange(heads, device=device).repeat(requests)
        self.begun = torch.zeros_like(self.records)
        self.begins = torch.zeros(streams, 1, dtype=torch.bool, device=device)
        self.frequencies = frequencies.to(device)
        self.turns = turns(self.frequencies, self.counts[:requests])

    @classmethod
    def on(
        cls,
        device: torch.device,
        requests: int,
        tokens: int,
        page_size: int,
        heads: int,
        rows: int,
        v_dim: int,
        frequencies: Tensor,
    ) -> Decoder:
        """For requests of up to `tokens` tokens, with `rows` queries a KV head, values of `v_dim` channels in pages;
        frequencies: as of `Pages`."""
        from kvcomp.kernels.triton import plan

        pages = -(-tokens // page_size)
        size = workspace_size(requests * heads, heads, rows, pages, page_size, v_dim, plan.processors(device))
        workspace = torch.empty(size, device=device, dtype=torch.float32)
        return cls(requests, pages, page_size, heads, workspace, frequencies)

    @staticmethod
    def nbytes(
        requests: int, tokens: int, page_size: int, heads: int, rows: int, v_dim: int, device: torch.device
    ) -> int:
        """Bytes that one made by `on` holds for most: ids, and the workspace of its kernels."""
        from kvcomp.kernels.triton import plan

        pages = -(-tokens // page_size)
        size = workspace_size(requests * heads, heads, rows, pages, page_size, v_dim, plan.processors(device))
        return size * torch.float32.itemsize + requests * heads * pages * torch.int32.itemsize

    def plan(self, table: Tensor, lengths: Tensor, slots: Tensor) -> DecodeStep:
        """The step of R requests with lengths [R] tokens, the new one among them; 0: padding. table int32 [R, m]: their
        blocks of one page, of which what lies after a request's length may be anything. slots int64 [R]: places of the
        new tokens in the pool; -1: nowhere. All on the device; nothing waits for it.
        """
        requests, heads, size = len(lengths), self.heads, self.page_size
        ids, counts, own, records, rows, head = (
            x[: requests * heads] for x in (self.ids, self.counts, self.own, self.records, self.rows, self.head)
        )
        width, every = min(table.shape[1], ids.shape[1]), head[:heads]
        ids.view(requests, heads, -1)[..., :width] = table[:, None, :width] * heads + every[:, None]
        counts.view(requests, heads)[:] = (lengths - 1).clamp_min(0)[:, None]
        own.view(requests, heads)[:] = (lengths > 0)[:, None]
        records.view(requests, heads)[:] = (slots // size)[:, None] * heads + every  # // rounds down
        rows.view(requests, heads)[:] = (slots % size)[:, None]
        begun, begins, turned = self.begun[: len(ids)], self.begins[: len(ids)], self.turns[:requests]
        begun[:] = records.clamp_min(0)  # block 0 is nobody's
        begins[:, 0] = (rows == 0) & (records >= 0)
        turned[:] = turns(self.frequencies, middle((lengths - 1).clamp_min(0) // size, size))
        cells = Cells(slice(requests), records, rows, head, begun, turned, begins)
        return DecodeStep(ids, counts, own, cells, self.workspace)
