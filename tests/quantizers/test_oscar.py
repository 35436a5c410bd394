"""OSCAR: the authors' rotation and clip, per KV head, and codes that fit in their bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import chunk, statistics, write
from torch import Tensor

from kvcomp import SpecError, Stack
from kvcomp.quantizers.centred import CentredGrid
from kvcomp.quantizers.codecs import GridCodec
from kvcomp.quantizers.grid import UniformGrid
from kvcomp.quantizers.oscar import OSCAR, ClippedGrid, bit_reversed, spread_rotation
from kvcomp.stages import PageShape

CPU = torch.device("cpu")
DIMS = [64, 80, 96, 128, 256]


def shape(heads: int, k_dim: int, v_dim: int | None = None) -> PageShape:
    return PageShape(64, k_dim, v_dim or k_dim, heads, torch.float32, CPU, 0)


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 112, 128])
def test_the_rotation_is_orthogonal_and_mixes_every_direction_evenly(dim: int) -> None:
    stats = statistics(3, dim)
    found = OSCAR.calibrate(stats)
    for matrix, moment in ((found["k"], stats.queries), (found["v"], stats.value_scored)):
        torch.testing.assert_close(matrix.mT @ matrix, torch.eye(dim).double().expand(3, -1, -1))
        # what attention reads of each code's error is nearly the same; exactly, where there is one Hadamard block
        shares = (matrix.mT @ moment @ matrix).diagonal(dim1=1, dim2=2) / moment.diagonal(dim1=1, dim2=2).mean(
            -1, keepdim=True
        )
        if dim & (dim - 1) == 0:
            torch.testing.assert_close(shares, torch.ones_like(shares))
        else:
            plain = torch.linalg.eigvalsh(moment) / moment.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True)
            assert bool((shares.amax(-1) < 0.5 * plain.amax(-1)).all())


@pytest.mark.parametrize("dim", [2, 16, 128])
def test_one_block_is_the_authors_composition(dim: int) -> None:
    """R_h_pbr of their calibration script: eigenvectors as `eigh` gives them, Hadamard, then the matrix P with
    P e_j = e_(index of the br(j)-th largest eigenvalue), written out with loops."""
    moment = statistics(2, dim).queries
    bits = dim.bit_length() - 1
    hadamard = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]).double()
    for h in range(2):
        values, vectors = torch.linalg.eigh(moment[h])
        falling = values.argsort(descending=True).tolist()
        permutation = torch.zeros(dim, dim).double()
        for i in range(dim):
            permutation[falling[i], int(f"{i:0{bits}b}"[::-1], 2)] = 1
        expected = vectors @ (hadamard / dim**0.5) @ permutation
        torch.testing.assert_close(spread_rotation(moment)[h], expected)


def test_bit_reversal() -> None:
    assert bit_reversed(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert bit_reversed(1).tolist() == [0]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("quantile", [0.96, 0.92, 0.5, 1.0])
@pytest.mark.parametrize("group", [16, None])
def test_the_largest_magnitudes_come_down_to_the_quantile(dim: int, quantile: float, group: int | None) -> None:
    x = torch.randn(2, 64, dim, generator=torch.Generator().manual_seed(dim))
    limit = x.abs().sort(-1).values[..., min(int(quantile * dim), dim - 1)]
    expected = torch.maximum(torch.minimum(x, limit[..., None]), -limit[..., None])
    plain = UniformGrid("k", 64, dim, 2, 1, group or dim)
    clipped = ClippedGrid(plain, quantile)
    ours, theirs = clipped.encode(x), plain.encode(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert clipped.fields == plain.fields
    if quantile == 1:
        assert all(torch.equal(ours[name], t) for name, t in plain.encode(x).items())
    elif dim == 128 and quantile == 0.96:
        assert bool(((x != expected).sum(-1) == 5).all())


@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_centred_keys_are_clipped_about_their_centre(shift: float) -> None:
    """A constant does not change what saturates, and kernels get what the codec encodes."""
    x = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0))
    side = ClippedGrid(CentredGrid(UniformGrid("k", 64, 128, 4, 1, 128)), 0.96)
    y = x + shift * torch.randn(2, 1, 128, generator=torch.Generator().manual_seed(1)).half().float()
    errors = [float((side.decode(side.encode(z)) - z).square().mean()) for z in (x, y)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    given = side.kernel_input(y)
    assert given is not None
    for name, field in side.grid.encode(given).items():
        assert torch.equal(field, side.encode(y)[name])


def test_clipping_helps_at_two_bits() -> None:
    x = torch.randn(1, 4096, 128, generator=torch.Generator().manual_seed(0))
    errors = [
        float((side.decode(side.encode(x)) - x).square().mean())
        for q in (1.0, 0.96)
        for side in [ClippedGrid(UniformGrid("k", 4096, 128, 2, 1, 128), q)]
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("k", "v"), [(2, 2), (3, 3), (4, 4), (4, 2)])
def test_bytes_are_codes_and_a_scale_and_zero_per_group(dim: int, k: int, v: int) -> None:
    layout = Stack.parse(f"oscar(k={k}, v={v})").plan(0, 1).layout(shape(1, dim))
    assert 8 * layout.bytes_per_page == 64 * (dim * (k + v) + 2 * 32 * max(dim // 128, 1)) + 16 * dim  # K's centre


def test_defaults_are_the_authors() -> None:
    assert OSCAR() == OSCAR(bits=2, group=128, k_clip=0.96, v_clip=0.92)
    assert (Stack.parse("oscar").window.sinks, Stack.parse("oscar").window.recent) == (64, 256)
    with pytest.raises(SpecError, match=r"group=128.*192 channels"):
        Stack.parse("oscar").plan(0, 1).layout(shape(1, 192))


@pytest.mark.parametrize("dims", [(32, 32), (64, 48)])
def test_every_row_uses_its_heads_matrix_and_nothing_is_rotated_back_to_attend(
    dims: tuple[int, int], tmp_path: Path
) -> None:
    path = write(tmp_path / "c", "oscar", 3, *dims)
    codec, _ = Stack.parse(f"oscar(bits=4, calibration={str(path)!r})").plan(0, 1).build(shape(3, *dims))
    expected = OSCAR.calibrate(statistics(3, *dims))
    k, v = (torch.randn(6, 64, dim, generator=torch.Generator().manual_seed(dim)) for dim in dims)
    assert isinstance(codec, GridCodec)
    coordinates = codec.k_basis.write(k, torch.arange(6))
    for stream in range(6):  # two rows of three heads
        torch.testing.assert_close(coordinates[stream], k[stream] @ expected["k"][stream % 3].float())
    decoded = codec.decode(codec.encode(k, v, torch.arange(6)))
    plain_k, plain_v = codec.inverse(*decoded, torch.arange(6))
    assert bool(((plain_k - k).norm() / k.norm() < 0.15) & ((plain_v - v).norm() / v.norm() < 0.2))
    q, weights = torch.randn(6, 4, dims[0]), torch.rand(6, 4, 64)
    rotated, bias = codec.read_query(q)
    assert bias is None
    torch.testing.assert_close(rotated @ decoded[0].mT, q @ plain_k.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.read_output(weights @ decoded[1]), weights @ plain_v, rtol=1e-4, atol=1e-4)


def test_logits_of_the_calibrated_rotation_are_better_than_hadamards(tmp_path: Path) -> None:
    """Keys of white noise, queries that look at few directions: at two bits their logits keep the order of magnitude
    of their error in any basis, but V, read evenly, must not lose either."""
    path = write(tmp_path / "c", "oscar", 2, 64)
    q, k, v = chunk(2, 64, tokens=512)

    def error(spec: str) -> Tensor:
        back, _ = Stack.parse(f"{spec} + window(sinks=0, recent=0)").roundtrip(k, v)
        lost = q.unflatten(1, (2, 2)) @ (back - k)[:, :, None].mT
        return lost.square().mean()

    assert error(f"oscar(calibration={str(path)!r})") < error("int(bits=2)")
    assert error(f"oscar(bits=4, k_clip=1, v_clip=1, calibration={str(path)!r})") < error("int(bits=4)")
