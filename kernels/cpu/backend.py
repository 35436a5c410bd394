"""The C kernels as a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.kernels import cpu
from kvcomp.kernels.contract import Backend, Case, PageCodec, PagesView, ReadBasis
from kvcomp.layout import PageLayout, Summary

from . import compiled, encode, select

MAPPED_ROWS, MAPPED_DIM = 16, 256


class C(Backend):
    """Kernels for tensors on the host."""

    name = "C"
    append = staticmethod(select.append)
    runs = staticmethod(select.runs)
    vector_dots = staticmethod(select.vector_dots)
    shares = staticmethod(select.shares)
    largest = staticmethod(select.largest)
    choose = staticmethod(select.choose)

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def missing(self) -> str | None:
        return compiled.missing() if compiled.library() is None else None

    def installed(self) -> str:
        return f"installed, {compiled.LEVELS[compiled.level()]}"

    def obstacle(self, operation: str, case: Case) -> str | None:
        few = case if operation == "write" else case._replace(rows=1)  # attention takes any number of queries
        why = few.obstacle if operation in ("attend", "attend_tokens", "write") else None
        if why is None and case.sides is not None:
            why = encode.obstacle(case.sides) if operation == "write" else cpu.obstacle(case.sides)
        return why or self.missing()

    def told(self, device: torch.device) -> str:
        return f"C, {compiled.LEVELS[compiled.level()]}, {torch.get_num_threads()} threads"

    def joins(self, codec: PageCodec, case: Case, tokens: Tokens) -> bool:
        inside = not case.rotates or self._maps(codec, case, tokens.keys.shape[2]) is not None
        return inside and cpu.readable(tokens)

    @staticmethod
    def _maps(codec: PageCodec, case: Case, dim: int) -> tuple[ReadBasis, ReadBasis] | None:
        """Bases that the kernel applies itself; each of its items does so again, so PyTorch does it for many or wide
        queries. None too before any stream has a basis; streams without one have no pages."""
        found = codec.read_bases() if case.rows <= MAPPED_ROWS and dim <= MAPPED_DIM else None
        if found is None or any(len(x) == 0 for b in found for x in (b.read_matrix, b.order) if x is not None):
            return None
        return found

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
        if not case.rotates:
            return cpu.attend(queries, pages, tokens, scale, softcap, lse_of_pages=case.lse_of_pages)
        # Where tokens are joined, there are maps.
        maps = self._maps(codec, case, queries.shape[2]) if tokens is None else codec.read_bases()
        if maps is not None:
            return cpu.attend(queries, pages, tokens, scale, softcap, None, None, case.lse_of_pages, maps)
        rotated, bias = codec.read_query(queries.float())
        part = cpu.attend(rotated, pages, tokens, scale, softcap, bias, lse_of_pages=case.lse_of_pages)
        return part._replace(out=codec.read_output(part.out))

    def attend_tokens(
        self, queries: Tensor, tokens: Tokens, scale: float, softcap: float | None, prior: Part | None, *_: object
    ) -> Part | None:
        return cpu.attend(queries, None, tokens, scale, softcap, prior=prior) if cpu.readable(tokens) else None

    def write(self, *args: Any) -> None:
        encode.write(*args)

    def code_dots(self, queries: Tensor, summary: Summary, name: str, bits: int) -> Tensor:
        queries = queries.float()
        offset = queries.sum(-1, keepdim=True) * (0.5 - 2 ** (bits - 1))
        return select.code_dots(queries, offset, summary, name, bits)

    def regroup(self, layout: PageLayout, pool: Tensor, ids: Tensor, tokens: Tensor) -> Tensor:
        records = pool.new_empty(tokens.numel() // layout.page_size, layout.body_bytes)
        select.regroup(layout, pool, ids, tokens, records)
        return records
