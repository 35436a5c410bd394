"""QJL: signs of a random rotation keep inner products unbiased, with less error than those of Gaussians."""

from __future__ import annotations

from math import pi

import pytest
import torch
from torch import Tensor

from kvcomp.quantizers.basis import rotation
from kvcomp.quantizers.lloyd import LloydGrid, sphere_codebook
from kvcomp.quantizers.qjl import ResidualGrid, projection, sign_codebook

CPU = torch.device("cpu")


def rotations(n: int, dim: int, seed: int) -> Tensor:
    gaussian = torch.randn(n, dim, dim, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal(dim1=1, dim2=2).sign()[:, None]


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_the_projection_is_a_rotation_of_its_own(dim: int) -> None:
    s = projection(dim, CPU)
    torch.testing.assert_close(s @ s.mT, torch.eye(dim), atol=1e-5, rtol=0)
    assert (s.mT @ rotation(dim, CPU).matrix).abs().max() < 6 / dim**0.5  # as entries of a random rotation are


@pytest.mark.parametrize("dim", [16, 64])
def test_signs_of_rotated_vectors_are_unbiased_for_every_vector(dim: int) -> None:
    """E over rotations of c S sign(S' r) = r with squared error ~ (pi / 2 - 1) |r|^2, where Gaussians have pi / 2."""
    n = 4000
    r = torch.randn(dim, generator=torch.Generator().manual_seed(0))
    r /= r.norm()
    s = rotations(n, dim, seed=1)
    codebook = sign_codebook(dim, CPU)
    back = (s @ codebook[((r @ s) > 0).long()][..., None])[..., 0]  # [n, dim]
    along, spread = back @ r, (back - r).square().sum(-1).mean()
    assert abs(along.mean() - 1) < 3.5 * along.std() / n**0.5
    assert along.std() / n**0.5 < 0.004
    assert float(spread) == pytest.approx(pi / 2 * (1 - 0.5 / dim) - 1, rel=0.02)
    gaussian = torch.randn(n, dim, dim, generator=torch.Generator().manual_seed(2))
    signs = torch.where(r @ gaussian > 0, 1.0, -1.0)
    paper = (pi / 2) ** 0.5 / dim * (gaussian @ signs[..., None])[..., 0]
    assert float((paper - r).square().sum(-1).mean()) == pytest.approx(pi / 2 - 1 / dim, rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_grid_and_the_signs_of_its_residual_are_unbiased_over_seeds(bits: int) -> None:
    """For fixed q and x, whatever they are: the mean over projections of <q, x'> is <q, x>."""
    dim, n = 64, 1500
    x, q = torch.randn(2, 16, dim, generator=torch.Generator().manual_seed(0)).unbind()
    q = q + x
    grid = LloydGrid("k", 16, dim, bits, sphere_codebook(dim, bits, CPU))
    signs = LloydGrid("k.residual", 16, dim, 1, sign_codebook(dim, CPU))
    off = []
    for s in rotations(n, dim, seed=3):
        side = ResidualGrid(grid, signs, s)
        a, b = side.decode(side.encode(x[None]))[0].split(dim, -1)
        off.append((q * (a + b @ s.mT - x)).sum(-1))
    z = torch.stack(off).mean(0) / (torch.stack(off).std(0) / n**0.5)  # [16]
    assert z.abs().max() < 4
    assert z.square().mean() < 2.5
    alone = grid.decode(grid.encode(x[None]))[0]
    biased = (q * (alone - x)).sum(-1) / (torch.stack(off).std(0) / n**0.5)
    assert biased.square().mean() > 100  # without the signs the same test fails


def test_what_the_grid_has_exactly_leaves_no_residual() -> None:
    """A page of zeros decodes to zeros, in both halves."""
    dim = 64
    grid = LloydGrid("k", 16, dim, 2, sphere_codebook(dim, 2, CPU))
    side = ResidualGrid(grid, LloydGrid("k.residual", 16, dim, 1, sign_codebook(dim, CPU)), projection(dim, CPU))
    fields = side.encode(torch.zeros(1, 16, dim))
    assert set(fields) == {f.name for f in side.fields}
    assert not side.decode(fields).any()
    assert side.decode(fields).shape == (1, 16, 2 * dim)
