"""What the Triton kernels need of a chip: `python -m kvcomp.benchmarks.resources`. Compiles them; no GPU is needed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from kvcomp import Stack
from kvcomp.console import Plain
from kvcomp.kernels.placed import NOTHING
from kvcomp.kernels.triton import (
    attention,
    chunks,
    compiling,
    encode,
    issue,
    ops,
    ops_records,
    ops_rotate,
    ops_scores,
    ops_window,
    pieces,
    plan,
    received,
    summaries,
    tiling,
)
from kvcomp.kernels.triton import choose as choosing
from kvcomp.kernels.triton import merge as merging
from kvcomp.kernels.triton import rotate as rotating
from kvcomp.kernels.triton import tokens as of_tokens
from kvcomp.kernels.triton import window as windows
from kvcomp.kernels.triton.compiling import LIMITS, Compiled
from kvcomp.kernels.triton.issue import built

WRITTEN = (
    *("none", "kivi(bits=4)", "kivi(bits=2)", "int(bits=4)", "turboquant(bits=4)"),
    *("fp8", "nvfp4", "mxfp4", "klt(bits=2)"),
)
LATENT = ("none", "int(bits=4)")
BY_TOKEN = ("none", "int(bits=4)", "int(bits=2)", "turboquant(bits=4)", "fp8", "mxfp4")  # stacks without a window


@dataclass(frozen=True)
class Resources:
    """Of a kernel on a chip: registers a thread, bytes of stack and local memory a thread (what is spilled), bytes of
    shared memory a program, and how many programs fit a processor."""

    kernel: str
    stack: str
    capability: int
    registers: int
    spilled: int
    shared: int
    programs: int


def resources(made: Compiled, name: str) -> Resources:
    return Resources(made.name, name, made.capability, made.registers, made.spilled, made.shared, made.programs)


def compiled(kernel: Any, constants: dict[str, Any], capability: int, name: str, **pointers: str) -> Resources:
    """Resources of `kernel`, compiled for a chip and for `constants`, options among them."""
    return resources(compiling.compiled(kernel, constants, capability, **pointers), name)


def attend(spec: str, capability: int, rows: int = 16, dim: int = 128, in_tokens: bool = False) -> Resources:
    """Of attention, as `issue.attend` compiles it."""
    name = spec if rows == chunks.NARROWEST else f"{spec}, {rows} rows"
    name = name if dim == 128 else f"{name}, {dim} channels"
    name = f"{name}, filled in part" if in_tokens else name
    return resources(issue.attend(spec, capability, rows, dim, in_tokens)[0], name)


def attend_latents(spec: str, capability: int, rank: int = 512, rotary: int = 64) -> Resources:
    """Of attention over latents of DeepSeek's width, whose values share the bytes of their keys."""
    plan_of = replace(Stack.parse(spec).plan(0, 1), latent=True)
    codec, layout = plan_of.build(plan_of.shape(rank + rotary, rank, 1, torch.bfloat16))
    sides = codec.kernel_layouts()
    assert sides is not None
    tokens = chunks.numbers(rank + rotary, torch.bfloat16), chunks.numbers(rank, torch.bfloat16)
    rows = plan.blocked(128, k_dim=rank + rotary)
    constants = ops.attention_constants(
        tiling.described(sides, layout),
        layout.bytes_per_page,
        tokens if plan.together(False, rows) else ((), ()),
        plan.tokens_tile((rank + rotary) * torch.bfloat16.itemsize),
        rows,
        exact=False,
    )
    constants |= dict.fromkeys(("BIAS", "TOKEN_BIAS", "SKIPPED", "SOFTCAP", "LSE_OF_TILES", "IN_TOKENS"), False)
    queries = "*fp32" if codec.rotates else "*bf16"
    return compiled(attention.attend_kernel, constants, capability, f"{spec}, latents", q=queries)


def merge(capability: int, dim: int = 128) -> Resources:
    constants = {"PRIOR": True, "SPLITS": ops.SPLITS, "BLOCK": dim, "num_warps": ops.MERGE_WARPS}
    constants |= {"PAGE": 64, "IN_TOKENS": True, "TOKENS": True, "SEPARATE": True, "OTHER": dim}
    return compiled(merging.merge_kernel, constants, capability, "all")


def rotate(capability: int, back: bool, dim: int = 128) -> Resources:
    """Of queries in the basis of pages, and of attention over those mapped back."""
    types = {"x": "*fp32" if back else "*bf16", "matrix": "*fp16", "mean": "*fp32"}
    constants = ops_rotate.rotate_constants(dim, dim, 16, mean=not back, adds=back)
    return compiled(rotating.rotate_kernel, constants, capability, "back" if back else "queries", **types)


def score(capability: int, bits: int, dim: int = 128) -> Resources:
    """Of Quest's bounds, from summaries of 8 or 16 bits a channel."""
    size, coded = dim * bits // 8, bits == 8
    constants = ops_scores.scores_constants(16, dim, 1 << 14, exact=not coded)
    constants |= {"FIELDS": (0, size), "EACH": 1, "SCALE": 2 * size if coded else NOTHING, "RUN": dim // 8}
    return compiled(summaries.scores_kernel, constants, capability, f"quest(summary_bits={bits})", q="*fp32")


def write(spec: str, capability: int, dim: int = 128, single: bool = False) -> Resources:
    """Of pages written, or `single` tokens of them."""
    codec, layout = built(spec, dim, centred=not single)
    sides = codec.kernel_layouts()
    assert sides is not None
    constants = ops_records.encode_constants(pieces.described(sides, layout, single), layout.bytes_per_page, single)
    x, name = "*fp32" if codec.rotates else "*bf16", f"{spec}, one token" if single else spec
    return compiled(encode.encode_kernel, constants, capability, name, keys=x, values=x, ids="*i64", rows="*i64")


def code_dots(capability: int, bits: int, rank: int = 16, page_size: int = 16) -> Resources:
    """Of estimates of tokens, for sketch (4 bits) and dsa (8)."""
    constants = ops_scores.code_dots_constants(16, rank, bits, page_size, 1 << 14) | {"OFFSET": 1 << 13}
    return compiled(of_tokens.code_dots_kernel, constants, capability, f"{rank} channels of {bits} bits", q="*fp32")


def choose(capability: int, unit: int, each: int, groups: int = 16) -> Resources:
    """Of what a selector reads, by pages (unit 1) of `each` vectors, or by tokens."""
    constants = ops_scores.choose_constants(groups, unit, each)
    types = {"logits": "*fp32", "wanted": "*i64", "shares": "*fp32", "out": "*i64"}
    name = f"{'pages' if unit == 1 else 'tokens'} of {groups} heads"
    return compiled(choosing.choose_kernel, constants, capability, name, **types)


def window(capability: int, dim: int = 128) -> Iterator[Resources]:
    """Of a token that comes into windows, and of a page that leaves them."""
    types = dict.fromkeys(("k", "v", "keys", "values", "k_page", "v_page"), "*bf16")
    types |= dict.fromkeys(("counts", "pages", "seen", "ids"), "*i64")
    put, moved = ops_window.append_constants(dim, dim), ops_window.shift_constants(dim, dim, 32, 4, 128, True)
    kernels = (windows.append_kernel, put), (windows.advance_kernel, put), (windows.shift_kernel, moved)
    for kernel, constants in kernels:
        yield compiled(kernel, constants, capability, f"{dim} channels", **types)


def regroup(spec: str, capability: int, dim: int = 128) -> Resources:
    """Of pages made of chosen tokens."""
    layout = built(spec, dim)[1]
    constants = ops_records.regroup_constants(*ops_records.regrouped(layout))
    return compiled(of_tokens.regroup_kernel, constants, capability, spec)


def attention_received(capability: int, rows: int, exact: bool = False, dim: int = 128) -> Iterator[Resources]:
    """Of both kernels, with keys hidden; and of maxima, with logits that are capped."""
    x = "*fp32" if exact else "*bf16"
    types = {"q": x, "k": x, "queries": "i32", "keys": "i32"}
    name = f"{rows} queries{', float32' if exact else ''}"
    for kernel, own, capped in (
        (received.lse_kernel, {}, True),
        (received.received_kernel, {"MOST": False}, False),
        (received.received_kernel, {"MOST": True}, True),
    ):
        constants = ops_scores.received_constants(rows, dim, not own.get("MOST"), capped, exact) | own
        yield compiled(kernel, constants, capability, f"most of {name}" if own.get("MOST") else name, **types)


def every(capabilities: list[int]) -> Iterator[Resources]:
    for capability in capabilities:
        yield from (attend(spec, capability) for spec in WRITTEN)
        yield attend("int(bits=4)", capability, rows=64)
        yield attend("int(bits=4)", capability, dim=80)
        yield from (attend_latents(spec, capability) for spec in LATENT)
        yield from (score(capability, bits) for bits in (16, 8))
        yield merge(capability)
        yield from (write(spec, capability) for spec in WRITTEN)
        yield from (attend(spec, capability, in_tokens=True) for spec in BY_TOKEN)
        yield from (write(spec, capability, single=True) for spec in BY_TOKEN)
        yield from (rotate(capability, back) for back in (False, True))
        yield from (choose(capability, *how) for how in ((1, 1), (1, 4), (16, 1)))
        yield from window(capability)
        yield from (code_dots(capability, bits) for bits in (4, 8))
        yield code_dots(capability, 8, rank=128, page_size=64)
        yield from (regroup(spec, capability) for spec in ("none", "int(bits=4)"))
        for rows, exact in ((1, False), (64, False), (64, True)):
            yield from attention_received(capability, rows, exact)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvcomp.benchmarks.resources", description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", choices=LIMITS, default=list(LIMITS), help="80: sm_80")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each kernel instead of a table")
    options = parser.parse_args()
    if options.json:
        for found in every(options.capability):
            print(json.dumps(asdict(found)))
        return
    table = Table("kernel", "pages", "chip", "registers", "spilled", "KiB", "programs", box=None, header_style="bold")
    for found in every(options.capability):
        shared = f"{found.shared / 1024:.1f}"
        numbers = found.registers, found.spilled, shared, found.programs
        table.add_row(found.kernel, found.stack, f"sm_{found.capability}", *map(str, numbers))
    for column in table.columns:
        column.no_wrap = True
    Plain().print(table)


if __name__ == "__main__":
    main()
