"""What the Triton kernels need of a chip: `python -m kvcomp.benchmarks.resources`. Compiles them; no GPU is needed."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcomp import Stack
from kvcomp.console import Plain
from kvcomp.kernels.placed import NOTHING
from kvcomp.kernels.triton import (
    attention,
    chunks,
    encode,
    ops,
    ops_records,
    ops_scores,
    pieces,
    plan,
    received,
    summaries,
)
from kvcomp.kernels.triton import merge as merging
from kvcomp.kernels.triton import tokens as of_tokens
from kvcomp.layout import PageLayout
from kvcomp.stages import Codec, PageShape

LIMITS = {80: 163, 90: 227, 100: 227}  # KiB of shared memory a program, by compute capability
REGISTERS, PROGRAMS, THREADS = 65536, 32, 2048  # of a processor
RESERVED = 1024  # bytes of shared memory that each program takes besides
WRITTEN = (
    *("none", "kivi(bits=4)", "kivi(bits=2)", "int(bits=4)", "turboquant(bits=4)"),
    *("fp8", "nvfp4", "mxfp4", "klt(bits=2)"),
)
LATENT = ("none", "int(bits=4)")
BY_TOKEN = ("none", "int(bits=4)", "int(bits=2)", "turboquant(bits=4)", "fp8", "mxfp4")  # stacks without a window
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
POINTERS = {
    "q": "*bf16",
    "pool": "*u8",
    "ids": "*i32",
    "counts": "*i64",
    "k_codebook": "*fp16",
    "v_codebook": "*bf16",
    "keys": "*u8",
    "values": "*u8",
    "token_counts": "*i64",
    "tokens": "*i64",
    "records": "*u8",
    "visible": "*u8",
    "k_thresholds": "*fp32",
    "v_thresholds": "*fp32",
}
FLOATS = ("bias", "token_bias", "out", "lse", "lse_of_tiles", "partial", "partial_lse", "prior", "prior_lse")
SCALARS = ("scale", "softcap")
ALIGNED = ("k_dim", "v_dim", "keys_stride", "values_stride")  # multiples of 16, for all usual dimensions


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


def compiled(kernel: Any, constants: dict[str, Any], capability: int, name: str, **pointers: str) -> Resources:
    """Resources of `kernel`, compiled for a chip and for `constants`, options among them."""
    options = {key: constants.pop(key) for key in OPTIONS if key in constants}
    known = POINTERS | dict.fromkeys(FLOATS, "*fp32") | pointers
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        signature[argument] = known.get(argument, "fp32" if argument in SCALARS else "i32")
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in known or argument in ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _usage(made.asm["cubin"])
    threads, shared = 32 * made.metadata.num_warps, made.metadata.shared
    rooms = REGISTERS // (usage["REG"] * threads), THREADS // threads, PROGRAMS
    programs = min(*rooms, (LIMITS[capability] + 1) * 1024 // (shared + RESERVED))
    spilled = usage["STACK"] + usage["LOCAL"]
    return Resources(
        kernel.fn.__name__.removesuffix("_kernel"), name, capability, usage["REG"], spilled, shared, programs
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the only function in it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def built(spec: str, dim: int, centred: bool = True) -> tuple[Codec, PageLayout]:
    """The codec and pages of a stack; one that fits its basis has seen keys whose channels differ in size."""
    stack = Stack.parse(spec).plan(0, 1)
    shape = PageShape(stack.page_size, dim, dim, 1, torch.bfloat16, torch.device("cpu"), 0, centred)
    codec, layout = stack.build(shape)
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(1, 512, dim, generator=generator, dtype=torch.float32, device="cpu")
    seen = seen * torch.linspace(2, -2, dim, dtype=torch.float32, device="cpu").exp()
    codec.fit(torch.zeros(1, dtype=torch.int64, device="cpu"), seen, seen)
    return codec, layout


def attend(spec: str, capability: int, rows: int = 16, dim: int = 128, in_tokens: bool = False) -> Resources:
    """Of attention with the window in the same launch where `plan.together` says so; `in_tokens`: over pages that are
    filled in part."""
    codec, layout = built(spec, dim)
    sides = codec.kernel_layouts()
    assert sides is not None
    one, described = chunks.numbers(dim, torch.bfloat16), chunks.described(sides, layout)
    constants = ops.attention_constants(
        described,
        layout.bytes_per_page,
        (one, one) if plan.together(codec.rotates, bool(layout.centres), rows) else ((), ()),
        plan.tokens_tile(dim * torch.bfloat16.itemsize),
        plan.blocked(rows, described.centred),
        exact=False,
    )
    biased = codec.read_query(torch.zeros(1, 1, dim, dtype=torch.float32, device="cpu"))[1] is not None
    constants |= {"BIAS": biased, "TOKEN_BIAS": False, "SOFTCAP": False, "LSE_OF_TILES": False, "IN_TOKENS": in_tokens}
    queries = "*fp32" if codec.rotates else "*bf16"
    name = spec if rows == chunks.NARROWEST else f"{spec}, {rows} rows"
    name = name if dim == 128 else f"{name}, {dim} channels"
    name = f"{name}, filled in part" if in_tokens else name
    return compiled(attention.attend_kernel, constants, capability, name, q=queries)


def attend_latents(spec: str, capability: int, rank: int = 512, rotary: int = 64) -> Resources:
    """Of attention over latents of DeepSeek's width, whose values share the bytes of their keys."""
    plan_of = replace(Stack.parse(spec).plan(0, 1), latent=True)
    codec, layout = plan_of.build(plan_of.shape(rank + rotary, rank, 1, torch.bfloat16))
    sides = codec.kernel_layouts()
    assert sides is not None
    tokens = chunks.numbers(rank + rotary, torch.bfloat16), chunks.numbers(rank, torch.bfloat16)
    rows = plan.blocked(128, k_dim=rank + rotary)
    constants = ops.attention_constants(
        chunks.described(sides, layout),
        layout.bytes_per_page,
        tokens if plan.together(codec.rotates, False, rows) else ((), ()),
        plan.tokens_tile((rank + rotary) * torch.bfloat16.itemsize),
        rows,
        exact=False,
    )
    constants |= dict.fromkeys(("BIAS", "TOKEN_BIAS", "SOFTCAP", "LSE_OF_TILES", "IN_TOKENS"), False)
    queries = "*fp32" if codec.rotates else "*bf16"
    return compiled(attention.attend_kernel, constants, capability, f"{spec}, latents", q=queries)


def merge(capability: int, dim: int = 128) -> Resources:
    constants = {"PRIOR": True, "SPLITS": ops.SPLITS, "BLOCK": dim, "num_warps": ops.WARPS}
    constants |= {"PAGE": 64, "IN_TOKENS": True, "TOKENS": True}
    return compiled(merging.merge_kernel, constants, capability, "all")


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
