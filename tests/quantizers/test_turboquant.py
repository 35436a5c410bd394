"""TurboQuant: the codebooks are the optimal ones, the error the published one, and no data is asked for."""

from __future__ import annotations

import pytest
import torch

from kvcomp import SpecError, Stack
from kvcomp.quantizers.lloyd import sphere_codebook
from kvcomp.stages import PageShape

CPU = torch.device("cpu")
# positive centroids times sqrt(d), and the squared error of a unit vector, on the sphere in R^128
OPTIMAL = {
    2: ([0.4524, 1.5051], 0.1160),
    3: ([0.2443, 0.7531, 1.3363, 2.1311], 0.0340),
    4: ([0.1276, 0.3858, 0.6527, 0.9359, 1.2465, 1.6030, 2.0447, 2.6878], 0.0093),
}
ERROR_64 = {2: 0.1145, 3: 0.0334, 4: 0.0091}
# exact Lloyd-Max for a Gaussian, the limit of many dimensions
GAUSSIAN = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}


@pytest.mark.parametrize("bits", sorted(OPTIMAL))
def test_codebook_of_128_dimensions(bits: int) -> None:
    book = sphere_codebook(128, bits, CPU) * 128**0.5
    torch.testing.assert_close(book[1 << (bits - 1) :], torch.tensor(OPTIMAL[bits][0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(book, -book.flip(0))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_many_dimensions_are_gaussian(bits: int) -> None:
    book = sphere_codebook(16384, bits, CPU) * 16384**0.5
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    error = (x - book[torch.bucketize(x, (book[1:] + book[:-1]) / 2)]).square().mean()
    assert float(error) == pytest.approx(GAUSSIAN[bits], rel=0.01)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("data", ["sphere", "gaussian", "outliers"])
def test_error_is_the_published_one_whatever_the_data(dim: int, bits: int, data: str) -> None:
    """The rotation makes every direction look random: the relative error depends on nothing but bits and dimension."""
    x = torch.randn(2, 2, 4096, dim, generator=torch.Generator().manual_seed(1))
    if data == "sphere":
        x = x / x.norm(dim=-1, keepdim=True)
    if data == "outliers":
        x[..., 3] *= 30  # a channel that a per-token grid would spend all its range on
    expected = OPTIMAL[bits][1] if dim == 128 else ERROR_64[bits]
    stack = Stack.parse(f"turboquant(bits={bits})")
    for back, original in zip(stack.roundtrip(x, 2 * x), (x, 2 * x), strict=True):
        error = (back - original).square().sum(-1) / original.square().sum(-1)
        # with outliers all directions are nearly the same one, whose error is what the rotation happens to give it
        assert float(error.mean()) == pytest.approx(expected, rel=0.01 if data != "outliers" else 0.25)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bits_are_codes_and_a_norm(dim: int, bits: int) -> None:
    _, layout = Stack.parse(f"turboquant(bits={bits})").plan(0, 1).build(_shape(dim))
    assert 8 * layout.bytes_per_page == 2 * 64 * (bits * dim + 16)


def _shape(dim: int) -> PageShape:
    return PageShape(64, dim, dim, 2, torch.float32, CPU, 0)


def test_zero_and_huge_vectors_survive() -> None:
    x = torch.zeros(1, 1, 64, 64)
    x[..., 1, :] = 1e5
    for back in Stack.parse("turboquant(bits=2)").roundtrip(x, x):
        assert back.isfinite().all()
        assert not back[..., 0, :].any()


def test_attention_needs_no_rotating_back() -> None:
    codec, _ = Stack.parse("turboquant(bits=3)").plan(0, 1).build(_shape(64))
    k, v, q = torch.randn(3, 5, 64, 64, generator=torch.Generator().manual_seed(2)).unbind()
    page = codec.encode(k, v, torch.zeros(5, dtype=torch.int64))
    rotated_k, rotated_v = codec.decode(page)
    plain_k, plain_v = codec.inverse(rotated_k, rotated_v, torch.arange(5))
    torch.testing.assert_close(codec.read_query(q)[0] @ rotated_k.mT, q @ plain_k.mT, atol=1e-4, rtol=1e-4)
    weights = torch.randn(5, 3, 64)
    torch.testing.assert_close(codec.read_output(weights @ rotated_v), weights @ plain_v, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [0, 5])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(SpecError, match="1, 2, 3 or 4"):
        Stack.parse(f"turboquant(bits={bits})")
