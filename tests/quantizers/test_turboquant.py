"""TurboQuant: the codebooks are the optimal ones, the error the published one, and no data is asked for."""

from __future__ import annotations

from math import pi

import pytest
import torch
from torch import Tensor

from kvcomp import SpecError, Stack
from kvcomp.cache.pool import PagePool
from kvcomp.kernels.reference import attend_pages
from kvcomp.quantizers.lloyd import LloydGrid, sphere_codebook
from kvcomp.stages import PageShape

CPU = torch.device("cpu")
# positive centroids times sqrt(d), and the squared error of a unit vector, on the sphere in R^128
OPTIMAL = {
    1: ([0.7995], 0.3609),
    2: ([0.4524, 1.5051], 0.1160),
    3: ([0.2443, 0.7531, 1.3363, 2.1311], 0.0340),
    4: ([0.1276, 0.3858, 0.6527, 0.9359, 1.2465, 1.6030, 2.0447, 2.6878], 0.0093),
}
ERROR_64 = {1: 0.3584, 2: 0.1145, 3: 0.0334, 4: 0.0091}
# exact Lloyd-Max for a Gaussian, the limit of many dimensions
GAUSSIAN = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950, 5: 0.00250}
# d times the squared error of q . k for unit q and k, as published for independent Gaussian projections; the last
# figure comes of rounding the error of 3 bits to 0.03
PUBLISHED = {1: 1.57, 2: 0.56, 3: 0.18, 4: 0.047}
FRACTIONS = {2.5: (4, 2), 3.5: (5, 3)}  # bits of the outlier quarter, and of the rest


def _shape(dim: int, heads: int = 2) -> PageShape:
    return PageShape(64, dim, dim, heads, torch.float32, CPU, 0)


def _unit(*shape: int, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def error_of(dim: int, bits: int) -> float:
    """Squared error of a random unit vector in R^dim, whose coordinates have density ~ (1 - t^2)^((dim - 3) / 2)."""
    t = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    density = (1 - t * t) ** ((dim - 3) / 2)
    nearest = (t[:, None] - sphere_codebook(dim, bits, CPU).double()).square().amin(1)
    return dim * float((nearest * density).sum() / density.sum())


def loud_keys(*shape: int, seed: int = 0, factor: float = 10) -> tuple[Tensor, Tensor]:
    """Keys [B, H, N, D] with four channels per head that are `factor` times louder, and those channels [H, 4]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    loud = torch.stack([torch.randperm(shape[-1], generator=generator)[:4] for _ in range(shape[1])])
    for head, channels in enumerate(loud):
        x[:, head, :, channels] *= factor
    return x, loud


@pytest.mark.parametrize("bits", sorted(OPTIMAL))
def test_codebook_of_128_dimensions(bits: int) -> None:
    codebook = sphere_codebook(128, bits, CPU) * 128**0.5
    torch.testing.assert_close(codebook[1 << (bits - 1) :], torch.tensor(OPTIMAL[bits][0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(codebook, -codebook.flip(0))


@pytest.mark.parametrize("bits", sorted(GAUSSIAN))
def test_many_dimensions_are_gaussian(bits: int) -> None:
    codebook = sphere_codebook(16384, bits, CPU) * 16384**0.5
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    error = (x - codebook[torch.bucketize(x, (codebook[1:] + codebook[:-1]) / 2)]).square().mean()
    assert float(error) == pytest.approx(GAUSSIAN[bits], rel=0.01)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
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
        # with outliers all directions are nearly the same one, whose error is what the rotation happens to give it; K
        # is coded less the mean of 56 tokens, each its own sixty-fourth among them
        lowest = 0.99 if original is not x else 0.97
        low, high = (lowest, 1.01) if data != "outliers" else (0.75, 1.25)
        assert low * expected < float(error.mean()) < high * expected


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", sorted(FRACTIONS))
def test_half_a_bit_is_the_mean_of_two_quantizers(dim: int, bits: float) -> None:
    """Where no channel is louder, a quarter of the energy has the error of two bits more."""
    loud, rest = FRACTIONS[bits]
    x = torch.randn(2, 2, 2048, dim, generator=torch.Generator().manual_seed(1))
    expected = 0.25 * error_of(dim // 4, loud) + 0.75 * error_of(dim - dim // 4, rest)
    assert expected == pytest.approx(0.25 * GAUSSIAN[loud] + 0.75 * GAUSSIAN[rest], rel=64 / dim * 0.06)
    for back in Stack.parse(f"turboquant(bits={bits})").roundtrip(x, x):
        assert float((back - x).square().sum() / x.square().sum()) == pytest.approx(expected, rel=0.035)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", sorted(FRACTIONS))
def test_half_a_bit_for_outlier_channels_is_worth_more_than_one_for_all(dim: int, bits: float) -> None:
    x, _ = loud_keys(1, 4, 2048, dim)
    k, v = (Stack.parse(f"turboquant(k={bits}, v={bits + 0.5:g})")).roundtrip(x, x)
    assert (k - x).square().sum() < 0.9 * (v - x).square().sum()


def test_each_head_finds_its_own_loud_channels() -> None:
    x, loud = loud_keys(2, 3, 64, 128)
    codec, _ = Stack.parse("turboquant(bits=2.5)").plan(0, 1).build(_shape(128, heads=3))
    codec.fit(torch.arange(6), x.flatten(0, 1), x.flatten(0, 1))
    order = codec.state()["k.order.values"].long()
    assert torch.equal(order.sort().values, torch.arange(128).expand(6, 128))
    for stream in range(6):
        assert set(loud[stream % 3].tolist()) <= set(order[stream, :32].tolist())


def test_what_is_encoded_stays_readable_whatever_comes_later() -> None:
    """A stream's channels are settled by its first pages; other streams settle later, on others."""
    x, _ = loud_keys(1, 2, 64, 64)
    other, _ = loud_keys(1, 2, 64, 64, seed=1)
    codec, _ = Stack.parse("turboquant(bits=2.5)").plan(0, 1).build(_shape(64))

    def read(page: dict[str, Tensor], streams: Tensor) -> Tensor:
        return codec.inverse(*codec.decode(page), streams)[0]

    first = torch.tensor([0])
    codec.fit(first, x[0, :1], x[0, :1])
    page = codec.encode(x[0, :1], x[0, :1], first)
    before = read(page, first)
    second = torch.tensor([2, 3])  # heads 0 and 1 of a second row
    codec.fit(second, other[0], other[0])
    later = codec.encode(other[0], other[0], second)
    assert torch.equal(read(page, first), before)
    codec.fit(first, x[0, :1].flip(-1), x[0, :1])  # what is settled stays
    assert torch.equal(read(page, first), before)
    error = (read(later, second) - other[0]).square().sum((1, 2)) / other[0].square().sum((1, 2))
    assert error.max() < 0.04
    codec.select(torch.tensor([3, 0, 3]))
    assert torch.equal(read(page, torch.tensor([1])), before)


@pytest.mark.parametrize("bits", sorted(FRACTIONS))
def test_a_row_does_not_depend_on_the_rows_beside_it(bits: float) -> None:
    """Channels that are large in one row are not in the other."""
    k = torch.randn(2, 1, 128, 64, generator=torch.Generator().manual_seed(0))
    k[0, ..., :16] *= 20
    k[1, ..., 32:48] *= 20
    stack = Stack.parse(f"turboquant(bits={bits})")
    both = stack.roundtrip(k, k.flip(-1))
    for row in range(2):
        alone = stack.roundtrip(k[row : row + 1], k[row : row + 1].flip(-1))
        for ours, expected in zip(both, alone, strict=True):
            torch.testing.assert_close(ours[row], expected[0], rtol=1e-5, atol=1e-5)


def test_caches_saved_when_rows_shared_an_order_are_read_as_they_were() -> None:
    """order int64 [H, D] and settled [H] of H heads; stream s had that of head s mod H."""
    codec, _ = Stack.parse("turboquant(k=2.5, v=3)").plan(0, 1).build(_shape(64))
    order = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(h)) for h in range(2)])
    codec.restore({"k.order": order, "k.settled": torch.ones(2, dtype=torch.bool)})
    assert set(codec.state()) == {"k.order", "k.settled"}  # and can be saved again
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0)) + 5
    streams = torch.arange(4)
    codec.fit(streams, x, x)  # neither settled anew nor centred
    new, _ = Stack.parse("turboquant(k=2.5, v=3)").plan(0, 1).build(_shape(64))
    new.restore({"k.order.values": order.repeat(2, 1).short(), "k.order.settled": torch.ones(4, dtype=torch.bool)})
    pages = [c.encode(x, x, streams) for c in (codec, new)]
    assert all(torch.equal(pages[0][name], pages[1][name]) for name in pages[0])
    for c in (codec, new):
        c.select(torch.tensor([3, 3, 0]))
    ours, theirs = (
        c.inverse(*c.decode(page), torch.tensor([2, 2, 2, 2])) for c, page in zip((codec, new), pages, strict=True)
    )
    assert torch.equal(ours[0], theirs[0])


def test_a_saved_cache_knows_its_outlier_channels() -> None:
    x, _ = loud_keys(1, 2, 64, 64)
    old, new, blank = (Stack.parse("turboquant(k=2.5, v=3)").plan(0, 1).build(_shape(64))[0] for _ in range(3))
    streams = torch.arange(2)
    old.fit(streams, x[0], x[0])
    page = old.encode(x[0], x[0], streams)
    state = {name: tensor.clone() for name, tensor in old.state().items()}
    assert {"k.order.values", "k.order.settled"} <= set(state)
    new.restore(state)
    new.fit(streams, x[0].flip(-1), x[0])  # what is settled stays
    expected = old.inverse(*old.decode(page), streams)[0]
    assert torch.equal(new.inverse(*new.decode(page), streams)[0], expected)
    assert not torch.equal(blank.inverse(*blank.decode(page), streams)[0], expected)
    held = {t.data_ptr() for t in old.constants()}
    assert all(t.data_ptr() in held for t in old.state().values())


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 3.5, 4])
@pytest.mark.parametrize("variant", ["mse", "prod"])
def test_bits_are_codes_and_norms(dim: int, bits: float, variant: str) -> None:
    stack = Stack.parse(f"turboquant(bits={bits}, variant={variant})")
    if dim == 80 and (bits == 3.5 or (bits, variant) == (2.5, "prod")):
        with pytest.raises(SpecError, match=rf"bits={bits}.*20 of its 80 channels.*whole bytes: use whole bits"):
            stack.plan(0, 1).build(_shape(dim))
        return
    _, layout = stack.plan(0, 1).build(_shape(dim))
    norms = 2 if bits in FRACTIONS else 1
    residual = variant == "prod" and bits > 1
    assert 8 * sum(f.nbytes for f in layout.token_fields) == 64 * (2 * (bits * dim + 16 * norms) + 16 * residual)
    assert layout.centre_bytes == 2 * dim
    assert layout.bytes_per_page - sum(f.nbytes for f in layout.fields) <= 16 * (dim == 80)  # what alignment takes


SPECS = [
    "turboquant(bits=2)",
    "turboquant(bits=2.5)",
    "turboquant(k=3.5, v=2)",
    "turboquant(bits=1, variant=prod)",
    "turboquant(bits=3, variant=prod)",
    "turboquant(k=2.5, v=3.5, variant=prod)",
]


@pytest.mark.parametrize("spec", SPECS)
def test_zero_and_huge_vectors_survive(spec: str) -> None:
    x = torch.zeros(1, 1, 64, 64)
    x[..., 1, :] = 1e5
    for back in Stack.parse(spec).roundtrip(x, x):
        assert back.isfinite().all()
        assert not back[..., 0, :].any()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 96)])
def test_attention_needs_no_rotating_back(spec: str, dims: tuple[int, int]) -> None:
    """Two heads of two rows, each with pages of its own: read with folded queries as after reconstruction."""
    codec, layout = Stack.parse(spec).plan(0, 1).build(PageShape(64, *dims, 2, torch.float32, CPU, 0))
    generator = torch.Generator().manual_seed(2)
    k, v = (torch.randn(12, 64, dim, generator=generator) for dim in dims)
    q = torch.randn(4, 3, dims[0], generator=generator)
    streams = torch.arange(4).repeat_interleave(3)
    k[..., :5] *= 1 + 4 * (streams[:, None, None] % 2)  # heads differ in their large channels
    pool = PagePool(layout, CPU)
    ids = pool.allocate(12)
    pool.write(ids, codec.encode(k, v, streams))
    part = attend_pages(q, pool.data, ids.view(4, 3), torch.full((4,), 3), layout, codec, 0.1)
    plain_k, plain_v = codec.inverse(*codec.decode(layout.views(pool.data)), streams)
    assert plain_k.shape == k.shape
    logits = 0.1 * q @ plain_k.view(4, 192, dims[0]).mT
    torch.testing.assert_close(part.out, logits.softmax(-1) @ plain_v.view(4, 192, dims[1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.lse, logits.logsumexp(-1), atol=1e-4, rtol=1e-4)


def inner_products(spec: str, dim: int, related: bool) -> tuple[Tensor, Tensor]:
    """q . k and its error through `spec` for 32768 random unit keys; queries are unit vectors, related or not."""
    k, q = _unit(1, 1, 32768, dim, seed=3), _unit(1, 1, 32768, dim, seed=4)
    if related:
        q = (q + k) / (q + k).norm(dim=-1, keepdim=True)
    back, _ = Stack.parse(spec).roundtrip(k, k)
    return (q * k).sum(-1).flatten(), (q * (back - k)).sum(-1).flatten()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_prod_is_unbiased_and_mse_is_not(dim: int, bits: int) -> None:
    """Codes at the means of their cells shrink a vector by its squared error: E <q, k'> = (1 - error) <q, k>."""
    exact, off = inner_products(f"turboquant(bits={bits}, variant=prod)", dim, related=True)
    assert abs(off.mean()) < 3.5 * off.std() / len(off) ** 0.5
    assert off.std() / len(off) ** 0.5 < 0.01 * error_of(dim, bits) ** 0.5 * exact.mean()  # the bound is a tight one
    _, off = inner_products(f"turboquant(bits={bits})", dim, related=True)
    assert float(off.mean()) == pytest.approx(-error_of(dim, bits) * float(exact.mean()), rel=0.03)
    if bits <= 2:
        assert off.mean() < -100 * off.std() / len(off) ** 0.5


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", sorted(PUBLISHED))
def test_inner_product_error_of_prod(dim: int, bits: int) -> None:
    """Signs of a rotated residual r have squared error (pi / 2 - 1) |r|^2; Gaussian projections would have pi / 2."""
    _, off = inner_products(f"turboquant(bits={bits}, variant=prod)", dim, related=False)
    error = dim * float(off.square().mean())
    left = error_of(dim, bits - 1) if bits > 1 else 1.0
    assert error < PUBLISHED[bits]
    assert error == pytest.approx((pi / 2 - 1) * left, rel=0.06)  # less a page's centre it is a little smaller
    assert error == pytest.approx((1 - 2 / pi) * PUBLISHED[bits], rel=0.2)


def test_values_of_prod_are_those_of_mse() -> None:
    x = torch.randn(1, 2, 128, 64, generator=torch.Generator().manual_seed(0))
    (mse_k, mse_v), (prod_k, prod_v) = (
        Stack.parse(f"turboquant(k=3, v=2, variant={v})").roundtrip(x, x) for v in ("mse", "prod")
    )
    assert torch.equal(mse_v, prod_v)
    assert not torch.equal(mse_k, prod_k)


@pytest.mark.parametrize("bits", [0, 1.5, 2.25, 5])
def test_other_widths_are_refused(bits: float) -> None:
    for spec in (f"turboquant(bits={bits})", f"turboquant(v={bits}, variant=prod)"):
        with pytest.raises(SpecError, match=r"must be 1, 2, 2\.5, 3, 3\.5 or 4"):
            Stack.parse(spec)


def test_other_variants_are_refused() -> None:
    with pytest.raises(SpecError, match=r"variant='foo'.*mse or prod"):
        Stack.parse("turboquant(variant=foo)")


@pytest.mark.parametrize(
    "spec",
    ["turboquant(bits=2.5)", "turboquant(k=2.5, v=2)", "turboquant(bits=3, variant='prod')", "turboquant(bits=4)"],
)
def test_specs_round_trip(spec: str) -> None:
    stack = Stack.parse(spec)
    assert Stack.parse(str(stack)) == stack
    assert str(stack) == spec.replace("'", "")


def test_coordinates_that_a_rotation_made_no_numbers_give_the_largest_norm() -> None:
    """inf - inf in a sum of numbers near the largest, which depends on the order that torch's library sums in."""
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    x[0, 3, 2], x[0, 5] = torch.nan, torch.inf
    side = LloydGrid("k", 16, 8, 2, torch.tensor([-0.5, -0.1, 0.1, 0.5]))
    page = side.encode(x)
    assert page["k.norm"][0, [3, 5], 0].tolist() == [65504.0, 65504.0]
    assert bool(side.decode(page).isfinite().all())
