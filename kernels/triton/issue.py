"""What bandwidth instruction issue allows the decode kernel: `python -m kvcomp.kernels.triton.issue`. Needs no GPU.

A processor of a GPU has four schedulers, each of which issues one instruction of one warp a cycle. A loop of n
instructions a warp that w warps run for a tile of b bytes of pages takes n w / 4 cycles of a processor at least, so

  bytes / s <= processors * clock * 4 b / (n w),

which is printed as a share of what a copy moves there. The kernel is compiled for the chip, and the instructions of its
loop over pages are counted. It says nothing of latencies: a kernel may be slower than this, and is never faster.

A processor's shared memory moves 128 bytes a cycle, which is printed as such a share likewise: of accesses that have no
conflicts, and in which no two threads read the same bytes, which cost less.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvcomp import Stack
from kvcomp.layout import PageLayout

from . import attention, chunks, ops, plan, tiling
from .compiling import Compiled, compiled

STACKS = (
    *("none", "int8", "fp8", "int(bits=4)", "int(bits=2)", "kivi(bits=4)", "kivi(bits=2)"),
    *("turboquant(bits=4)", "turboquant(bits=2)", "nvfp4", "mxfp4", "klt(bits=4)", "klt(bits=2)"),
)
PROCESSORS, CLOCK, SCHEDULERS = 132, 1.98e9, 4  # of an H200
COPY = 4.3e12  # bytes / s that a copy moves there
CAPABILITY = 90


@dataclass(frozen=True)
class Issue:
    """The decode kernel's loop over pages. instructions: of a warp and tile of `tile` tokens; share, shared: what issue
    and shared memory allow, of a copy's bandwidth; spilled: instructions of the loops that spill registers; the most
    frequent in `mix`."""

    stack: str
    dim: int
    rows: int
    page: int
    tile: int
    bytes: float
    instructions: int
    warps: int
    share: float
    shared: float
    registers: int
    spilled: int
    programs: int
    mix: dict[str, int]


def built(spec: str, dim: int, centred: bool = True) -> tuple[Any, PageLayout]:
    """The codec and pages of a stack; one that fits its basis has seen keys whose channels differ in size."""
    stack = Stack.parse(spec).plan(0, 1)
    codec, layout = stack.build(stack.shape(dim, dim, 1, torch.bfloat16, centred=centred))
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(1, 512, dim, generator=generator, dtype=torch.float32, device="cpu")
    seen = seen * torch.linspace(2, -2, dim, dtype=torch.float32, device="cpu").exp()
    codec.fit(torch.zeros(1, dtype=torch.int64, device="cpu"), seen, seen)
    return codec, layout


def attend(
    spec: str, capability: int = CAPABILITY, rows: int = 16, dim: int = 128, in_tokens: bool = False
) -> tuple[Compiled, tiling.Description, float]:
    """The decode kernel with the window in the same launch where `plan.together` says so, `in_tokens`: over pages that
    are filled in part; what it was compiled for, and the bytes of a page that it reads for each token."""
    codec, layout = built(spec, dim)
    sides = codec.kernel_layouts()
    assert sides is not None
    one, described = chunks.numbers(dim, torch.bfloat16), tiling.described(sides, layout)
    constants = ops.attention_constants(
        described,
        layout.bytes_per_page,
        (one, one) if plan.together(bool(layout.centres), rows, codec.rotates and len(described.k) > 1) else ((), ()),
        plan.tokens_tile(dim * torch.bfloat16.itemsize),
        plan.blocked(rows, described.centred),
        exact=False,
    )
    biased = codec.read_query(torch.zeros(1, 1, dim, dtype=torch.float32, device="cpu"))[1] is not None
    constants |= {
        "BIAS": biased,
        "TOKEN_BIAS": False,
        "SKIPPED": False,
        "SOFTCAP": False,
        "LSE_OF_TILES": False,
        "IN_TOKENS": in_tokens,
    }
    made = compiled(attention.attend_kernel, constants, capability, q="*fp32" if codec.rotates else "*bf16")
    return made, described, layout.body_bytes / layout.page_size


def shared_cycles(text: str) -> int:
    """Of shared memory, of 128 bytes each, for an instruction of a warp."""
    name, *kinds = text.split()[0].split(".")
    if name not in ("LDS", "STS", "LDSM", "LDGSTS"):
        return 0
    if name == "LDSM":
        return int(kinds[-1]) if kinds[-1].isdigit() else 1
    return 4 if "128" in kinds else 2 if "64" in kinds else 1


def issue(spec: str, dim: int = 128, rows: int = 16) -> Issue:
    """Of one stack."""
    made, described, each = attend(spec, CAPABILITY, rows, dim)
    loop = made.loops[0]  # the other is the window's
    mix = Counter(text.split()[0].split(".")[0] for text in loop)
    moved = each * described.tile
    share = PROCESSORS * CLOCK * SCHEDULERS * moved / (len(loop) * made.warps) / COPY
    cycles = sum(map(shared_cycles, loop)) * made.warps
    shared = PROCESSORS * CLOCK * moved / max(cycles, 1) / COPY
    sizes = described.page_size, described.tile, moved, len(loop), made.warps, share, shared
    fit = made.registers, made.spilled_in_loops, made.programs
    return Issue(*(spec, dim, rows, *sizes, *fit), dict(mix.most_common(12)))


def every(specs: list[str], dims: list[int], rows: list[int]) -> Iterator[Issue]:
    for dim in dims:
        for spec in specs:
            known: dict[int, Issue] = {}
            for n in rows:
                block = plan.blocked(n)  # programs of as many rows are the same
                known[block] = known.get(block) or issue(spec, dim, n)
                yield Issue(**asdict(known[block]) | {"rows": n})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvcomp.kernels.triton.issue", description=__doc__)
    parser.add_argument("stack", nargs="*", default=list(STACKS), help="all that the table has by default")
    parser.add_argument("--dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each instead of a table")
    parser.add_argument("--mix", action="store_true", help="print the most frequent instructions, too")
    options = parser.parse_args()
    if not options.json:
        head = "stack", "D", "rows", "page", "tile", "bytes", "instr", "warps", "of copy", "shared", "regs", "spilled"
        form = "{:20} {:>4} {:>4} {:>5} {:>5} {:>7} {:>6} {:>5} {:>8} {:>8} {:>5} {:>7} {:>8}"
        print(form.format(*head, "programs"), flush=True)
    for found in every(options.stack, options.dim, options.rows):
        if options.json:
            print(json.dumps(asdict(found)), flush=True)
            continue
        print(
            f"{found.stack:20} {found.dim:4} {found.rows:4} {found.page:5} {found.tile:5} {found.bytes:7.0f} "
            f"{found.instructions:6} {found.warps:5} {found.share:8.1%} {found.shared:8.1%} {found.registers:5} "
            f"{found.spilled:7} {found.programs:8}",
            flush=True,
        )
        if options.mix:
            print("   ", " ".join(f"{name} {n}" for name, n in found.mix.items()), flush=True)


if __name__ == "__main__":
    main()
