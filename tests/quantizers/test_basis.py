"""Bases: orthogonal, cheap, and the same on the read side."""

from __future__ import annotations

import pytest
import torch

from kvcomp.quantizers.basis import BASES, IDENTITY, Basis, hadamard

CPU = torch.device("cpu")
DIMS = [1, 2, 16, 64, 72, 80, 96, 100, 112, 128, 192, 256, 576]


@pytest.mark.parametrize("dim", DIMS)
def test_hadamard_is_orthonormal_with_entries_of_one_size(dim: int) -> None:
    matrix = hadamard(dim, CPU).matrix
    assert matrix.shape == (dim, dim)
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), rtol=1e-5, atol=1e-5)
    size = max(2**i for i in range(10) if dim % 2**i == 0)
    for i in range(0, dim, size):
        block = matrix[i : i + size, i : i + size]
        torch.testing.assert_close(block.abs(), torch.full((size, size), size**-0.5), rtol=1e-6, atol=0)
        rest = matrix[i : i + size].clone()
        rest[:, i : i + size] = 0
        assert not bool(rest.any())  # block-diagonal


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_hadamard_is_sylvesters(dim: int) -> None:
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)])
    torch.testing.assert_close(hadamard(dim, CPU).matrix, signs / dim**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(BASES))
@pytest.mark.parametrize("dim", DIMS)
def test_round_trip_and_inner_products(name: str, dim: int) -> None:
    torch.manual_seed(0)
    basis = BASES[name](dim, CPU)
    x, y = torch.randn(2, 3, 7, dim, dtype=torch.bfloat16).unbind()
    streams = torch.arange(3)
    assert basis.write(x, streams).dtype == torch.float32
    torch.testing.assert_close(basis.inverse(basis.write(x, streams), streams), x.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        basis.write(x, streams) @ basis.read(y).mT, x.float() @ y.float().mT, rtol=1e-4, atol=1e-4
    )
    assert basis.offset(y) is None


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_a_basis_per_head_with_a_dual_and_a_mean(heads: int) -> None:
    """Six streams of `heads` heads: y = (x - mean) W, x = y D' + mean, q . x = (q D) . y + q . mean."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(8) + 0.2 * torch.randn(heads, 8, 8, generator=generator)
    mean = torch.randn(heads, 8, generator=generator)
    basis = Basis(matrix, torch.linalg.inv(matrix).mT, mean)
    x, q = torch.randn(2, 6, 5, 8, generator=generator).unbind()
    y = basis.write(x, torch.arange(6))
    for stream in range(6):
        torch.testing.assert_close(y[stream], (x[stream] - mean[stream % heads]) @ matrix[stream % heads])
    torch.testing.assert_close(basis.inverse(y, torch.arange(6)), x, rtol=1e-4, atol=1e-4)
    offset = basis.offset(q)
    assert offset is not None
    torch.testing.assert_close(basis.read(q) @ y.mT + offset[..., None], q @ x.mT, rtol=1e-4, atol=1e-4)
    order = torch.tensor([4, 1, 1])
    torch.testing.assert_close(basis.write(x[order], order), y[order])
    assert sum(t.numel() for t in basis.tensors) == heads * (64 + 64 + 8)


def test_hadamard_spreads_an_outlier_over_its_block() -> None:
    x = torch.zeros(1, 1, 96)
    x[..., 40] = 1.0
    out = hadamard(96, CPU).write(x, torch.zeros(1, dtype=torch.int64))[0]
    torch.testing.assert_close(out[0, 32:64].abs(), torch.full((32,), 32**-0.5))
    assert not bool(out[0, :32].any())
    assert not bool(out[0, 64:].any())


def test_layers_share_the_matrix() -> None:
    assert BASES["hadamard"](64, CPU).matrix is BASES["hadamard"](64, CPU).matrix
    assert BASES["identity"](64, CPU) is IDENTITY
    assert IDENTITY.matrix is None
