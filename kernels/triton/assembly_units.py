"""Assembly that makes numbers of 16 bits of units: 8 channels whose codes have one width of 1 to 6 bits.

A thread has a token's codes of two units in words of 32 bits, and all places in them are known, so that eight codes
take few instructions. Byte permutes look up both bytes of an entry, 4 codes at once by the nibbles of a selector:

  1 bit       the sign of the only magnitude
  2, 3 bits   one look-up each; codes of even channels are nibbles after a mask, those of odd ones after a shift
  4 bits      by magnitude, with the sign put in afterwards, for entries are symmetric
  5, 6 bits   two or four look-ups by the highest three bits of the magnitude, of which the others choose

Numbers come in the order of channels 0, 2, 4, 6, 1, 3, 5, 7 of each unit.
"""

from __future__ import annotations

from typing import Any

import triton

from .assembly import bits_of


@triton.constexpr_function
def words_of(units: Any) -> Any:
    """Words of 32 bits, from the start of a token's row, that hold the codes of units."""
    return sorted(
        {(at + i) // 4 for _, planes, _, _ in units for at, width in planes for i in range(width)}
    )  # 8 codes of a width of w bits are w bytes


@triton.constexpr_function
def units_asm(units: Any, half: bool) -> str:
    """Numbers of one or two units, 16 in 8 registers; the last 8 are 0 if there is one. Operands: `words_of`."""
    words = {word: f"${8 + i}" for i, word in enumerate(words_of(units))}
    lines: list[str] = []
    names: list[str] = []
    known: dict[str, str] = {}

    def put(op: str, *operands: object) -> str:
        text = f"{op} {{}}, {', '.join(map(str, operands))};"
        if text not in known:
            known[text] = f"r{len(names)}"
            names.append(known[text])
            lines.append(text.format(known[text]))
        return known[text]

    def held(x: int) -> str:
        """A constant that the assembler keeps in a register: made of what it cannot know to be 0, a mask of one bit,
        less that bit. A permute takes one constant, and others are moved into a register each time, unless so."""
        z = put("mov.u32", "%lanemask_eq")
        return put("xor.b32", put("and.b32", z, put("sub.u32", z, 1)), f"{x:#x}")

    def permuted(a: str, b: str, how: Any) -> str:
        return put("prmt.b32", a, b, how if isinstance(how, str) else f"{how:#x}")

    def shifted(x: str, by: int) -> str:
        return put("shr.b32", x, by) if by > 0 else put("shl.b32", x, -by) if by else x

    def lop3(a: str, b: Any, c: Any, table: int) -> str:
        return put("lop3.b32", a, *(x if isinstance(x, str) else f"{x:#x}" for x in (b, c)), f"{table:#x}")

    def both(a: str, b: Any, mask: int) -> str:
        return lop3(a, b, mask, 0xA8)  # (a | b) & mask

    def field(at: int, size: int, clean: bool) -> str:
        """The bytes from `at` on in the low ones of a register; what is above is 0 if `clean`."""
        first, last = at // 4, (at + size - 1) // 4
        if first == last and not (clean and size < 4):
            return shifted(words[first], at % 4 * 8)
        how = sum((at % 4 + i) << 4 * i for i in range(size))
        if first == last:
            return permuted(words[first], "0", how | 0x4444 >> 4 * size << 4 * size)
        found = permuted(words[first], words[last], how)
        return lop3(found, (1 << 8 * size) - 1, 0, 0xC0) if clean and size < 4 else found

    def looked_up(entries: Any, selectors: str) -> str:
        """Bytes by four nibbles; entries: 4 or 8 of a byte."""
        texts = [sum(x << 8 * i for i, x in enumerate(entries[k : k + 4])) for k in range(0, len(entries), 4)]
        return permuted(held(texts[0]), f"{texts[1]:#x}" if len(texts) > 1 else "0", selectors)

    def paired(low: str, high: str, natural: bool) -> list[str]:
        """Four entries by their low and high bytes, in two registers."""
        return [permuted(low, high, how) for how in ((0x6240, 0x7351) if natural else (0x5140, 0x7362))]

    def bytes_of(entries: Any, by: int) -> list[int]:
        return [x >> by & 255 for x in entries]

    def small(width: int, x: str, low: Any, entries: Any, count: int) -> list[list[str]]:
        """Of `count` units of 2 or 3 bits: 4 registers each; x: the plane of 2 bits, low: that of 1 bit spread to
        where the former's pairs are."""
        if width == 2:
            selectors = [lop3(x, 0x33333333, 0, 0xC0), lop3(shifted(x, 2), 0x33333333, 0, 0xC0)]
        else:
            selectors = [lop3(shifted(x, -1), 0x66666666, lop3(low, 0x11111111, 0, 0xC0), 0xEA)]
            selectors.append(lop3(shifted(x, 1), 0x66666666, lop3(shifted(low, 1), 0x11111111, 0, 0xC0), 0xEA))
        found: list[list[str]] = []
        for unit in range(count):
            pairs: list[str] = []
            for chosen in selectors:
                four = shifted(chosen, 16 * unit)
                lows, highs = (looked_up(bytes_of(entries, by), four) for by in (0, 8))
                pairs += paired(lows, highs, False)
            found.append(pairs)
        return found

    def spread(x: str, steps: Any) -> str:
        for by, mask in steps:
            x = both(x, shifted(x, -by), mask)
        return x

    def large(n: str, low: Any, width: int, entries: Any) -> list[str]:
        """Of a unit of 4 to 6 bits; n: the plane of 4 bits, low: the other one's bits, in nibbles."""
        negative = lop3(n, 0x88888888, 0, 0x0C)  # 8 where the entry is
        eighth = shifted(negative, 3)
        mask = put("sub.u32", negative, eighth)  # 7 there
        index = lop3(n, mask, 0x77777777, 0x28)  # (n ^ mask) & 7: the magnitude's highest bits
        upper = entries[len(entries) // 2 :]
        each = len(upper) // 8
        mixes: list[str] = []
        if width == 5:
            mixes = [put("mad.lo.u32", lop3(low, eighth, 0x11111111, 0x28), 4, f"{0x32103210:#x}")]
        elif width == 6:
            two = put("mad.lo.u32", eighth, 3, 0)
            lowest = lop3(low, two, 0x33333333, 0x28)
            mixes = [
                put("mad.lo.u32", lop3(lowest, 0x11111111, 0, 0xC0), 4, f"{0x32103210:#x}"),
                put("mad.lo.u32", lop3(lowest, 0x22222222, 0, 0xC0), 2, f"{0x32103210:#x}"),
            ]
        found = []
        for four in range(2):
            at = shifted(index, 16 * four)
            by_bytes: list[str] = []
            for by in (0, 8):
                chosen = [looked_up(bytes_of(upper[i::each], by), at) for i in range(each)]
                for mix in mixes:
                    how = shifted(mix, 16 * four)
                    chosen = [permuted(chosen[i], chosen[i + 1], how) for i in range(0, len(chosen), 2)]
                by_bytes += chosen
            sign = permuted("0", f"{0x80000000:#x}", shifted(mask, 16 * four))
            found += paired(by_bytes[0], put("or.b32", by_bytes[1], sign), True)
        return [found[i] for i in (0, 2, 1, 3)]

    def decoded() -> list[str]:
        found: list[list[str]] = []
        while len(found) < len(units):
            _, planes, _, table = units[len(found)]
            width = sum(w for _, w in planes)
            entries = [bits_of(x, half) for x in table]
            if width == 1:
                at = planes[0][0]
                byte = permuted(words[at // 4], "0", 0x4440 + at % 4)
                moved = put("mul.lo.u32", byte, f"{1 << 10 | 1 << 24:#x}")  # channel 5 to bit 15, 7 to bit 31
                minus = entries[0] * 0x10001
                found.append([lop3(shifted(moved, -by), 0x80008000, minus, 0x6A) for by in (5, 1, 4, 0)])
            elif width < 4:
                count = 1
                if len(found) == 0 and len(units) == 2:
                    other = units[1]
                    count += all(b == (a[0] + a[1], a[1]) for a, b in zip(planes, other[1], strict=False)) and len(
                        planes
                    ) == len(other[1])
                low = None
                if width == 3:
                    steps = (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)
                    low = spread(field(planes[1][0], count, True), steps if count == 2 else steps[1:])
                found += small(width, field(planes[0][0], 2 * count, False), low, entries, count)
            else:
                low = None
                if width == 5:
                    byte = field(planes[1][0], 1, True)
                    low = spread(byte, ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)))
                elif width == 6:
                    pair = field(planes[1][0], 2, True)
                    low = spread(pair, ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)))
                found.append(large(field(planes[0][0], 4, False), low, width, entries))
        return [x for unit in found for x in unit]

    registers = decoded()
    registers += ["0"] * (8 - len(registers))
    lines += [f"mov.b32 ${i}, {x};" for i, x in enumerate(registers)]
    return f"{{ .reg .b32 {', '.join(names)}; " + " ".join(lines) + " }"
