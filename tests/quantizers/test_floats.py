"""fp8, int8, nvfp4 and mxfp4 against their formats' definitions, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import SpecError, Stack
from kvcomp.cache.pool import PagePool
from kvcomp.quantizers.floats import e2m1_error, e2m1_values, float8_values, to_e2m1
from kvcomp.quantizers.packing import unpack_codes
from kvcomp.stages import Codec, PageShape

CPU = torch.device("cpu")
DIMS = [64, 80, 96, 128, 256]
ODD_DIMS = [2, 24, 72, 100]  # no block divides them
SPECS = ["fp8", "fp8(format=e5m2)", "int8", "nvfp4", "mxfp4"]
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SIZES = [1e-6, 1e-3, 1.0, 300.0, 1e5]


def numbers(exponent_bits: int, mantissa_bits: int, count: int) -> Tensor:
    """float64 [count]: the non-negative numbers of a small float, in the order of their codes."""
    bias, unit = 2 ** (exponent_bits - 1) - 1, 1 << mantissa_bits
    values = []
    for code in range(count):
        exponent, mantissa = divmod(code, unit)
        significand = mantissa / unit + (exponent > 0)
        values.append(significand * 2.0 ** (max(exponent, 1) - bias))
    return torch.tensor(values, dtype=torch.float64)


E2M1 = numbers(2, 1, 8)
NUMBERS = {"e4m3": numbers(4, 3, 127), "e5m2": numbers(5, 2, 124)}  # the codes that follow are nan and inf


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Codes of float64 |x| among ascending values: the nearest, ties to the even code, the last one beyond."""
    size = x.abs()
    above = torch.searchsorted(values, size).clamp(1, len(values) - 1)
    down, up = size - values[above - 1], values[above] - size
    return torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)


def clear(x: Tensor, values: Tensor) -> Tensor:
    """Whether float64 |x| is so far from every rounding boundary that float32 arithmetic cannot cross one."""
    thresholds = (values[1:] + values[:-1]) / 2
    return ((x.abs()[..., None] - thresholds).abs() > 1e-5 * thresholds).all(-1)


def build(spec: str, k_dim: int, v_dim: int | None = None, page_size: int = 16) -> Codec:
    """A codec whose pages have no centre: their numbers are the formats'."""
    shape = PageShape(page_size, k_dim, v_dim or k_dim, 1, torch.float32, CPU, 0, centred=False)
    return Stack.parse(spec).quantizer.codec(shape)


def encode(codec: Codec, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return codec.encode(k, v, torch.zeros(len(k), dtype=torch.int64))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_half() -> Tensor:
    """All finite float16 and bfloat16 numbers, and the float32 neighbours of E2M1's numbers and boundaries."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    marks = torch.cat([E2M1, (E2M1[1:] + E2M1[:-1]) / 2]).float()
    marks = torch.cat([marks, -marks])
    beside = [torch.nextafter(marks, torch.full_like(marks, side)) for side in (-math.inf, math.inf)]
    x = torch.cat([bits.view(torch.float16).float(), bits.view(torch.bfloat16).float(), marks, *beside])
    return x[x.isfinite()]


def test_e2m1_is_the_nearest_number_with_ties_to_even_for_every_half() -> None:
    x = every_half()
    codes = to_e2m1(x)
    assert codes.dtype == torch.uint8
    assert torch.equal((codes & 7).long(), nearest(x.double(), E2M1))
    assert torch.equal(codes >= 8, x.signbit())  # of zeros too
    assert bool((codes < 16).all())


def test_e2m1_errors_are_those_of_the_codes_for_every_half() -> None:
    x = every_half()
    assert torch.equal(e2m1_error(x[:, None]), (e2m1_values(CPU)[to_e2m1(x).int()] - x).square())


def test_e2m1_codes_stand_for_sign_exponent_and_mantissa() -> None:
    assert E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codebook = e2m1_values(CPU)
    assert torch.equal(codebook.double(), torch.cat([E2M1, -E2M1]))
    assert torch.equal(to_e2m1(codebook), torch.arange(16, dtype=torch.uint8))


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_codes_stand_for_what_torch_and_the_definition_say(name: str) -> None:
    values, codebook = NUMBERS[name], float8_values(FLOAT8[name], CPU).double()
    assert torch.equal(codebook[: len(values)], values)
    assert torch.equal(codebook[128 : 128 + len(values)], -values)
    assert not codebook[len(values)].isfinite()
    assert float(values[-1]) == torch.finfo(FLOAT8[name]).max


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("size", SIZES)
def test_fp8_codes_are_the_nearest_to_a_token_over_its_scale(name: str, size: float) -> None:
    values = NUMBERS[name]
    x = size * gaussian(4, 16, 64)
    x[0, :, :63] *= 10.0 ** -torch.arange(63).div(9)  # down into the subnormal numbers
    page = encode(build(f"fp8(format={name})", 64), x, x)
    codes, scale = page["k.codes8"], page["k.scale"]
    assert codes.dtype == FLOAT8[name]
    exact = x.double().abs().amax(-1, keepdim=True) / values[-1]
    torch.testing.assert_close(scale.double(), exact, rtol=2**-8, atol=0)
    scaled = x.double() / scale.double()
    certain = clear(scaled, values)
    assert certain.double().mean() > 0.99
    assert torch.equal((codes.view(torch.uint8) & 127).long()[certain], nearest(scaled, values)[certain])
    assert torch.equal(codes.view(torch.uint8) > 127, x.signbit())
    assert torch.equal(codes.view(torch.uint8), (x / scale.float()).to(FLOAT8[name]).view(torch.uint8))


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e-2, 1.0, 1e4, 1e30])
def test_fp8_scales_of_sixteen_bits_lose_nothing(name: str, size: float) -> None:
    values, x = NUMBERS[name], size * gaussian(64, 16, 64)

    def error(scale: Tensor) -> float:
        codes = nearest(x.double() / scale.double(), values)
        return float((values[codes] * scale.double() - x.double().abs()).square().mean())

    codec = build(f"fp8(format={name})", 64)
    ours = float((codec.decode(encode(codec, x, x))[0].double() - x.double()).square().mean())
    exact = x.double().abs().amax(-1, keepdim=True) / values[-1]
    assert ours < 1.005 * error(exact)
    if size == 1e-4:  # of float16 the same cannot be said
        assert error(exact.half()) > 1.1 * error(exact)


@pytest.mark.parametrize("name", FLOAT8)
@given(size=st.sampled_from(SIZES), outlier=st.sampled_from([1, 100, 10_000]), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_fp8_error_is_relative_whatever_the_other_channels(name: str, size: float, outlier: int, seed: int) -> None:
    x = size * gaussian(1, 16, 64, seed=seed)
    x[..., 7] *= outlier
    codec = build(f"fp8(format={name})", 64)
    page = encode(codec, x, x)
    half, floor = {"e4m3": (2**-4, 2**-10), "e5m2": (2**-3, 2**-17)}[name]
    bound = (half * x.abs()).maximum(floor * page["k.scale"].float()) * (1 + 1e-6)
    assert bool(((codec.decode(page)[0] - x).abs() <= bound).all())


@pytest.mark.parametrize("dim", DIMS + ODD_DIMS)
@pytest.mark.parametrize("size", SIZES)
def test_nvfp4_is_its_definition(dim: int, size: float) -> None:
    """page = amax / (6 * 448); block scales E4M3(amax / 6 / page); codes E2M1(x / (page * block))."""
    x = size * gaussian(3, 16, dim)
    x[0, 3] *= 200  # the other blocks' scales get small
    x[1, 3] *= 1e7  # and too small for E4M3
    page = encode(build("nvfp4", dim), x, x)
    codes, x = unpack_codes("k", page, 4).long(), x.double()
    level = page["k.page_scale"].double()
    torch.testing.assert_close(level, x.abs().amax((1, 2), keepdim=True)[..., 0] / 2688, rtol=1e-6, atol=0)
    scales = page["k.scale"]
    assert scales.dtype == torch.float8_e4m3fn
    assert scales.shape == (3, 16, math.ceil(dim / 16))
    for block in range(scales.shape[2]):
        channels = slice(16 * block, 16 * block + 16)
        exact = x[..., channels].abs().amax(-1) / 6 / level
        certain = clear(exact, NUMBERS["e4m3"])
        expected = nearest(exact, NUMBERS["e4m3"]).clamp_min(1)
        assert torch.equal(scales[..., block].view(torch.uint8).long()[certain], expected[certain])
        scaled = x[..., channels] / (level * scales[..., block].double())[..., None]
        certain = clear(scaled, E2M1)
        assert torch.equal((codes[..., channels] & 7)[certain], nearest(scaled, E2M1)[certain])
    assert torch.equal(codes >= 8, x.signbit())


def mx_error(x: Tensor, scale: Tensor) -> Tensor:
    """Squared errors [...] of blocks float64 [..., n] under scales [...]."""
    codes = nearest(x / scale[..., None], E2M1)
    return (E2M1[codes] * scale[..., None] - x.abs()).square().sum(-1)


@pytest.mark.parametrize("dim", DIMS + ODD_DIMS)
@pytest.mark.parametrize("size", [1e-37, 1e-20, *SIZES, 1e30])
def test_mxfp4_is_its_definition(dim: int, size: float) -> None:
    """Shared exponent floor(log2(amax)) - 2 or one more, whichever leaves less squared error, biased by 127; codes
    E2M1(x / 2^exponent), saturating."""
    x = size * gaussian(3, 16, dim)
    x[0, 0, 0] = 2.0 ** math.floor(math.log2(size))  # a power of two itself
    page = encode(build("mxfp4", dim), x, x)
    scales, x = page["k.scale"], x.double()
    codes = unpack_codes("k", page, 4).long()
    assert scales.dtype == torch.float8_e8m0fnu
    assert scales.shape == (3, 16, math.ceil(dim / 32))
    for block in range(scales.shape[2]):
        channels = slice(32 * block, 32 * block + 32)
        amax = x[..., channels].abs().amax(-1)
        least = (torch.frexp(amax).exponent - 1 - 2).clamp_min(-127)  # frexp has 1/2 <= mantissa < 1
        exponent = scales[..., block].view(torch.uint8).int() - 127
        assert bool(((exponent == least) | (exponent == least + 1)).all())
        assert torch.equal(scales[..., block].double(), 2.0 ** exponent.double())
        errors = [mx_error(x[..., channels], 2.0 ** e.double()) for e in (exponent, 2 * least + 1 - exponent)]
        assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())
        scaled = x[..., channels] / 2.0 ** exponent.double()[..., None]
        assert torch.equal(codes[..., channels] & 7, nearest(scaled, E2M1))  # dividing by a power of two is exact
    assert torch.equal(codes >= 8, x.signbit())


@pytest.mark.parametrize(
    ("block", "scale"),
    [
        ([4.0, 6.0, 0.5, -3.0], 1),  # what E2M1 has
        ([7.0] * 32, 1),  # 6 and 8 are as near: the finer of two equals
        ([7.25] * 32, 2),  # 8 is nearer
        ([-7.9] + [0.0] * 31, 2),
        ([7.9] + [0.5] * 31, 1),  # 31 numbers would become 0 or 1
        ([7.9, -7.9, 7.9, -7.9, 7.9, -7.9] + [0.5] * 26, 2),
        ([5.0, -5.0], 1),  # 4 and 6 are as near, under both
        ([0.0] * 32, None),
        ([7.9 * 2.0**125] * 2, 2.0**125),  # 4 * 2^126 would be infinite
        ([7.9 * 2.0**124] * 2, 2.0**125),
    ],
)
def test_mxfp4_takes_the_power_of_two_of_the_least_error(block: list[float], scale: float | None) -> None:
    x = torch.tensor(block, dtype=torch.float64).float().expand(1, 16, -1)
    codec = build("mxfp4", len(block))
    page = encode(codec, x, x)
    for side in "kv":
        assert torch.equal(page[f"{side}.scale"].float(), torch.full((1, 16, 1), scale or 2.0**-127))
    assert all(bool(back.isfinite().all()) for back in codec.decode(page))


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=80), st.integers(-60, 60))
@settings(deadline=None, max_examples=60)
def test_mxfp4_is_never_further_off_than_under_the_specifications_own_scale(numbers: list[float], power: int) -> None:
    x = torch.tensor(numbers[: len(numbers) // 2 * 2])
    back, _ = (codec := build("mxfp4", len(x))).decode(encode(codec, *(2.0**power * x.expand(1, 16, -1),) * 2))
    for exact, found in zip(x.double().split(32), back[0, 0].double().split(32), strict=True):
        least = 2.0 ** (torch.frexp(exact.abs().max()).exponent - 3).clamp(-127 - power, 125 - power).double()
        error = (found * 2.0**-power - exact).square().sum()
        assert float(error) <= float(mx_error(exact, least)) * (1 + 1e-5)


@pytest.mark.parametrize("dim", [32, 80])
def test_mxfp4_scales_follow_from_their_block_alone(dim: int) -> None:
    """Not from the memory that it lies in, from what else is encoded, or from how many."""
    x = gaussian(64, 16, dim)
    codec = build("mxfp4", dim)
    whole = encode(codec, x, x)["k.scale"].view(torch.uint8)
    strided = torch.zeros(dim, 64, 16).permute(1, 2, 0).copy_(x)
    assert torch.equal(encode(codec, strided, strided)["k.scale"].view(torch.uint8), whole)
    for i in range(0, 64, 7):
        assert torch.equal(encode(codec, x[i : i + 1], x[i : i + 1])["k.scale"].view(torch.uint8), whole[i : i + 1])
    alone = build("mxfp4", dim % 32 or 32)
    last = x[..., -(dim % 32 or 32) :].contiguous()
    assert torch.equal(encode(alone, last, last)["k.scale"].view(torch.uint8), whole[..., -1:])


def bits_of(spec: str, dim: int, page_size: int) -> float:
    name = spec.split("(")[0]
    if name in ("fp8", "int8"):
        return 8 + 16 / dim
    if name == "nvfp4":
        return 4 + 8 * math.ceil(dim / 16) / dim + 128 / (page_size * dim)
    return 4 + 8 * math.ceil(dim / 32) / dim


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("dim", DIMS)
def test_bytes_of_a_page_are_the_documented_bits(spec: str, page_size: int, dim: int) -> None:
    stack = Stack.parse(spec + (" + quest(dense_layers=0)" if page_size == 16 else ""))
    assert stack.page_size == page_size
    _, layout = stack.plan(0, 1).build(PageShape(page_size, dim, dim, 1, torch.bfloat16, CPU, 0))
    bits = page_size * 2 * dim * (bits_of(spec, dim, page_size) + 8 / page_size)  # and 16 for each channel's centre
    assert 8 * layout.body_bytes == pytest.approx(bits, rel=1e-12)


def test_the_bits_that_the_docstrings_name() -> None:
    assert [bits_of(spec, 64, 64) for spec in ("fp8", "int8", "nvfp4", "mxfp4")] == [8.25, 8.25, 4.53125, 4.25]
    assert bits_of("mxfp4", 80, 64) == 4.3


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (192, 128)])
def test_pages_hold_all_that_decoding_needs(spec: str, dims: tuple[int, int]) -> None:
    codec, layout = Stack.parse(spec).plan(0, 1).build(PageShape(64, *dims, 1, torch.float32, CPU, 0))
    pool = PagePool(layout, CPU)
    ids = pool.allocate(5)
    pool.data.fill_(255)
    page = encode(codec, gaussian(3, 64, dims[0]), gaussian(3, 64, dims[1]))
    pool.write(ids[1:4], page)
    for back, x in zip(codec.decode(layout.gather(pool.data, ids[1:4])), codec.decode(page), strict=True):
        assert back.dtype == torch.float32
        assert torch.equal(back, x)


def relative_error(spec: str, x: Tensor) -> float:
    """Of V: those of K are less their page's centre, whose error is no more."""
    k, v = (float((y.double() - x).square().sum()) for y in Stack.parse(spec).roundtrip(x, x))
    assert 0.9 * v < k < 1.01 * v
    return v / float(x.double().square().sum())


@pytest.mark.parametrize("dim", DIMS)
def test_eight_bit_errors_on_gaussian_data_are_those_of_theory(dim: int) -> None:
    """step^2 / 12. The step of a float is 2^(e - m) for numbers in [2^e, 2^(e + 1)) and m mantissa bits, and the mean
    of 4^e / x^2 is 3 / (8 ln 2) where log2 x is spread evenly; the maximum of a token is not, being 1.75 * 2^e."""
    x = gaussian(1, 1, 2048, dim)
    for name, mantissa in (("e4m3", 3), ("e5m2", 2)):
        expected = 4.0**-mantissa / 12 * 3 / (8 * math.log(2))
        assert relative_error(f"fp8(format={name})", x) == pytest.approx(expected, rel=0.15)
    step = x.abs().amax(-1) / 127
    assert relative_error("int8", x) == pytest.approx(float(step.square().mean() / 12 / x.square().mean()), rel=0.02)


@pytest.mark.parametrize("dim", DIMS)
def test_four_bit_errors_on_gaussian_data_are_those_of_the_definitions(dim: int) -> None:
    """In float64. Exact scales amax / 6 bound NVFP4 from below: rounding them to E4M3 costs up to 5 %."""
    x = gaussian(1, 1, 2048, dim)

    def error(block: int, power_of_two: bool) -> float:
        total = 0.0
        for part in x.double().split(block, -1):
            largest = part.abs().amax(-1, keepdim=True)
            if power_of_two:
                scale = 2.0 ** (largest.log2().floor() - 2)[..., 0]
                total += float(torch.minimum(mx_error(part, scale), mx_error(part, 2 * scale)).sum())
            else:
                total += float(mx_error(part, largest[..., 0] / 6).sum())
        return total / float(x.double().square().sum())

    assert relative_error("mxfp4", x) == pytest.approx(error(32, True), rel=1e-5)
    assert error(16, False) < relative_error("nvfp4", x) < 1.05 * error(16, False)
    assert relative_error("nvfp4", x) < 0.0095 < 0.0120 < relative_error("mxfp4", x) < 0.0127


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_stay_zeros_and_do_not_disturb(spec: str) -> None:
    codec = build(spec, 80)
    x = gaussian(3, 16, 80)
    x[1], x[0, 5], x[2, :, 40] = 0, 0, 0
    for back in codec.decode(encode(codec, x, x)):
        assert bool(back.isfinite().all())
        assert not back[x == 0].any()
        assert (back - x).norm() < 0.13 * x.norm()


@pytest.mark.parametrize(("spec", "tolerance"), [("fp8", 2**-8), ("int8", 1e-3), ("nvfp4", 1e-6), ("mxfp4", 0)])
@pytest.mark.parametrize("value", [3.0, -0.75, 1e-3, 4000.0])
def test_constant_vectors_come_back(spec: str, tolerance: float, value: float) -> None:
    if spec == "mxfp4":
        value = math.copysign(3 * 2.0 ** math.floor(math.log2(abs(value))), value)  # what E2M1 has under such a scale
    codec = build(spec, 80)
    x = torch.full((2, 16, 80), value)
    for back in codec.decode(encode(codec, x, x)):
        torch.testing.assert_close(back, x, rtol=tolerance, atol=0)


@pytest.mark.parametrize("spec", ["fp8", "nvfp4", "mxfp4"])
def test_a_loud_channel_costs_no_more_than_its_block(spec: str) -> None:
    x = gaussian(1, 1, 512, 80)
    quiet = relative_error(spec, x)
    loud = x.clone()
    loud[..., 77] *= 100
    k, _ = Stack.parse(spec).roundtrip(loud, loud)
    elsewhere = slice(0, 80 if spec == "fp8" else 64)
    keep = torch.arange(80)[elsewhere] != 77
    error = (k - loud)[..., elsewhere][..., keep].square().sum() / loud[..., elsewhere][..., keep].square().sum()
    assert float(error) < 1.1 * quiet
    ints, _ = Stack.parse("int8").roundtrip(loud, loud)
    assert (ints - loud)[..., :64].square().mean() > 10 * relative_error("int8", x)  # why integers need a rotation


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("size", SIZES)
def test_any_magnitude_is_as_close_as_any_other(spec: str, dim: int, size: float) -> None:
    bound = {"fp8": 0.03, "fp8(format=e5m2)": 0.06, "int8": 0.01, "nvfp4": 0.1, "mxfp4": 0.125}[spec]
    x = size * gaussian(1, 1, 128, dim)
    if spec == "int8" and size == 1e-6:
        bound = 0.05  # its float16 scale has steps of 2^-24
    for back in Stack.parse(spec).roundtrip(x, x):
        assert (back - x).norm() < bound * x.norm()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [1e5, 3e38, math.inf])
def test_huge_numbers_are_finite_again(spec: str, value: float) -> None:
    codec = build(spec, 80)
    x = gaussian(2, 16, 80)
    x[0, 3, 5], x[0, 4, 6] = value, -value
    for back in codec.decode(encode(codec, x, x)):
        assert bool(back.isfinite().all())
        assert back[0, 3, 5] > 5e4
        assert back[0, 4, 6] < -5e4
        assert (back[1] - x[1]).norm() < 0.13 * x[1].norm()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(spec: str, dtype: torch.dtype) -> None:
    codec = build(spec, 80)
    x = gaussian(2, 16, 80).to(dtype)
    halves, floats = encode(codec, x, x), encode(codec, x.float(), x.float())
    for name, field in halves.items():
        assert torch.equal(field.view(torch.uint8), floats[name].view(torch.uint8))


@pytest.mark.parametrize("spec", SPECS)
def test_pages_do_not_know_each_other(spec: str) -> None:
    codec = build(spec, 64)
    x = gaussian(4, 16, 64) * torch.tensor([1.0, 1e3, 1e-3, 7.0])[:, None, None]
    whole, _ = codec.decode(encode(codec, x, x))
    for i in range(4):
        assert torch.equal(codec.decode(encode(codec, x[i : i + 1], x[i : i + 1]))[0], whole[i : i + 1])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (192, 128)])
def test_attending_to_decoded_pages_is_attending_to_the_numbers(spec: str, dims: tuple[int, int]) -> None:
    codec = build(spec, *dims)
    decoded_k, decoded_v = codec.decode(encode(codec, gaussian(3, 16, dims[0]), gaussian(3, 16, dims[1], seed=1)))
    plain_k, plain_v = codec.inverse(decoded_k, decoded_v, torch.arange(3))
    q = gaussian(3, 5, dims[0], seed=2)
    read, bias = codec.read_query(q)
    assert bias is None
    ours = codec.read_output((read @ decoded_k.mT * dims[0] ** -0.5).softmax(-1) @ decoded_v)
    direct = torch.nn.functional.scaled_dot_product_attention(q, plain_k, plain_v)
    torch.testing.assert_close(ours, direct, rtol=1e-4, atol=1e-4)
    assert not codec.lossless


def test_int8_is_int_with_eight_symmetric_bits() -> None:
    x = gaussian(2, 16, 80)
    ours, other = build("int8", 80), build("int(bits=8, symmetric=true)", 80)
    assert ours.fields == other.fields
    page = encode(ours, x, 2 * x)
    for name, field in encode(other, x, 2 * x).items():
        assert torch.equal(page[name], field)


@pytest.mark.parametrize("dim", [64, 80])
def test_a_rotation_spreads_what_is_loud_in_a_block(dim: int) -> None:
    x = gaussian(1, 1, 512, dim)
    plain = relative_error("mxfp4", x)
    assert relative_error("mxfp4(basis=hadamard)", x) == pytest.approx(plain, rel=0.05)
    x[..., 7] *= 20
    for spec in ("mxfp4(basis=hadamard)", "mxfp4(basis=random)"):
        assert relative_error(spec, x) < 1.1 * plain
    assert str(Stack.parse("mxfp4(basis=hadamard)")) == "mxfp4(basis=hadamard)"
    with pytest.raises(SpecError, match=r"mxfp4\(basis='dct'\): basis must be one of identity, hadamard, random"):
        Stack.parse("mxfp4(basis=dct)")


def test_stacks_without_a_rotation_are_those_that_knew_none() -> None:
    for spec in ("mxfp4", "mxfp4(basis=identity)"):
        assert str(Stack.parse(spec)) == "mxfp4"
        assert Stack.parse(spec).hash == "aa08ca8c37dd"


def test_formats_are_written_and_refused_by_name() -> None:
    assert str(Stack.parse("fp8")) == "fp8(format=e4m3)"
    assert str(Stack.parse("fp8(format=e5m2)")) == "fp8(format=e5m2)"
    with pytest.raises(SpecError, match=r"fp8\(format='e3m4'\): format must be e4m3 or e5m2"):
        Stack.parse("fp8(format=e3m4)")
