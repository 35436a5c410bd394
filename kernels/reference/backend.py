"""The specification as a backend, which serves every operation on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.kernels.contract import Backend, Case, PageCodec, PagesView, Reduce
from kvcomp.layout import PageLayout, Summary

from . import pages as of_pages
from . import received as of_keys
from . import select
from . import tokens as of_tokens


class Reference(Backend):
    """PyTorch. Pages are written by their codec, and tokens appended by their buffer: it has no kernel for these."""

    name = "PyTorch"

    def serves(self, device: torch.device) -> bool:
        return True

    def obstacle(self, operation: str, case: Case) -> str | None:
        return None

    def attend(
        self,
        queries: Tensor,
        pages: PagesView,
        codec: PageCodec,
        case: Case,
        scale: float,
        softcap: float | None,
        tokens: Tokens | None,
        workspace: Tensor | None,
    ) -> Part:
        pool, ids, counts, layout, _, in_tokens, token_bias = pages
        ragged = None if pool.is_cpu else True  # reading counts would synchronize a GPU
        how = codec, scale, softcap, case.lse_of_pages, ragged, in_tokens, token_bias
        return of_pages.attend_pages(queries, pool, ids, counts, layout, *how)

    def attend_tokens(
        self,
        queries: Tensor,
        tokens: Tokens,
        scale: float,
        softcap: float | None,
        prior: Part | None,
        workspace: Tensor | None,
    ) -> Part:
        return of_tokens.attend_tokens(queries, tokens, scale, softcap, prior)

    def runs(self, x: Tensor, starts: Tensor, width: int) -> Tensor:
        return of_tokens.runs(x, starts, width)

    def vector_dots(self, queries: Tensor, summary: Summary, names: tuple[str, ...], scale: str | None) -> Tensor:
        return select.vector_dots(queries, summary, names, scale)

    def code_dots(self, queries: Tensor, summary: Summary, name: str, bits: int) -> Tensor:
        return select.code_dots(queries, summary, name, bits)

    def shares(self, logits: Tensor, counts: Tensor) -> Tensor:
        return select.shares(logits, counts)

    def largest(self, x: Tensor, wanted: Tensor, width: int) -> Tensor:
        return select.largest(x, wanted, width)

    def choose(
        self,
        logits: Tensor,
        scale: float,
        counts: Tensor,
        unit: int,
        wanted: Tensor,
        width: int,
        pages: int,
        ends: tuple[int, int],
    ) -> Tensor:
        return select.choose(logits, scale, counts, unit, wanted, width, pages, ends)

    def regroup(self, layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
        return select.regroup(layout, pool, ids, tokens)

    def received(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: float,
        visible: Tensor | None,
        softcap: float | None,
        reduce: Reduce,
    ) -> Tensor:
        return of_keys.received(queries, keys, scale, visible, softcap, reduce)
