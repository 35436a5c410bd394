"""Pages of floating-point codes: a scale in a format of its own, and the nearest numbers of another."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .pack import put_codes

NORMAL = tl.constexpr(2.0**-126)


@triton.constexpr_function
def of_format(name: str) -> tuple[int, int, float]:
    """Mantissa bits, the exponent of subnormal numbers and the largest number of a format."""
    return {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0), "e2m1": (1, 0, 6.0)}[name]


@triton.constexpr_function
def halvings(n: int) -> int:
    """log2 n."""
    return n.bit_length() - 1


@triton.jit
def float_sizes(x, FORMAT: tl.constexpr):
    """The nearest numbers of a format to |x|, ties to even, the largest beyond it."""
    BITS: tl.constexpr = of_format(FORMAT)[0]
    LEAST: tl.constexpr = of_format(FORMAT)[1]
    LARGEST: tl.constexpr = of_format(FORMAT)[2]
    size = tl.minimum(tl.abs(x), LARGEST)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 127 + LEAST)
    rounding = ((exponent - BITS + 23) << 23 | 1 << 22).to(tl.float32, bitcast=True)  # its last bit is worth a step
    return (size + rounding) - rounding


@triton.jit
def float_error(x, FORMAT: tl.constexpr):
    """Squared error [T, G, 1] of x [T, G, R] in a format, summed by halves as in quantizers/floats.py."""
    error = float_sizes(x, FORMAT) - tl.abs(x)
    error = error * error
    for i in tl.static_range(halvings(x.shape[2])):
        error = tl.sum(tl.reshape(error, (x.shape[0], x.shape[1], 2, x.shape[2] >> i + 1)), 2)
    return error


@triton.jit
def float_codes(x, FORMAT: tl.constexpr):
    """Codes int32 of the nearest numbers of a format, ties to even, the largest beyond it."""
    BITS: tl.constexpr = of_format(FORMAT)[0]
    LEAST: tl.constexpr = of_format(FORMAT)[1]
    size = float_sizes(x, FORMAT)
    unit = 2.0 ** (LEAST + 14)  # the format's numbers over this are those of float16 with the same bits
    bits = (size / unit).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32) >> (10 - BITS)
    SIGN: tl.constexpr = 8 if FORMAT == "e2m1" else 128
    return tl.where(x.to(tl.int32, bitcast=True) < 0, bits | SIGN, bits)


@triton.jit
def power(e8m0):
    """2^(e8m0 - 127) of int32 codes."""
    return tl.where(e8m0 > 0, e8m0 << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def float_scales(x, page, there, C: tl.constexpr):
    """Scales float32 [T, G, 1] of x float32 [T, G, R], and what is stored of them, int32; page: the page's scale, where
    it has one."""
    FORMAT: tl.constexpr = C.format
    SCALES: tl.constexpr = C.scale_format
    LARGEST: tl.constexpr = of_format(FORMAT)[2]
    largest = tl.max(tl.where(there, tl.abs(x), 0), 2, keep_dims=True)
    if SCALES == "bf16":
        scale = tl.minimum(tl.maximum(tl.div_rn(largest, LARGEST), NORMAL), 2.0**112)
        bits = scale.to(tl.int32, bitcast=True)
        stored = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # the nearest, ties to even: the interpreter truncates
        scale = (stored << 16).to(tl.float32, bitcast=True)
    elif SCALES == "e8m0":
        stored = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 2, 0), 252)
        y = tl.div_rn(x, power(stored))
        stored += (float_error(y / 2, FORMAT) < float_error(y, FORMAT) / 4).to(tl.int32)
        stored = tl.minimum(stored, 252)
        scale = power(stored)
    else:
        stored = tl.div_rn(tl.div_rn(largest, LARGEST), page)
        stored = float_codes(tl.maximum(stored, 2.0**-9), "e4m3")
        scale = (stored << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0 * page
    return scale, stored


@triton.jit
def page_scale(most, C: tl.constexpr):
    """The scale of a page whose largest magnitude is `most`; 1 where pages have none."""
    LARGEST: tl.constexpr = of_format(C.format)[2]
    found = 1.0
    if C.page_scale >= 0:
        found = tl.minimum(tl.maximum(tl.div_rn(most, LARGEST * 448.0), NORMAL), 2.0**115)
    return found


@triton.jit
def floats_coded(x, most, there, C: tl.constexpr):
    """x float32 [T, G, R] as its codes have it in a page whose largest magnitude is `most`."""
    FORMAT: tl.constexpr = C.format
    scale, _stored = float_scales(x, page_scale(most, C), there, C)
    size = float_sizes(tl.div_rn(x, scale), FORMAT) * scale
    return tl.where(x < 0, -size, size)


@triton.jit
def put_floats(record, x, most, tile, token, run, seen, there, C: tl.constexpr):
    """Writes x float32 [T, G, R] as numbers of a format; most: the largest magnitude of the page, where it counts."""
    FORMAT: tl.constexpr = C.format
    SCALES: tl.constexpr = C.scale_format
    PAGE: tl.constexpr = C.page_scale
    CHANNELS: tl.constexpr = C.channels
    GROUP: tl.constexpr = C.channel_group
    COUNT: tl.constexpr = (CHANNELS + GROUP - 1) // GROUP
    SCALE: tl.constexpr = C.scale
    at, shown = token * COUNT + run // GROUP, seen & (run < CHANNELS)
    page = page_scale(most, C)
    if (PAGE >= 0) & (tile == 0):
        tl.store((record + PAGE).to(tl.pointer_type(tl.float32)), page)
    scale, stored = float_scales(x, page, there, C)
    if SCALES == "bf16":
        tl.store((record + (SCALE + at * 2)).to(tl.pointer_type(tl.uint16)), stored.to(tl.uint16), mask=shown)
    else:
        tl.store(record + (SCALE + at), stored.to(tl.uint8), mask=shown)
    put_codes(record, float_codes(tl.div_rn(x, scale), FORMAT), token, run, seen, C)
