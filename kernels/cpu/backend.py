"""The C kernels as a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.kernels import cpu
from kvcomp.kernels.contract import Backend, Case, PageCodec, PagesView
from kvcomp.layout import PageLayout, Summary
from kvcomp.segments import Sides

from . import compiled, encode, select


class C(Backend):
    """Kernels for tensors on the host."""

    name = "C"

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def missing(self) -> str | None:
        return compiled.missing() if compiled.library() is None else None

    def installed(self) -> str:
        return f"installed, {compiled.LEVELS[compiled.level()]}"

    def obstacle(self, operation: str, case: Case) -> str | None:
        why = case.obstacle if operation in ("attend", "attend_tokens", "write") else None
        if why is None and case.sides is not None:
            why = encode.obstacle(case.sides) if operation == "write" else cpu.obstacle(case.sides)
        return why or self.missing()

    def told(self, device: torch.device) -> str:
        return f"C, {compiled.LEVELS[compiled.level()]}, {torch.get_num_threads()} threads"

    def joins(self, codec: PageCodec, case: Case, tokens: Tokens) -> bool:
        return not case.rotates and cpu.readable(tokens)

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
        rotated, bias = codec.read_query(queries.float())
        part = cpu.attend(rotated, pages, tokens, scale, softcap, bias, lse_of_pages=case.lse_of_pages)
        return part._replace(out=codec.read_output(part.out))

    def attend_tokens(
        self,
        queries: Tensor,
        tokens: Tokens,
        scale: float,
        softcap: float | None,
        prior: Part | None,
        workspace: Tensor | None,
    ) -> Part | None:
        return cpu.attend(queries, None, tokens, scale, softcap, prior=prior) if cpu.readable(tokens) else None

    def write(
        self, pool: Tensor, ids: Tensor, x: tuple[Tensor, Tensor], sides: Sides, layout: PageLayout, rows: Tensor | None
    ) -> None:
        encode.write(pool, ids, *x, sides, layout, rows)

    def append(self, k: Tensor, v: Tensor, counts: Tensor, keys: Tensor, values: Tensor) -> bool:
        return select.append(k, v, counts, keys, values)

    def runs(self, x: Tensor, starts: Tensor, width: int) -> Tensor:
        return select.runs(x, starts, width)

    def vector_dots(self, queries: Tensor, summary: Summary, names: tuple[str, ...], scale: str | None) -> Tensor:
        return select.vector_dots(queries, summary, names, scale)

    def code_dots(self, queries: Tensor, summary: Summary, name: str, bits: int) -> Tensor:
        queries = queries.float()
        offset = queries.sum(-1, keepdim=True) * (0.5 - 2 ** (bits - 1))
        return select.code_dots(queries, offset, summary, name, bits)

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
        records = pool.new_empty(tokens.numel() // layout.page_size, layout.body_bytes)
        select.regroup(layout, pool, ids, tokens, records)
        return records
