"""Token-wise integers: an independent min/max quantizer, and a Hadamard basis that nobody outside notices."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcomp import SpecError, Stack
from kvcomp.quantizers.basis import Basis
from kvcomp.quantizers.codecs import GridCodec
from kvcomp.quantizers.grid import UniformGrid
from kvcomp.quantizers.int import Int
from kvcomp.quantizers.none import NoQuantizer
from kvcomp.quantizers.packing import unpack_codes
from kvcomp.stages import Codec, PageShape, Quantizer

DIMS = [64, 80, 96, 128, 256]


def shape(k_dim: int, v_dim: int | None = None, dtype: torch.dtype = torch.float32, centred: bool = True) -> PageShape:
    return PageShape(16, k_dim, v_dim or k_dim, 1, dtype, torch.device("cpu"), 0, centred)


def encode(codec: Codec, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return codec.encode(k, v, torch.zeros(len(k), dtype=torch.int64))


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 8),
    dim=st.sampled_from(DIMS),
    group=st.sampled_from([None, 16]),
    offset=st.sampled_from([0.0, 5.0]),
)
@settings(deadline=None, max_examples=25)
def test_codes_are_min_max_per_token(seed: int, bits: int, dim: int, group: int | None, offset: float) -> None:
    torch.manual_seed(seed)
    k, v = torch.randn(1, 16, dim) + offset, torch.randn(1, 16, dim)
    codec = Int(bits=bits, group=group).codec(shape(dim, centred=False))
    page = encode(codec, k, v)
    levels, width = 2**bits - 1, group or dim
    for x, back, name in ((k, codec.decode(page)[0], "k"), (v, codec.decode(page)[1], "v")):
        codes = unpack_codes(name, page, bits)
        for t in range(16):
            for c in range(0, dim, width):
                row = x[0, t, c : c + width].double()
                scale, zero = (row.max() - row.min()) / levels, row.min()
                # the stored zero and scale are float16: codes near a boundary may differ by one
                slack = zero.abs() * 2**-11 + levels * scale * 2**-10
                exact = (row - zero) / scale
                ours = codes[0, t, c : c + width].double()
                assert bool(((ours - exact).abs() <= 0.5 + slack / scale).all())
                decoded = back[0, t, c : c + width].double()
                assert bool(((decoded - row).abs() <= scale / 2 + slack).all())


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("basis", ["identity", "hadamard"])
def test_bytes_are_codes_and_a_scale_and_zero_per_group(dim: int, bits: int, group: int | None, basis: str) -> None:
    stack = Stack.parse(f"int(bits={bits}, group={group}, basis={basis})")
    _, layout = stack.plan(0, 1).build(PageShape(64, dim, dim, 1, torch.float32, torch.device("cpu"), 0))
    assert 8 * layout.bytes_per_page == 64 * 2 * dim * (bits + 32 / (group or dim)) + 16 * dim  # K's centre


@dataclass(frozen=True)
class Rotated(Quantizer):
    """Int8 in random rotations, which unlike Hadamard's are not their own inverse."""

    def codec(self, shape: PageShape) -> GridCodec:
        k, v = (Basis(torch.linalg.qr(torch.randn(d, d)).Q) for d in (shape.k_dim, shape.v_dim))
        sides = (UniformGrid(n, 16, d, 8, 1, d) for n, d in (("k", shape.k_dim), ("v", shape.v_dim)))
        return GridCodec(*sides, k, v)


@pytest.mark.parametrize("dims", [(d, d) for d in DIMS] + [(192, 128), (64, 80)])
@pytest.mark.parametrize(
    "quantizer",
    [NoQuantizer(), Int(bits=8), Int(bits=4, basis="hadamard"), Int(bits=8, basis="hadamard", group=16), Rotated()],
)
def test_reading_in_the_basis_is_reading_the_inverse(quantizer: Quantizer, dims: tuple[int, int]) -> None:
    """q . k = read_query(q) . decode(k), and the output over decoded values maps back by read_output."""
    torch.manual_seed(0)
    codec = quantizer.codec(shape(*dims))
    k, v = torch.randn(3, 16, dims[0]), torch.randn(3, 16, dims[1])
    page = encode(codec, k, v)
    decoded_k, decoded_v = codec.decode(page)
    assert decoded_k.dtype == decoded_v.dtype == torch.float32
    plain_k, plain_v = codec.inverse(decoded_k, decoded_v, torch.arange(3))
    q, weights = torch.randn(3, 5, dims[0]), torch.rand(3, 5, 16)
    torch.testing.assert_close(
        codec.read_query(q)[0] @ decoded_k.transpose(1, 2), q @ plain_k.transpose(1, 2), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(codec.read_output(weights @ decoded_v), weights @ plain_v, rtol=1e-4, atol=1e-4)
    if codec.lossless:
        assert torch.equal(plain_k, k)
        assert torch.equal(plain_v, v)
    else:
        levels = 15 if getattr(quantizer, "bits", 8) == 4 else 255
        for back, x in ((plain_k, k), (plain_v, v)):
            assert (back - x).norm() / x.norm() < 2.5 / levels


@pytest.mark.parametrize("dim", DIMS)
def test_eight_bits_in_a_hadamard_basis_are_almost_exact(dim: int) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 256, dim).unbind()
    for back, x in zip(Stack.parse("int(bits=8, basis=hadamard)").roundtrip(k, v), (k, v), strict=True):
        assert (back - x).norm() / x.norm() < 0.01
        assert (back - x).abs().max() < 0.1


@pytest.mark.parametrize("dim", DIMS)
def test_a_hadamard_basis_helps_with_an_outlier_channel(dim: int) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 256, dim).unbind()
    k[..., 3] *= 30
    v[..., dim - 1] *= 30

    def errors(spec: str) -> Tensor:
        back = Stack.parse(spec).roundtrip(k, v)
        return torch.stack([(a - b).square().mean() for a, b in zip(back, (k, v), strict=True)])

    assert bool((errors("int(bits=4, basis=hadamard)") < 0.7 * errors("int(bits=4)")).all())
    assert bool((errors("int(bits=8)") < errors("int(bits=4)") / 100).all())


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("basis", ["identity", "hadamard"])
def test_any_magnitude_is_finite_and_close(size: float, basis: str) -> None:
    torch.manual_seed(0)
    k, v = size * torch.randn(2, 1, 1, 128, 64)
    for back, x in zip(Stack.parse(f"int(bits=8, basis={basis})").roundtrip(k, v), (k, v), strict=True):
        assert bool(back.isfinite().all())
        # float16 has steps of 2^-24 near zero, and an error of half of one in the scale counts 255 times
        assert (back - x).norm() / 128 < 0.01 * size + 255 * 2**-25


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(SpecError, match=r"group=48.*64 channels"):
        Int(group=48).codec(shape(64))
    with pytest.raises(SpecError, match=r"group=16.*72 channels"):
        Int(group=16).codec(shape(64, 72))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dense_quantizer_stores_the_model_dtype(dtype: torch.dtype) -> None:
    codec = NoQuantizer().codec(shape(64, 80, dtype))
    assert sum(f.nbytes for f in codec.fields) == 16 * (64 + 80) * 2
    assert codec.lossless
    assert codec.constants() == []
    k, v = torch.randn(2, 16, 64).to(dtype), torch.randn(2, 16, 80).to(dtype)
    back = codec.decode(encode(codec, k, v))
    assert torch.equal(back[0], k.float())
    assert torch.equal(back[1], v.float())
