"""The assembly in `kernels.triton`, which triton's interpreter does not run, read by a machine of a few lines."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kvcomp.kernels.triton import assembly, assembly_units, chunks

MASK = (1 << 32) - 1
WORDS = torch.randint(0, 1 << 32, (4096,), generator=torch.Generator().manual_seed(0))


def pairs_of(x: Tensor, kind: str) -> Tensor:
    """Registers int64 [N] as numbers float64 [N, 2]."""
    halves = torch.stack([x & 0xFFFF, x >> 16], 1).to(torch.int32).to(torch.uint16)
    return halves.view(torch.float16 if kind == "f16x2" else torch.bfloat16).double()


def registers(x: Tensor, kind: str) -> Tensor:
    """Numbers [N, 2], rounded, as registers."""
    bits = x.to(torch.float16 if kind == "f16x2" else torch.bfloat16).view(torch.uint16).to(torch.int64)
    return bits[:, 0] | bits[:, 1] << 16


def permuted(a: Tensor, b: Tensor, how: Tensor) -> Tensor:
    both, found = a | b << 32, torch.zeros_like(a)
    for i in range(4):
        nibble = how >> 4 * i & 15
        assert not (nibble & 8).any(), "replicates a sign"
        found |= (both >> 8 * nibble & 255) << 8 * i
    return found


def run(asm: str, outputs: int, *operands: Tensor) -> list[Tensor]:
    """What the assembly leaves in its first `outputs` operands; the others are given, int64 [N] of 32 bits each."""
    like = operands[0]
    held = {f"${outputs + i}": x for i, x in enumerate(operands)}
    held["%lanemask_eq"] = torch.full_like(like, 1 << 7)

    def value(name: str) -> Tensor:
        return held[name] if name in held else torch.full_like(like, int(name, 0))

    for line in asm.strip("{ }").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, rest = line.split(maxsplit=1)
        to, *names = (x.strip() for x in rest.split(","))
        x = [value(name) for name in names]
        kind = op.rsplit(".", 1)[1]
        assert not kind.endswith("x2") or set(names) <= held.keys(), "takes no constants"
        match op.split(".")[0]:
            case "mov":
                found = x[0]
            case "shr":
                found = x[0] >> x[1]
            case "shl":
                found = x[0] << x[1]
            case "and":
                found = x[0] & x[1]
            case "or":
                found = x[0] | x[1]
            case "xor":
                found = x[0] ^ x[1]
            case "sub":
                found = x[0] - x[1]
            case "mad":
                found = x[0] * x[1] + x[2]
            case "lop3":
                found = sum(
                    (x[0] if i & 4 else ~x[0]) & (x[1] if i & 2 else ~x[1]) & (x[2] if i & 1 else ~x[2])
                    for i in range(8)
                    if int(names[3], 0) >> i & 1
                )
            case "prmt":
                found = permuted(*x)
            case "mul" if kind == "u32":
                found = x[0] * x[1]
            case "mul":
                found = registers(pairs_of(x[0], kind) * pairs_of(x[1], kind), kind)
            case "fma":
                found = registers(pairs_of(x[0], kind) * pairs_of(x[1], kind) + pairs_of(x[2], kind), kind)
            case _:
                raise AssertionError(op)
        held[to] = found & MASK
    return [held[f"${i}"] for i in range(outputs)]


def decoded(asm: str, pack: int, half: bool, *operands: Tensor) -> Tensor:
    """Numbers float64 [N, pack] of a register's columns."""
    kind = "f16x2" if half else "bf16x2"
    return torch.cat([pairs_of(x, kind) for x in run(asm, pack // 2, *operands)], 1)


def codes(pack: int, width: int, lane: int) -> Tensor:
    """[N, pack] of a register's columns."""
    columns = torch.stack([WORDS >> i * (32 // pack) & (1 << 32 // pack) - 1 for i in range(pack)], 1)
    return columns >> lane * width & (1 << width) - 1


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("pack", [2, 4])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_uniform_codes_are_exact(width: int, pack: int, half: bool) -> None:
    for lane in range(32 // pack // width):
        for middle in {0, (1 << width - 1) - 1, 1 << width - 1}:
            asm = assembly.uniform_asm(pack, width, lane, middle, half)
            assert torch.equal(decoded(asm, pack, half, WORDS), (codes(pack, width, lane) - middle).double())


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("pack", [2, 4])
@pytest.mark.parametrize("width", [2, 4])
def test_codebooks_are_looked_up(width: int, pack: int, half: bool) -> None:
    entries = torch.randn(1 << width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sort()[0].float()
    entries = (entries - entries.flip(0)) / 2 if width == 4 else entries
    rounded = entries.to(torch.float16 if half else torch.bfloat16).double()
    for lane in range(32 // pack // width):
        asm = assembly.codebook_asm(pack, width, lane, tuple(entries.tolist()), half)
        assert torch.equal(decoded(asm, pack, half, WORDS), rounded[codes(pack, width, lane)])


ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of a unit's channels


def placed_units(first: tuple[int, ...], second: tuple[int, ...] | None, at: int) -> tuple[chunks.Unit, ...]:
    """Units of planes of these widths, from byte `at` on: of one segment if alike, else a byte lies in between."""
    both = [first] if second is None else [first, second]
    units = []
    for i, widths in enumerate(both):
        planes = []
        for width in widths:
            planes.append((at + i * width if first == second else at, width))
            at += 2 * width if first == second else width
        entries = torch.randn(1 << sum(widths), generator=torch.Generator().manual_seed(sum(widths)))
        entries = (entries.sort()[0] - entries.sort(descending=True)[0]) / 2
        units.append((8 * i, tuple(planes), 0, tuple(entries.tolist())))
        at = at + 1 if first != second else planes[0][0]
    return tuple(units)


def unit_numbers(row: Tensor, unit: chunks.Unit, half: bool) -> Tensor:
    """Numbers float64 [N, 8] of a unit, from bytes int64 [N, n]."""
    _, planes, _, entries = unit
    codes = torch.zeros(len(row), 8, dtype=torch.int64)
    for at, width in planes:
        bits = torch.stack([row[:, at + i // 8] >> i % 8 & 1 for i in range(8 * width)], 1).unflatten(1, (8, width))
        codes = codes << width | (bits << torch.arange(width)).sum(-1)
    return torch.tensor(entries).to(torch.float16 if half else torch.bfloat16).double()[codes]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("first", chunks.UNIT_WIDTHS)
def test_units_are_looked_up(first: tuple[int, ...], at: int, half: bool) -> None:
    for second in (None, *chunks.UNIT_WIDTHS):
        units = placed_units(first, second, at)
        row = torch.randint(0, 256, (4096, 32), generator=torch.Generator().manual_seed(at))
        words = (row.unflatten(1, (8, 4)) << torch.arange(0, 32, 8)).sum(-1)
        held = [words[:, i] for i in assembly_units.words_of(units)]
        found = run(assembly_units.units_asm(units, half), 8, *held)
        for i, unit in enumerate(units):
            pairs = torch.cat([pairs_of(x, "f16x2" if half else "bf16x2") for x in found[4 * i : 4 * i + 4]], 1)
            assert torch.equal(pairs, unit_numbers(row, unit, half)[:, ORDER]), (second, i)
        assert second is not None or not any(x.any() for x in found[4:])


def numbers(form: str, code: Tensor) -> Tensor:
    """float64 of codes of a format."""
    if form == "e2m1":
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        return magnitudes[code & 7] * (1 - 2 * (code >> 3))
    if form == "e8m0":
        return torch.exp2(code.double() - 127)
    dtype = torch.float8_e4m3fn if form == "e4m3" else torch.float8_e5m2
    return code.to(torch.uint8).view(dtype).double()


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("form", ["e4m3", "e5m2", "e2m1"])
def test_floats_are_exact(form: str, half: bool) -> None:
    width = 4 if form == "e2m1" else 8
    for lane in range(16 // width):
        code = codes(2, width, lane)
        finite = numbers(form, code).isfinite().all(1)
        found = decoded(assembly.float_asm(form, "", lane, half), 2, half, WORDS)
        assert torch.equal(found[finite], numbers(form, code)[finite])


@pytest.mark.parametrize(("scale", "half"), [("e4m3", True), ("e4m3", False), ("e8m0", False)])
def test_floats_with_scales_are_exact(scale: str, half: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    most = (0x7F, 255)[scale == "e8m0"]
    by = torch.randint(0, most, (len(WORDS), 2), generator=generator)
    raised = by
    less = 2.0**7 if half else 1.0
    if scale == "e8m0":
        by = by.clamp(80, 190)  # beyond, numbers no bfloat16 has
        raised, less = by + 64, 2.0**62
    for lane in range(4):
        asm = assembly.float_asm("e2m1", scale, lane, half)
        found = decoded(asm, 2, half, WORDS, raised[:, 0] | raised[:, 1] << 16)
        assert torch.equal(found * less, numbers("e2m1", codes(2, 4, lane)) * numbers(scale, by))


def test_the_machine_would_see_a_fault() -> None:
    asm = assembly.uniform_asm(2, 4, 1, 8, True)
    broken = re.sub(r"0x(f0)00f0", "0xf800f0", asm)
    assert broken != asm
    assert not torch.equal(decoded(broken, 2, True, WORDS), decoded(asm, 2, True, WORDS))
