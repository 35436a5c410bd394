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
from .reference import select

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
        from . import triton
        from .triton import plan

        assert case.layout is not None
        assert case.sides is not None
        if case.rows > MOST_ROWS or (case.rotates and plan.bases(codec) is None):
            return False
        exact = case.dtype == torch.float32
        several = case.rotates and triton.prepared(case.sides, case.layout, exact, case.device).several
        return plan.together(bool(case.layout.centres), case.rows, several)

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
        from .triton import ops_rotate, plan

        pool, ids, counts, layout, sides, in_tokens, token_bias, skipped = pages
        many_rows = case.rows > MOST_ROWS
        if many_rows and (softcap is not None or token_bias is not None or skipped is not None or not ids.shape[1]):
            return None
        assert sides is not None
        held = triton.Pages(
            pool, ids, counts, triton.prepared(sides, layout, queries.dtype == torch.float32, pool.device)
        )
        bases = plan.bases(codec) if case.rotates else None
        rotated, bias, back = queries, None, None
        if bases is not None:
            rotated, bias = ops_rotate.rotated(queries, bases[0])
            back = bases[1].read_matrix
        elif case.rotates:
            rotated, bias = codec.read_query(queries.float())
        if many_rows:
            from .triton import many

            part = many.attend(rotated, held, scale, queries.dtype, bias, in_tokens)
            return part._replace(out=codec.read_output(part.out)) if case.rotates else part
        part = triton.attend(
            *(rotated, held, tokens, scale, softcap, bias),
            lse_of_pages=case.lse_of_pages,
            workspace=workspace,
            in_tokens=in_tokens,
            token_bias=token_bias,
            skipped=skipped,
            token_queries=queries if case.rotates and tokens is not None else None,
            back=back,
        )
        return part if bases is not None or not case.rotates else part._replace(out=codec.read_output(part.out))

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

    def append(self, k: Tensor, v: Tensor, counts: Tensor, keys: Tensor, values: Tensor) -> bool:
        from .triton import ops_window

        if not (counts.device == k.device and _rows(k, v, keys, values)):
            return False
        ops_window.append_token(k, v, counts, keys, values)
        return True

    def advance(
        self, k: Tensor, v: Tensor, counts: Tensor, pages: Tensor, seen: Tensor, keys: Tensor, values: Tensor, each: int
    ) -> Tensor | None:
        from .triton import ops_window

        if not _rows(k, v, keys, values):
            return None
        ids: Tensor = ops_window.advance(k, v, counts, pages, seen, keys, values, each)
        return ids

    def shift_windows(self, *args: Any) -> tuple[Tensor, Tensor]:
        from .triton import ops_window

        moved: tuple[Tensor, Tensor] = ops_window.shift_windows(*args)
        return moved

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

        keys, values = keys.flatten(0, -3), values.flatten(0, -3)
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
        from .triton import ops_scores

        if logits.shape[1] > ops_scores.MOST_HEADS:
            return select.choose(logits, scale, counts, unit, wanted, width, pages, ends)
        each = logits.shape[-1] // pages if unit == 1 else 1
        given = logits.float().contiguous(), counts.contiguous(), wanted.contiguous()
        chosen: Tensor = ops_scores.choose(*given, unit, each, width, *(n * unit for n in ends), scale)
        return chosen

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


def _rows(k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether kernels can put tokens [B, H, 1, D] into slots [S, n, D]: of the same numbers, each contiguous."""
    alike = k.dtype == v.dtype == keys.dtype == values.dtype and k.device == keys.device
    slots = all(x.stride()[1:] == (x.shape[2], 1) or not x.shape[2] for x in (k, v))
    return alike and slots and keys.stride(3) == 1 and (values.stride(3) == 1 or not values.shape[3])
