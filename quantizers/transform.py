"""K or V of a page as transform coding stores it: a norm per token, and codes in a basis of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.errors import SpecError
from kvcomp.layout import Field
from kvcomp.segments import Codebook, Gain, Plane, SideLayout
from kvcomp.state import DamagedError

from .basis import Basis, each_page, rotation, times
from .directions import ladder, rms, scaled_directions, shrinkage, singular, weighted
from .grid import HUGE, SCALE, TINY
from .lloyd import nearest, sphere_codebook
from .packing import pack, planes, unpack
from .waterfill import UNIT, WIDEST, runs, usual_widths

MEAN = torch.float32
LONGEST = 3.0  # a norm grows at most so many times to make up for short codes
SHORT = 2.0  # the norm of a value is at most so many times that of its coordinates
LARGEST = 1e30  # keys and values beyond saturate, which float16 norms do far earlier


class KLTGrid:
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
    def dual(self) -> Tensor:
        return self._dual

    @dual.setter
    def dual(self, dual: Tensor) -> None:
        self._dual = dual
        self._stored: tuple[tuple[int, ...], Basis] | None = None  # it would keep the old one's memory

    @property
    def fields(self) -> tuple[Field, ...]:
        codes = Field(f"{self.name}.codes", (self.page_size, self.total), torch.uint8)
        return codes, Field(f"{self.name}.norm", (self.page_size, 1), SCALE)

    @property
    def live(self) -> int:
        """Coordinates that are stored."""
        return sum(n for _, n in runs(self.widths))

    def fit(self, streams: Tensor, x: Tensor, weight: Tensor | None) -> None:
        """Use the best basis for tokens x [s, n, d] of `streams`, which have no pages yet, under `weight` [s, d, d];
        None: the identity."""
        n, x = x.shape[1], x.float().clamp(-LARGEST, LARGEST)  # moments are of numbers near 1, which float32 can sum
        if self.mean is None:
            x = x / rms(x).clamp_min(TINY)
            mean, moment = x.mean(1).double(), (x.mT @ x / n).double()
            centred = moment - mean[:, :, None] * mean[:, None]
        else:  # in which single outlier tokens count for little
            mean = weighted(x)[0]
            _, centred = weighted(x - mean[:, None])
            moment = centred
        uncertain = shrinkage(centred, n) * ladder(self.dim, x.device)
        dual, _ = scaled_directions(moment + uncertain, None if weight is None else weight.double())
        self.take(streams, dual, mean)

    def take(self, streams: Tensor, dual: Tensor, mean: Tensor) -> None:
        """Use the basis `dual` [s, d, d] and mean [s, d] for `streams`, which have no pages yet."""
        self.reserve(int(streams.max()) + 1)
        dual = dual.clone()
        if self.mean is not None:  # the norm of a token carries the size, whatever float16 can hold
            dual = dual / dual.square().mean((1, 2), keepdim=True).sqrt().clamp_min(TINY)
        dual[:, :, : self.live] = dual[:, :, : self.live] @ _mixing(self.widths, self.device)
        self.dual = self.dual.index_put((streams,), dual.to(SCALE))  # forks share the old one
        if self.mean is not None:
            self.mean = self.mean.index_put((streams,), mean.to(MEAN))

    def reserve(self, streams: int) -> None:
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

    def stored_basis(self) -> Basis:
        """As `basis`, in the dtype that it is stored in; made once for each basis, as every decode step asks for it."""
        known = self._stored
        if known is None or known[0] is not self.widths or known[1].mean is not self.mean:
            self._stored = known = self.widths, Basis(None, self.dual[:, :, : self.live], self.mean)
        return known[1]

    def coordinates(self, x: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        """x [M, P, D] of `streams`, as of `Basis.write`, -> coordinates [M, P, live] and norms [M, P, 1], before what
        makes up for short codes; float32."""
        x = x.float().clamp(-LARGEST, LARGEST)
        used, which = streams % len(self.dual), None
        if used.is_cpu and len(used) > 1:
            used, which = used.unique(return_inverse=True)
        elif len(used) > len(self.dual):  # to look which there are would be to wait for the device
            used, which = torch.arange(len(self.dual), device=used.device), used
        inverse = torch.linalg.inv_ex(self.dual[used].float()).inverse  # what is stored decides
        write = inverse.mT[:, :, : self.live]
        z = x if self.mean is None else x - self.mean[each_page(streams % len(self.dual), len(x)), None]
        z = times(z, write, torch.arange(len(used), device=x.device) if which is None else which)
        size = rms(z)
        return z, size if self.mean is not None else rms(x).minimum(SHORT * size)

    def encode(self, x: Tensor, streams: Tensor) -> dict[str, Tensor]:
        """x [M, P, D] of `streams` [M] -> fields."""
        z, norm = self.coordinates(x, streams)
        z = z / norm.clamp_min(TINY)
        rows, own, shrunk = [], torch.zeros_like(norm), torch.zeros_like(norm)
        at = 0
        for bits, n in runs(self.widths):
            part = z[..., at : at + n].contiguous()
            at += n
            codebook = scaled_codebook(self.live, bits, self.device)
            codes = nearest(part, codebook)
            weight = _weight(bits)
            coded = codebook[codes.int()]
            own += weight * part.square().sum(-1, keepdim=True)
            shrunk += weight * (coded * (coded if self.mean is None else part)).sum(-1, keepdim=True)
            left = bits
            for width in planes(bits):
                left -= width
                rows.append(pack((codes >> left) & ((1 << width) - 1), width))
        gain = (own / shrunk.clamp_min(TINY)).clamp_max(LONGEST)
        norm = norm * (gain.sqrt() if self.mean is None else gain)
        norm = norm.nan_to_num(HUGE).clamp_max(HUGE)
        return {f"{self.name}.codes": torch.cat(rows, -1), f"{self.name}.norm": norm.to(SCALE)}

    def decode(self, page: Mapping[str, Tensor]) -> Tensor:
        """Fields [M, ...] -> coordinates [M, P, live] float32."""
        rows, parts, at = page[f"{self.name}.codes"], [], 0
        for bits, n in runs(self.widths):
            codes = torch.zeros((), dtype=torch.int32, device=rows.device)
            for width in planes(bits):
                plane = unpack(rows[..., at : at + n * width // 8].contiguous(), width).int()
                codes = (codes << width) | plane
                at += n * width // 8
            parts.append(scaled_codebook(self.live, bits, self.device)[codes])
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
        flat = singular(self.dual[paged.nonzero().flatten().to(self.device)].float())
        return f"{self.name}.dual is singular" if bool(flat.any()) else None


@cache
def scaled_codebook(dim: int, bits: int, device: torch.device) -> Tensor:
    """float32 [2^bits]: centroids for coordinates of variance 1 whose vectors in R^dim have the norm dim^(1/2)."""
    codebook: Tensor = sphere_codebook(dim, bits, device) * dim**0.5
    return codebook


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
        segments.append(Codebook(n, tuple(found), f"{name}.norm", scaled_codebook(live, bits, device)))
    weights = tuple(_weight(bits) for bits, _ in runs(widths))
    return SideLayout(tuple(segments), Gain(weights, 1.0 if centred else 0.5, LONGEST))


@cache
def _mixing(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 [live, live]: a random rotation of each run of equal width."""
    matrix: Tensor = torch.block_diag(*(rotation(n, device).matrix for _, n in runs(widths)))
    return matrix
