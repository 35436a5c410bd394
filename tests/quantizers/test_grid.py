"""The uniform grid: packing loses nothing, and the error stays under half a step whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp import SpecError
from kvcomp.quantizers.grid import UniformGrid
from kvcomp.quantizers.packing import pack, unpack


@given(bits=st.sampled_from([2, 4, 8]), rows=st.integers(1, 5), groups=st.integers(1, 20), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_packing_is_dense_and_reversible(bits: int, rows: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    n = groups * 8 // bits
    codes = torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, n * bits // 8)
    assert unpack(packed, bits).tolist() == codes.tolist()
    for row, line in zip(packed.tolist(), codes.tolist(), strict=True):  # the first code in the low bits
        number = sum(code << (bits * i) for i, code in enumerate(line))
        assert list(number.to_bytes(n * bits // 8, "little")) == row


GROUPS = [(16, 1), (32, 1), (1, 64), (1, 16), (8, 4), (32, 64), (1, 1)]


@given(
    groups=st.sampled_from(GROUPS),
    bits=st.sampled_from([2, 4, 8]),
    size=st.sampled_from([1e-6, 1e-4, 1e-2, 1.0, 50.0, 1e4]),
    offset=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_the_error_is_half_a_step_and_what_float16_costs(
    groups: tuple[int, int], bits: int, size: float, offset: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    tokens, channels = groups
    x = (size * torch.randn(3, 32, 64) + offset * torch.randn(3, 1, 64)).to(dtype)
    side = UniformGrid("k", 32, 64, bits, tokens, channels)
    fields = side.encode(x)
    assert {name: (t.dtype, tuple(t.shape[1:])) for name, t in fields.items()} == {
        f.name: (f.dtype, f.shape) for f in side.fields
    }
    back, x, levels = side.decode(fields).double(), x.double(), 2**bits - 1
    assert bool(back.isfinite().all())
    for i in range(0, 32, tokens):
        for j in range(0, 64, channels):
            block = (slice(None), slice(i, i + tokens), slice(j, j + channels))
            low, high = x[block].amin((1, 2)), x[block].amax((1, 2))
            step = (high - low) / levels
            # float16 is good to 2^-11 of a number, and to 2^-25 near zero. The zero is off by that once, the step at
            # the far end of the block `levels` times.
            zero = low.abs() * 2**-11 + 2**-25
            far = levels * torch.maximum((high - low + zero) / levels * 2**-11, torch.tensor(2.0**-25).double())
            bound = torch.maximum(step / 2 * (1 + 2**-10) + zero / 2 + 2**-24, far) + zero
            assert bool(((back[block] - x[block]).abs().amax((1, 2)) <= bound * (1 + 1e-6)).all())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, 1e-3, 2048.0, -65504.0])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_block_is_exact(value: float, bits: int) -> None:
    value = float(torch.tensor(value).half())
    side = UniformGrid("v", 16, 64, bits, 1, 32)
    x = torch.full((2, 16, 64), value)
    fields = side.encode(x)
    assert torch.equal(side.decode(fields), x)
    assert bool((fields["v.scale"] > 0).all())  # nothing was divided by zero on the way


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_ends_of_a_block_are_on_the_grid(bits: int) -> None:
    """Asymmetric: minimum and maximum come back themselves, and so does everything on a grid of 2^bits levels."""
    levels = 2**bits - 1
    x = (torch.randint(0, levels + 1, (2, 16, 32)) * 0.5 - 4).float()
    x[:, 0], x[:, 1] = -4, -4 + 0.5 * levels
    side = UniformGrid("k", 16, 32, bits, 16, 1)
    assert torch.equal(side.decode(side.encode(x)), x)


def test_groups_do_not_know_each_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 32, 32)
    side = UniformGrid("k", 32, 32, 4, 16, 8)
    before = side.decode(side.encode(x))
    x[0, 3, 9] = 1e3  # tokens 0..15, channels 8..15
    changed = side.decode(side.encode(x)) != before
    assert bool(changed[0, :16, 8:16].any())
    changed[0, :16, 8:16] = False
    assert not bool(changed.any())


def test_pages_do_not_know_each_other() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 16, 32)
    side = UniformGrid("k", 16, 32, 2, 16, 1)
    whole = side.decode(side.encode(x))
    for i in range(5):
        assert torch.equal(side.decode(side.encode(x[i : i + 1])), whole[i : i + 1])


def test_codes_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(SpecError, match="75 channels"):
        _ = UniformGrid("k", 16, 75, 4, 1, 75).fields


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_beyond_float16_saturate(bits: int) -> None:
    side = UniformGrid("k", 16, 16, bits, 1, 16)
    x = torch.linspace(-7e4, 7e4, 256).view(1, 16, 16)
    assert side.decode(side.encode(x)).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per", [(1, 32), (16, 1)])
def test_symmetric_integers_store_no_zero(bits: int, per: tuple[int, int]) -> None:
    """Nearest multiples of max |x| / (2^(bits - 1) - 1); zero stays zero."""
    side = UniformGrid("k", 16, 32, bits, *per, symmetric=True)
    x = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    page = side.encode(x)
    assert "k.zero" not in page
    back = side.decode(page)
    assert not back[:, 3].any()
    dim = 1 if per[1] == 1 else 2
    scale = (x.abs().amax(dim, keepdim=True) / ((1 << bits - 1) - 1)).half().float()
    torch.testing.assert_close(back, (x / scale.clamp_min(1e-9)).round() * scale, atol=2e-3, rtol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_clip_trades_the_extremes_for_finer_steps(symmetric: bool) -> None:
    x = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(0))

    def error(clip: float) -> torch.Tensor:
        side = UniformGrid("k", 64, 128, 2, 1, 128, symmetric=symmetric, clip=clip)
        return (side.decode(side.encode(x)) - x).abs()

    whole, clipped = error(1.0), error(0.7)
    assert (clipped**2).mean() < (whole**2).mean()
    outermost = x.argmax(2, keepdim=True)
    assert clipped.gather(2, outermost).mean() > whole.gather(2, outermost).mean()
    side = UniformGrid("k", 64, 128, 8, 1, 128, clip=0.5)
    low, high = x.amin(2), x.amax(2)
    torch.testing.assert_close(side.decode(side.encode(x)).amax(2), high - (high - low) / 4, atol=0.02, rtol=0)
