"""The specification as a backend, which serves every operation on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.kernels.contract import Backend, Case, PageCodec, PagesView

from . import pages as of_pages
from . import select
from .received import received
from .tokens import attend_tokens, runs


class Reference(Backend):
    """PyTorch. Pages are written by their codec, and tokens appended by their buffer: it has no kernel for these."""

    name = "PyTorch"
    runs = staticmethod(runs)
    vector_dots = staticmethod(select.vector_dots)
    code_dots = staticmethod(select.code_dots)
    shares = staticmethod(select.shares)
    largest = staticmethod(select.largest)
    choose = staticmethod(select.choose)
    regroup = staticmethod(select.regroup)
    received = staticmethod(received)

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
        *_: object,
    ) -> Part:
        pool, ids, counts, layout, _sides, in_tokens, token_bias, skipped = pages
        ragged = None if pool.is_cpu and case.host else True  # reading counts would synchronize a GPU
        how = codec, scale, softcap, case.lse_of_pages, ragged, in_tokens, token_bias, skipped
        return of_pages.attend_pages(queries, pool, ids, counts, layout, *how)

    def attend_tokens(
        self,
        queries: Tensor,
        tokens: Tokens,
        scale: float,
        softcap: float | None,
        prior: Part | None,
        workspace: Tensor | None = None,
        host: bool = True,
    ) -> Part:
        return attend_tokens(queries, tokens, scale, softcap, prior, host)
