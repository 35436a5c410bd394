"""The Triton kernels as a backend, which imports them only where they are called: see `kernels.triton`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvcomp.attention import Part, Tokens
from kvcomp.layout import PageLayout, Summary
from kvcomp.segments import KVLayout

from .contract import MOST_ROWS, Backend, Case, PageCodec, PagesView, Reduce

MISSING = (
    "triton is not installed, so attention over compressed pages runs in PyTorch on the GPU, several times slower: "
    "pip install triton"
)
OLDEST_GPU = (8, 0)  # compute capability: the first with products of bfloat16


class Triton(Backend):
    """Kernels for NVIDIA GPUs. anywhere: for tensors on other devices, too, where triton interprets them: for tests."""

    name = "Triton"

    def __init__(self, anywhere: bool = False) -> None:
        self.anywhere = anywhere

    def serves(self, device: torch.device) -> bool:
        return self.anywhere or device.type == "cuda"

    def missing(self) -> str | None:
        return MISSING if find_spec("triton") is None else None

    def obstacle(self, operation: str, case: Case) -> str | None:
        if not self.anywhere and (found := torch.cuda.get_device_capability(case.device)) < OLDEST_GPU:
            return f"a GPU of compute capability {found[0]}.{found[1]}, before {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
        why = self.missing()
        if why is None and operation in ("attend", "attend_tokens", "write", "vector_dots", "code_dots"):
            why = case._replace(rows=1).obstacle if operation == "attend" and self._many(case) else case.obstacle
        if why is None and operation in ("vector_dots", "code_dots"):
            from .triton import plan

            most = plan.MOST_ROWS
            why = f"{case.rows} queries of a stream are more than {most}" if case.rows > most else None
        if why is None and case.sides is not None:
            from . import triton

            why = triton.write_obstacle(case.sides) if operation == "write" else triton.obstacle(case.sides)
        return why

    def _many(self, case: Case) -> bool:
        """Whether queries are so many that pages are decoded for all of them at once."""
        from .triton import many

        return case.rows > MOST_ROWS and many.serves(case)

    def told(self, device: torch.device) -> str:
        return f"Triton, {torch.cuda.get_device_name(device)}"

    def joins(self, codec: PageCodec, case: Case, tokens: Tokens) -> bool:
        from .triton import plan

        centred = case.layout is not None and bool(case.layout.centres)
        if case.rows > MOST_ROWS:
            return False
        return plan.together(case.rotates, centred, case.rows)

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
    ) -> Part | None:
        """Exact where queries are float32. workspace: see `triton.attend`. More than `MOST_ROWS`: see `triton.many`."""
        from . import triton

        pool, ids, counts, layout, sides, in_tokens, token_bias, skipped = pages
        many_rows = case.rows > MOST_ROWS
        if many_rows and (softcap is not None or token_bias is not None or skipped is not None or not ids.shape[1]):
            return None
        assert sides is not None
        held = triton.Pages(
            pool, ids, counts, triton.prepared(sides, layout, queries.dtype == torch.float32, pool.device)
        )
        rotated, bias = queries, None
        if case.rotates:
            rotated, bias = codec.read_query(queries.float())
        if many_rows:
            from .triton import many

            part = many.attend(rotated, held, scale, queries.dtype, bias, in_tokens)
        else:
            part = triton.attend(
                *(rotated, held, tokens, scale, softcap, bias),
                lse_of_pages=case.lse_of_pages,
                workspace=workspace,
                in_tokens=in_tokens,
                token_bias=token_bias,
                skipped=skipped,
            )
        return part._replace(out=codec.read_output(part.out)) if case.rotates else part

    def attend_tokens(
        self,
        queries: Tensor,
        tokens: Tokens,
        scale: float,
        softcap: float | None,
        prior: Part | None,
        workspace: Tensor | None,
        host: bool = True,
    ) -> Part:
        from . import triton

        return triton.attend(queries, None, tokens, scale, softcap, prior=prior, workspace=workspace)

    def write(
        self,
        pool: Tensor,
        ids: Tensor,
        keys: Tensor,
        values: Tensor,
        sides: KVLayout,
        layout: PageLayout,
        rows: Tensor | None,
    ) -> None:
        from . import triton

        triton.write(pool, ids, keys, values, triton.written(sides, layout, pool.device, rows is not None), rows)

    def vector_dots(self, queries: Tensor, summary: Summary, names: tuple[str, ...], scale: str | None) -> Tensor:
        from . import triton

        q = queries.float()
        each = (q,) if len(names) == 1 else (q.clamp(max=0), q.clamp(min=0))
        held = summary.pool, summary.ids, summary.counts, summary.layout
        return triton.vector_dots(dict(zip(names, each, strict=True)), *held, scale)

    def code_dots(self, queries: Tensor, summary: Summary, name: str, bits: int) -> Tensor:
        from . import triton

        return triton.code_dots(queries, summary.pool, summary.ids, summary.counts, summary.layout, name, bits)

    def regroup(self, *args: Any) -> Tensor:
        from . import triton

        return triton.regroup(*args)

    def received(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: float,
        visible: Tensor | None = None,
        softcap: float | None = None,
        reduce: Reduce = "sum",
    ) -> Tensor:
        from . import triton

        return triton.attention_received(queries, keys, scale, visible, softcap, reduce == "max")
