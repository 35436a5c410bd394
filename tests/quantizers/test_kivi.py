"""KIVI against its paper: asymmetric min/max codes, keys per channel along tokens, values per token along channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import SpecError, Stack
from kvcomp.quantizers.kivi import KIVI
from kvcomp.quantizers.packing import unpack_codes
from kvcomp.stages import PageShape

CPU = torch.device("cpu")


def shape(page: int, k_dim: int, v_dim: int) -> PageShape:
    return PageShape(page, k_dim, v_dim, 1, torch.float32, CPU, 0)


def asymmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Section 3.1 of 2402.02750 for one group, in float64: z = min X, s = (max X - min X) / (2^B - 1),
    Q(X) = round((X - z) / s), X' = Q(X) s + z. Codes before rounding are returned too."""
    x = x.double()
    zero = x.min()
    scale = (x.max() - x.min()) / (2**bits - 1)
    exact = (x - zero) / scale
    return exact, exact.round(), scale, zero


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([2, 4]),
    group=st.sampled_from([16, 32, 64]),
    k_dim=st.sampled_from([64, 80, 128]),
    v_dim=st.sampled_from([64, 128, 192]),
    pages=st.integers(1, 2),
)
@settings(deadline=None, max_examples=25)
def test_codes_and_values_are_the_papers(seed: int, bits: int, group: int, k_dim: int, v_dim: int, pages: int) -> None:
    torch.manual_seed(seed)
    size = 64
    codec = KIVI(bits=bits, group=group).codec(shape(size, k_dim, v_dim))
    k, v = torch.randn(pages, size, k_dim), torch.randn(pages, size, v_dim)
    page = codec.encode(k, v, torch.zeros(pages, dtype=torch.int64))
    decoded = codec.decode(page)
    for x, back, name in ((k, decoded[0], "k"), (v, decoded[1], "v")):
        codes = unpack_codes(name, page, bits)
        for p in range(pages):
            groups = (
                [(slice(t, t + group), c) for t in range(0, size, group) for c in range(0, k_dim, 7)]
                if name == "k"
                else [(t, slice(c, c + group)) for t in range(0, size, 5) for c in range(0, v_dim, group)]
            )
            for where in groups:
                exact, ours_should_be, scale, zero = asymmetric(x[p][where], bits)
                clear = (exact - exact.floor() - 0.5).abs() > 0.02  # codes that float16 scales cannot tip over
                assert torch.equal(codes[p][where].double()[clear], ours_should_be[clear])
                expected = ours_should_be * scale + zero
                slack = (2**bits) * scale * 2**-11 + zero.abs() * 2**-11 + 1e-6
                assert bool(((back[p][where].double() - expected).abs()[clear] <= slack).all())
                assert float((back[p][where].double() - x[p][where].double()).abs().max()) <= scale / 2 + 2 * slack


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bytes_are_codes_and_a_scale_and_zero_per_group(bits: int, group: int, dim: int) -> None:
    stack = Stack.parse(f"kivi(bits={bits}, group={group}) + window(recent=0)")
    _, layout = stack.plan(0, 1).build(shape(stack.page_size, dim, dim))
    elements = stack.page_size * 2 * dim
    assert 8 * layout.bytes_per_page == elements * (bits + 32 / group)


def test_a_key_channel_and_a_value_token_keep_their_outliers_to_themselves() -> None:
    torch.manual_seed(0)
    codec = KIVI(bits=4, group=32).codec(shape(32, 64, 64))
    k, v = torch.randn(1, 32, 64), torch.randn(1, 32, 64)
    k[:, :, 5] *= 100  # the paper's key outliers sit in channels
    v[:, 7] *= 100
    back_k, back_v = codec.decode(codec.encode(k, v, torch.zeros(1, dtype=torch.int64)))
    others = torch.arange(64) != 5
    assert (back_k - k)[..., others].abs().max() < 0.25
    tokens = torch.arange(32) != 7
    assert (back_v - v)[:, tokens].abs().max() < 0.25


def test_the_read_side_is_the_identity() -> None:
    codec = KIVI().codec(shape(32, 64, 64))
    x = torch.randn(3, 5, 64)
    assert torch.equal(codec.read_query(x)[0], x)
    assert codec.read_query(x)[1] is None
    assert torch.equal(codec.read_output(x), x)
    assert torch.equal(codec.inverse(x, x, torch.arange(3))[0], x)
    assert codec.constants() == []
    assert not codec.lossless


def test_defaults_are_those_of_the_paper() -> None:
    """Group 32 and a full-precision residual of 128 tokens."""
    assert KIVI() == KIVI(bits=2, group=32)
    assert KIVI().default_window == (0, 128)
    assert Stack.parse("kivi").page_size == 32


@pytest.mark.parametrize("v_dim", [72, 80, 100, 112])
def test_a_group_that_does_not_divide_the_values_is_refused_with_those_that_do(v_dim: int) -> None:
    with pytest.raises(SpecError, match=rf"group=32.*{v_dim} channels") as error:
        KIVI(group=32).codec(shape(32, 64, v_dim))
    offered = [int(g) for g in str(error.value).split("use a group of ")[1].split(" or ")]
    assert offered
    for group in offered:
        codec = KIVI(group=group).codec(shape(group, 64, v_dim))
        x = torch.randn(1, group, v_dim)
        back = codec.decode(codec.encode(torch.randn(1, group, 64), x, torch.zeros(1, dtype=torch.int64)))[1]
        assert (back - x).abs().max() < 2


def test_more_bits_are_better_and_so_are_smaller_groups() -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 512, 64).unbind()

    def error(spec: str) -> float:
        back = Stack.parse(f"{spec} + window(recent=0)").roundtrip(k, v)
        return sum(float((a - b).square().mean()) for a, b in zip(back, (k, v), strict=True))

    assert error("kivi(bits=4)") < error("kivi(bits=2)") / 10
    assert error("kivi(group=16)") < error("kivi(group=32)") < error("kivi(group=64)")
