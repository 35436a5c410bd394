"""Transform coding in place: an attention-weighted Karhunen-Loeve basis with bits per channel."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.calibration import FILE, Tensors
from kvcomp.errors import SpecError
from kvcomp.fitting import QueryMoments
from kvcomp.kernel_layout import Codebook, Gain, Plane, SideLayout, Sides
from kvcomp.pages import Field
from kvcomp.registry import register
from kvcomp.stages import Codec, PageShape, arg
from kvcomp.state import DamagedError, State, described
from kvcomp.statistics import Statistics, weighted_directions

from .basis import Basis, rotation
from .calibrated import CalibratedQuantizer
from .grid import HUGE, SCALE, TINY
from .lloyd import nearest, sphere_codebook
from .packing import pack, planes, unpack
from .per_stream import weights
from .widths import BITS, WidthQuantizer

UNIT = 8  # channels that share a width: a bit each fills a byte
WIDEST = 8
MEAN = torch.float32
# Lloyd-Max distortion of a unit Gaussian at 0 to 8 bits (Max 1960, continued at a quarter of the last step per bit)
DISTORTION = (1.0, 0.36338, 0.11748, 0.03455, 0.0095, 0.0025, 0.00064, 0.000163, 0.0000413)
LONGEST = 3.0  # a norm grows at most so many times to make up for short codes
RIDGE = 1e-3  # of the mean variance: what is added to a second moment before it is inverted
SETTLED = 16  # tokens per channel from which on a moment is taken as it is
DOUBT = 1.0  # of the mean variance is added to the moment of as few tokens as channels
DECAY = {True: 2.8, False: 1.6}  # of weighted variances: unit i of centred keys, or of values, has ~ (i + 1)^-DECAY
LOUD = 4.0  # as in `weights`: at 2, the loud tokens that texts have by themselves cost 10 % of the divergence
SHORT = 2.0  # the norm of a value is at most so many times that of its coordinates
LARGEST = 1e30  # keys and values beyond saturate, which float16 norms do far earlier


def allocate(variance: Tensor, total: int) -> tuple[int, ...]:
    """Bits of each unit of channels, descending, for variances [n] of coordinates in descending order.

    `total` bits times units go one by one to the unit whose summed distortion falls most: reverse water-filling.
    """
    power = variance.double().unflatten(0, (-1, UNIT)).sum(-1).tolist()
    bits = [0] * len(power)
    for _ in range(total):
        gains = [
            p * (DISTORTION[b] - DISTORTION[b + 1]) if b < WIDEST else -1.0 for p, b in zip(power, bits, strict=True)
        ]
        bits[gains.index(max(gains))] += 1
    return tuple(sorted(bits, reverse=True))


@cache
def usual_widths(units: int, total: int, centred: bool) -> tuple[int, ...]:
    """Bits of each unit for streams that are not known beforehand: those of a spectrum that models' keys or values have
    on average, so that no stream depends on the others of its layer."""
    power = torch.arange(1, units + 1, dtype=torch.float32, device="cpu") ** -DECAY[centred]
    return allocate(power.repeat_interleave(UNIT), total)


def runs(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(bits, channels) of neighbouring units of the same width; those of width 0 are not stored."""
    return [(w, UNIT * widths.count(w)) for w in dict.fromkeys(widths) if w]


class KltSide:
    """K or V of a page: a norm per token, and Lloyd-Max codes of the rest in a basis per stream or per head.

    Coordinates are sorted by weighted variance and scaled to variance 1; units of 8 channels have 0 to 8 bits, the same
    for all streams of a layer, whatever those hold. Neighbours of one width are mixed by a random rotation, which costs
    nothing at equal width and makes heavy-tailed coordinates Gaussian.

    Keys are centred, and their norm is that of the coordinates. Values are not, and theirs is their own: many heads
    rest on tokens of tiny values, which then have tiny errors too; but it is at most SHORT times that of the
    coordinates. Values of a stream whose tokens are all alike use few coordinates, which would lie between the
    innermost levels. Codes of few bits are short, and attention would lean to exact tokens: the norm that is stored
    makes up for it, token by token, so that k . k^ = |k|^2 under the weight of the basis, and |v^| = |v| of what has
    bits.

    bits: code bits per element; the units' widths always sum to `bits` x units, so that the layout is known beforehand.
    """

    def __init__(self, name: str, page_size: int, dim: int, bits: float, device: torch.device, centred: bool) -> None:
        units = bits * dim / UNIT
        if dim % UNIT or units != int(units):
            raise SpecError(
                f"klt({name}={bits}): {dim} channels of {bits} bits do not fill units of {UNIT} channels with whole "
                "bits: use whole bits, and head dimensions that are multiples of 8"
            )
        self.name, self.page_size, self.dim, self.total, self.device = name, page_size, dim, int(units), device
        self.widths = usual_widths(dim // UNIT, self.total, centred)
        # x ~ z D' + mean: D [n, d, d] and mean [n, d] of n streams, or of n heads that all rows share
        self.dual = torch.zeros(0, dim, dim, dtype=SCALE, device=device)
        self.mean = torch.zeros(0, dim, dtype=MEAN, device=device) if centred else None

    @property
    def fields(self) -> tuple[Field, ...]:
        codes = Field(f"{self.name}.codes", (self.page_size, self.total), torch.uint8)
        return codes, Field(f"{self.name}.norm", (self.page_size, 1), SCALE)

    @property
    def live(self) -> int:
        """Coordinates that are stored."""
        return sum(n for _, n in runs(self.widths))

    def fit(self, streams: Tensor, x: Tensor, weight: Tensor) -> None:
        """Use the best basis for tokens x [s, n, d] of `streams`, which have no pages yet, under `weight` [s, d, d]."""
        n, x = x.shape[1], x.double().clamp(-LARGEST, LARGEST)
        if self.mean is None:
            x = x / _rms(x).clamp_min(TINY)
            mean, moment = x.mean(1), x.mT @ x / n
            centred = moment - mean[:, :, None] * mean[:, None]
        else:  # in which single loud tokens count for little
            mean = _weighted(x)[0]
            _, centred = _weighted(x - mean[:, None])
            moment = centred
        uncertain = shrinkage(centred, n) * _ladder(self.dim, x.device)
        dual, _ = scaled_directions(moment + uncertain, weight.double())
        self.take(streams, dual, mean)

    def take(self, streams: Tensor, dual: Tensor, mean: Tensor) -> None:
        """Use the basis `dual` [s, d, d] and mean [s, d] for `streams`, which have no pages yet."""
        self.room(int(streams.max()) + 1)
        dual = dual.clone()
        if self.mean is not None:  # the norm of a token carries the size, whatever float16 can hold
            dual = dual / dual.square().mean((1, 2), keepdim=True).sqrt().clamp_min(TINY)
        dual[:, :, : self.live] = dual[:, :, : self.live] @ _mixing(self.widths, self.device)
        self.dual = self.dual.index_put((streams,), dual.to(SCALE))  # forks share the old one
        if self.mean is not None:
            self.mean = self.mean.index_put((streams,), mean.to(MEAN))

    def room(self, streams: int) -> None:
        """Have matrices for so many streams; zero until they are taken."""
        missing = streams - len(self.dual)
        if missing > 0:
            self.dual = F.pad(self.dual, (0, 0, 0, 0, 0, missing))
            self.mean = None if self.mean is None else F.pad(self.mean, (0, 0, 0, missing))

    def select(self, streams: Tensor) -> None:
        """Keep `streams`, in this order."""
        self.dual = self.dual[streams]
        self.mean = None if self.mean is None else self.mean[streams]

    def basis(self) -> Basis:
        """What maps queries to coordinates, and coordinates back."""
        return Basis(None, self.dual[:, :, : self.live].float(), self.mean)

    def coordinates(self, x: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, P, D] of `streams` [M] -> coordinates [M, P, live] and norms [M, P, 1], before what makes up for short
        codes; float32."""
        x = x.float().clamp(-LARGEST, LARGEST)
        used, which = (streams % len(self.dual)).unique(return_inverse=True)
        write = torch.linalg.inv(self.dual[used].float()).mT[:, :, : self.live]  # what is stored decides
        z = (x if self.mean is None else x - self.mean[used][which, None]) @ write[which]
        size = _rms(z)
        return z, size if self.mean is not None else _rms(x).minimum(SHORT * size)

    def encode(self, x: Tensor, streams: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] of `streams` [M] -> fields."""
        z, norm = self.coordinates(x, streams)
        z = z / norm.clamp_min(TINY)
        rows, own, shrunk = [], torch.zeros_like(norm), torch.zeros_like(norm)
        at = 0
        for bits, n in runs(self.widths):
            part = z[..., at : at + n].contiguous()
            at += n
            book = codebook(self.live, bits, self.device)
            codes = nearest(part, book)
            weight = _weight(bits)
            coded = book[codes.int()]
            own += weight * part.square().sum(-1, keepdim=True)
            shrunk += weight * (coded * (coded if self.mean is None else part)).sum(-1, keepdim=True)
            left = bits
            for width in planes(bits):
                left -= width
                rows.append(pack((codes >> left) & ((1 << width) - 1), width))
        gain = (own / shrunk.clamp_min(TINY)).clamp_max(LONGEST)
        norm = norm * (gain.sqrt() if self.mean is None else gain)
        return {
            f"{self.name}.codes": torch.cat(rows, -1),
            f"{self.name}.norm": norm.nan_to_num(HUGE).clamp_max(HUGE).to(SCALE),
        }

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> coordinates [M, P, live] float32."""
        rows, parts, at = page[f"{self.name}.codes"], [], 0
        for bits, n in runs(self.widths):
            codes = torch.zeros((), dtype=torch.int32, device=rows.device)
            for width in planes(bits):
                plane = unpack(rows[..., at : at + n * width // 8].contiguous(), width).int()
                codes = (codes << width) | plane
                at += n * width // 8
            parts.append(codebook(self.live, bits, self.device)[codes])
        return torch.cat(parts, -1) * page[f"{self.name}.norm"].float()

    @property
    def kernel_layout(self) -> SideLayout:
        return _kernel_layout(self.name, self.widths, self.device, self.mean is not None)

    def constants(self) -> list[Tensor]:
        return [self.dual] if self.mean is None else [self.dual, self.mean]

    def state(self) -> dict[str, Tensor]:
        widths = torch.tensor(self.widths, dtype=torch.uint8, device="cpu")
        state = {f"{self.name}.dual": self.dual, f"{self.name}.widths": widths}
        return state if self.mean is None else state | {f"{self.name}.mean": self.mean}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.dual, self.mean = state[f"{self.name}.dual"], state.get(f"{self.name}.mean")
        self.widths = tuple(state[f"{self.name}.widths"].tolist())
        fits = len(self.widths) == self.dim // UNIT and sum(self.widths) == self.total and max(self.widths) <= WIDEST
        if self.widths and not (fits and list(self.widths) == sorted(self.widths, reverse=True)):
            raise DamagedError(
                f"{self.name}.widths are {list(self.widths)}, which are not {self.total} bits, descending"
            )

    def lacks(self, paged: Tensor) -> str | None:
        """As `Codec.lacks`, of bool [S] `paged`."""
        if not bool(paged.any()) or self.dual.is_meta:
            return None
        if not self.widths:
            return f"some streams have pages, but {self.name}.widths are not settled"
        singular = _singular(self.dual[paged.nonzero().flatten().to(self.device)].float())
        return f"{self.name}.dual is singular" if bool(singular.any()) else None


@cache
def codebook(dim: int, bits: int, device: torch.device) -> Tensor:
    """float32 [2^bits]: centroids for coordinates of variance 1 whose vectors in R^dim have the norm dim^(1/2)."""
    return sphere_codebook(dim, bits, device) * dim**0.5


def _weight(bits: int) -> float:
    """What water-filling gives so many bits has so much of the weighted variance."""
    return 4.0**bits


@cache
def _kernel_layout(name: str, widths: tuple[int, ...], device: torch.device, centred: bool) -> SideLayout:
    """A segment for each run of equal width; all streams of a layer have the same."""
    live, at, segments = sum(n for _, n in runs(widths)), 0, []
    for bits, n in runs(widths):
        found = []
        for width in planes(bits):
            found.append(Plane(f"{name}.codes", width, at))
            at += n * width // 8
        segments.append(Codebook(n, tuple(found), f"{name}.norm", codebook(live, bits, device)))
    weights = tuple(_weight(bits) for bits, _ in runs(widths))
    return SideLayout(tuple(segments), Gain(weights, 1.0 if centred else 0.5, LONGEST))


@cache
def _mixing(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 [live, live]: a random rotation of each run of equal width."""
    return torch.block_diag(*(rotation(n, device).matrix for _, n in runs(widths)))


class KltCodec(Codec):
    """K and V in bases of their own: given per head, or fitted to the first tokens that a stream encodes.

    To fit, the second moment of a stream's queries is gathered until its first page, and dropped then.
    """

    hosted = True

    def __init__(self, k_side: KltSide, v_side: KltSide, fitted_heads: bool = False) -> None:
        self.k_side, self.v_side, self.fitted_heads = k_side, v_side, fitted_heads
        self.queries = QueryMoments(k_side.dim, k_side.device)

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.k_side.fields + self.v_side.fields

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        if not self.fitted_heads:
            self.queries.add(streams, queries)

    def fit(self, streams: Tensor, keys: Tensor, values: Tensor, due: Tensor | None = None) -> None:
        if self.fitted_heads:
            return
        new = self.queries.missing(streams)
        if not bool(new.any()):
            return
        ours = streams[new]
        weight = self.queries.take(ours)
        identity = torch.eye(self.v_side.dim, device=weight.device, dtype=torch.float32)
        self.k_side.fit(ours, keys[new], weight)
        self.v_side.fit(ours, values[new], identity.expand(len(ours), -1, -1))

    def _room(self, streams: int) -> None:
        for side in (self.k_side, self.v_side):
            side.room(streams)

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        return self.k_side.encode(keys, streams) | self.v_side.encode(values, streams)

    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.k_side.coordinates(keys, streams), self.v_side.coordinates(values, streams)
        return torch.cat(k, -1), torch.cat(v, -1)

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.k_side.decode(page), self.v_side.decode(page)

    def kernel_sides(self) -> Sides:
        return self.k_side.kernel_layout, self.v_side.kernel_layout

    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.fitted_heads:
            self._room(len(queries))
        basis = self.k_side.basis()
        return basis.read(queries), basis.offset(queries)

    def read_output(self, output: Tensor) -> Tensor:
        return self.v_side.basis().inverse(output, torch.arange(len(output), device=output.device))

    def inverse(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        return self.k_side.basis().inverse(keys, streams), self.v_side.basis().inverse(values, streams)

    def select(self, streams: Tensor) -> None:
        if self.fitted_heads:
            return
        self._room(int(streams.max()) + 1 if len(streams) else 0)
        self.queries.select(streams)
        for side in (self.k_side, self.v_side):
            side.select(streams)

    def fork(self) -> KltCodec:
        twin = copy(self)
        twin.k_side, twin.v_side, twin.queries = copy(self.k_side), copy(self.v_side), self.queries.fork()
        return twin

    def constants(self) -> list[Tensor]:
        return [*self.k_side.constants(), *self.v_side.constants(), *self.queries.constants()]

    def adapted(self) -> list[Tensor]:
        return [] if self.fitted_heads else [*self.k_side.constants(), *self.v_side.constants()]

    def state(self) -> dict[str, Tensor]:
        if self.fitted_heads:
            return {}  # the calibration file says it all
        return self.k_side.state() | self.v_side.state() | self.queries.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if self.fitted_heads:
            return
        self.queries.restore(state)
        for side in (self.k_side, self.v_side):
            side.restore(state)

    def lacks(self, paged: Tensor) -> str | None:
        if self.fitted_heads:
            return None
        why = self.queries.lacks(paged, *self.k_side.constants(), *self.v_side.constants())
        return why or self.k_side.lacks(paged) or self.v_side.lacks(paged)


def _singular(matrices: Tensor) -> Tensor:
    """bool [n]: which of float32 [n, d, d] have no inverse."""
    inverse, info = torch.linalg.inv_ex(matrices)
    return (info != 0) | ~inverse.isfinite().all(-1).all(-1)


def _rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension, kept: a norm that float16 can hold wherever it can hold x."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return (x / largest).square().mean(-1, keepdim=True).sqrt() * largest


def _weighted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [s, d] of x [s, n, d], and its second moment [s, d, d] up to a factor; see `weights`."""
    weight, unit = weights(x, LOUD)
    y = x * weight / unit
    mean = y.sum(1) / weight.sum(1).clamp_min(1e-30) * unit[:, 0]
    return mean, y.mT @ y / weight.square().sum(1, keepdim=True).clamp_min(1e-30)


@cache
def _ladder(dim: int, device: torch.device) -> Tensor:
    """float64 [dim]: 0.75 to 1.25. Directions that no token has would be equal otherwise, and rounding would choose."""
    return torch.linspace(0.75, 1.25, dim, dtype=torch.float64, device=device)


def scaled_directions(covariance: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """D [s, d, d] with x ~ z D' + mean, z of variance 1 by falling weighted variance [s, d]; both float32.

    Of all linear maps this one leaves the least E[(x - x^)' weight (x - x^)] at any number of coordinates kept.
    """
    dim = covariance.shape[-1]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(TINY)
    covariance = covariance + RIDGE * level * torch.diag(_ladder(dim, covariance.device))
    write, read = weighted_directions(covariance, weight, RIDGE)
    turned = (read * torch.arange(1, dim + 1, device=read.device)[:, None].cos()).sum(1, keepdim=True) < 0
    write, read = (torch.where(turned, -x, x) for x in (write, read))  # which sign they have is a convention
    variance = torch.einsum("sij,sik,skj->sj", write, covariance, write)
    return (read * variance.sqrt()[:, None]).float(), variance.float()


def shrinkage(covariance: Tensor, tokens: int) -> Tensor:
    """What is added to a moment of few tokens whose covariance is [s, d, d]: the same in every direction.

    A few hundred tokens of one passage hardly vary in directions that later tokens do use. Bits that are spread a
    little more evenly cost them little, and save those.
    """
    dim = covariance.shape[-1]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    identity = torch.eye(dim, device=covariance.device, dtype=torch.float32)
    return max(dim / tokens - 1 / SETTLED, 0.0) * DOUBT * level * identity


@register("klt")
@dataclass(frozen=True)
class Klt(WidthQuantizer, CalibratedQuantizer):
    """Transform coding: an attention-weighted Karhunen-Loeve basis per head, with bits where the variance is.

    Per KV head, with S the second moment of its queries and C the covariance of its keys, the eigenvectors of
    S^1/2 C S^1/2 give coordinates whose squared error is that of q . k; values take those of the second moment of their
    directions v / |v|. Bits go to units of 8 coordinates by reverse water-filling; a page holds their Lloyd-Max codes
    and a float16 norm per token, and is attended as it is. The basis is fitted to the prompt itself when the first page
    is written, and held in float16: D x D for K and for V of each head and row; or it comes from `calibration`, and
    rows share it.

    `bits` + 16 / D effective bits, plus the basis. Of equal sums, more bits for K than for V find more needles.
    """

    paper: ClassVar[str] = "kvcomp; cf. arXiv:2511.01815"
    required: ClassVar[bool] = False
    widths: ClassVar[tuple[float, ...]] = tuple(n / 2 for n in range(2, 13))

    bits: int | float | None = arg(2, f"{BITS} on average: 1 to 6 in halves")
    calibration: str | None = arg(None, f"{FILE}; None: fitted to the prompt")

    @property
    def needs_queries(self) -> bool:
        return self.calibration is None

    @property
    def default_window(self) -> tuple[int, int]:
        return 4, 128

    @classmethod
    def calibrate(cls, seen: Statistics) -> dict[str, Tensor]:
        """Per side: the basis [H, D, D] and the variances [H, D]; of keys the mean [H, D]."""
        k = scaled_directions(seen.key_covariance, seen.queries)
        identity = torch.eye(seen.value_mean.shape[-1], dtype=torch.float64, device="cpu")
        identity = identity.expand_as(seen.value_directions)
        v = scaled_directions(seen.value_directions * len(identity[0]), identity)
        return {"k.basis": k[0], "k.variance": k[1], "k.mean": seen.key_mean, "v.basis": v[0], "v.variance": v[1]}

    @classmethod
    def check_layer(cls, layer: State) -> None:
        for name in ("k", "v"):
            basis = layer.finite(f"{name}.basis", (None, None, None), torch.float32)
            variance = layer.finite(f"{name}.variance", basis.shape[:2], torch.float32)
            layer.require(
                bool((variance >= 0).all() and (variance.double().sum(-1) > 0).all()), f"{name}.variance is 0"
            )
            layer.require(basis.shape[1] == basis.shape[2], f"{name}.basis is {described(basis)}, no square matrices")
            size = basis.double().square().mean((1, 2), keepdim=True).sqrt()
            stored = (basis / (size if name == "k" else 1)).to(SCALE).float()
            layer.require(not bool(_singular(stored).any()), f"{name}.basis has no inverse")
        layer.finite("k.mean", layer["k.variance"].shape, torch.float32)

    def _sides(self, shape: PageShape) -> tuple[KltSide, KltSide]:
        return (
            KltSide("k", shape.page_size, shape.k_dim, self.k_bits, shape.device, centred=True),
            KltSide("v", shape.page_size, shape.v_dim, self.v_bits, shape.device, centred=False),
        )

    def fields(self, shape: PageShape) -> tuple[Field, ...]:
        return tuple(field for side in self._sides(shape) for field in side.fields)

    def adapted_bytes(self, shape: PageShape) -> int:
        bases = (shape.k_dim**2 + shape.v_dim**2) * SCALE.itemsize
        return 0 if self.calibration else bases + shape.k_dim * MEAN.itemsize

    def codec(self, shape: PageShape) -> Codec:
        return KltCodec(*self._sides(shape)) if self.calibration is None else super().codec(shape)

    def made_of(self, calibration: Tensors, shape: PageShape) -> Codec:
        sides, heads = self._sides(shape), torch.arange(shape.heads, device=shape.device)
        for side in sides:
            basis = calibration.tensor(f"{side.name}.basis", shape, side.dim, side.dim)
            variance = calibration.tensor(f"{side.name}.variance", shape, side.dim)
            mean = torch.zeros_like(variance) if side.mean is None else calibration.tensor("k.mean", shape, side.dim)
            side.widths = allocate((variance / variance.sum(-1, keepdim=True)).mean(0), side.total)
            side.take(heads, basis, mean)
        return KltCodec(*sides, fitted_heads=True)
