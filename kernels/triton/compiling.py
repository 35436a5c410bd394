"""Kernels compiled for a chip that need not be there, and their machine code: registers, loops, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

LIMITS = {80: 163, 90: 227, 100: 227}  # KiB of shared memory a program, by compute capability
REGISTERS, PROGRAMS, THREADS = 65536, 32, 2048  # of a processor
RESERVED = 1024  # bytes of shared memory that each program takes besides
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
POINTERS = {
    "q": "*bf16",
    "token_q": "*bf16",
    "pool": "*u8",
    "ids": "*i32",
    "counts": "*i64",
    "skipped": "*i64",
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
FLOATS = (
    *("bias", "token_bias", "out", "lse", "lse_of_tiles", "partial", "partial_lse", "prior", "prior_lse"),
    *("other", "share"),
)
SCALARS = ("scale", "softcap")
ALIGNED = (  # multiples of 16, for all usual dimensions
    *("k_dim", "token_dim", "v_dim", "wide", "other_dim", "keys_stride", "values_stride"),
)
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
BRANCH = re.compile(r"BRA(?:\.\w+)*\s+(?:[!\w]+,\s*)*0x([0-9a-f]+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code for a chip; shared: bytes of shared memory a program."""

    name: str
    capability: int
    cubin: bytes
    warps: int
    shared: int

    @cached_property
    def _usage(self) -> dict[str, int]:
        found = re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("--dump-resource-usage", self.cubin))
        return {key: int(value) for key, value in found}

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self._usage["REG"]

    @property
    def spilled(self) -> int:
        """Bytes of stack and local memory a thread."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @property
    def spilled_in_loops(self) -> int:
        """Instructions of loops that move a register to local memory or back."""
        return sum(text.startswith(("LDL", "STL")) for loop in self.loops for text in loop)

    @property
    def programs(self) -> int:
        """That fit a processor."""
        threads = 32 * self.warps
        each = -(-self.registers // 8) * 8 * threads  # registers are given out by eights
        rooms = REGISTERS // each, THREADS // threads, PROGRAMS
        return min(*rooms, (LIMITS[self.capability] + 1) * 1024 // (self.shared + RESERVED))

    @cached_property
    def instructions(self) -> tuple[tuple[int, str], ...]:
        """(address, instruction without its predicate), in order."""
        found = map(INSTRUCTION.match, _cuobjdump("--dump-sass", self.cubin).splitlines())
        return tuple((int(line[1], 16), line[2]) for line in found if line)

    @cached_property
    def loops(self) -> tuple[tuple[str, ...], ...]:
        """The instructions of each loop that lies in no other, in order."""
        at = {address: i for i, (address, _) in enumerate(self.instructions)}
        spans: list[tuple[int, int]] = []
        for i, (address, text) in enumerate(self.instructions):
            to = BRANCH.match(text)
            if to and int(to[1], 16) < address:
                spans.append((at[int(to[1], 16)], i))
        outer = [s for s in spans if not any(o[0] <= s[0] and s[1] <= o[1] and o != s for o in spans)]
        return tuple(tuple(text for _, text in self.instructions[a : b + 1]) for a, b in sorted(outer))


def compiled(kernel: Any, constants: dict[str, Any], capability: int, **pointers: str) -> Compiled:
    """`kernel`, compiled for a chip and for `constants`, options among them."""
    options = {key: constants[key] for key in OPTIONS if constants.get(key) is not None}
    constants = {key: value for key, value in constants.items() if key not in OPTIONS}
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
    name = kernel.fn.__name__.removesuffix("_kernel")
    return Compiled(name, capability, made.asm["cubin"], made.metadata.num_warps, made.metadata.shared)


def _cuobjdump(what: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
