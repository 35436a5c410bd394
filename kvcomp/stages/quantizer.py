"""Quantizers and their codecs: the bytes of a page."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcomp.layout import Field
from kvcomp.segments import KVLayout

from .arguments import Alias
from .stage import Stage


@dataclass(frozen=True)
class PageShape:
    """What a codec is made for: one layer's pages. `heads` is the number of KV heads.

    centred: whether pages may have a centre, as those of caches lack that were saved before there were any.
    latent: values are the first `v_dim` channels of keys, and share their bytes. kept: of these, how many pages keep;
    None: all. The others are 0 in pages. rank: of an engine that splits KV heads over several, which, of how many.
    """

    page_size: int
    k_dim: int
    v_dim: int
    heads: int
    dtype: torch.dtype
    device: torch.device
    layer: int
    centred: bool = True
    latent: bool = False
    kept: int | None = None
    rank: tuple[int, int] = (0, 1)

    def of_rank(self, tensor: Tensor) -> Tensor:
        """Of a tensor [H, ...] of all KV heads, those of the rank; heads are repeated where there are more ranks."""
        rank, ranks = self.rank
        held = len(tensor)
        first = rank * self.heads if held >= ranks * self.heads else rank * held // ranks
        return tensor if ranks == 1 else tensor[first : first + self.heads]

    @property
    def channels(self) -> int:
        """Numbers of a token that are held."""
        return self.k_dim if self.latent else self.k_dim + self.v_dim


class Codec:
    """One layer's quantizer: from K and V to the fields of a page and back. A stream is row * heads + head.

    `encode` gets post-RoPE keys `[M, P, Dk]` and values `[M, P, Dv]` of M pages and the stream of each; `decode` gives
    them back *in basis coordinates*, float32. `read_query` and `read_output` are the basis on the read side, so that
    `decode`d keys never need mapping back: q . k = read_query(q) . decode(k) + bias, and the attention output over
    decoded values is mapped once by `read_output`. `inverse` gives decoded K and V in the original coordinates; only
    round trips and dense reconstruction use it.

    What `observe`, `fit` and `encode` get is finite, unless the codec is lossless: the store puts 0 in place of nan and
    infinities, and warns. What is not overridden here is the identity.
    """

    lossless: bool = False
    hosted: bool = False  # whether `fit` or `encode` look at tensors on the host, which no recorded graph can

    @property
    def adapts(self) -> bool:
        """Whether `fit` does anything."""
        return type(self).fit is not Codec.fit

    @property
    def rotates(self) -> bool:
        """Whether pages have other coordinates than K and V: `read_output` is not the identity, or `read_query` changes
        queries."""
        return True

    @property
    def fields(self) -> tuple[Field, ...]:
        """Fields of a page; the layout of a layer is made from them once."""
        raise NotImplementedError

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        """Fields [M, *shape] of M pages; streams int64 [M], or [s] which have M / s of the pages each, in a row."""
        raise NotImplementedError

    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor] | None:
        """Coordinates [M, P, Rk] and [M, P, Rv] from which kernels write, a segment of `kernel_layouts` at a time, what
        `encode` gives; after them each token's norm where a side has a gain. None: they cannot. A codec that does not
        `rotate` may get, and then gives, [s, M / s, P, D] of s streams, strided in memory."""
        return None

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys [M, P, Rk] and values [M, P, Rv] in basis coordinates, float32."""
        raise NotImplementedError

    def read_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries [S, R, Dk] of all streams -> [S, R, Rk] and what to add to every q . k, [S, R] (None: nothing)."""
        return queries, None

    def read_output(self, output: Tensor) -> Tensor:
        """Attention output [S, R, Rv] of all streams over decoded values -> [S, R, Dv]."""
        return output

    def read_bases(self) -> Any:
        """The bases of K and of V, by which `read_query` and `read_output` multiply all that they get; None: they do
        otherwise, or more."""
        return None

    def read_value_query(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `read_query`, of queries [S, R, Dv] that are multiplied with decoded values (latents: see `latent`)."""
        return queries, None

    def read_key_output(self, output: Tensor) -> Tensor:
        """As `read_output`, of attention output [S, R, Rk] over decoded keys."""
        return output

    def inverse(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded K and V of M pages, of streams as of `encode`, in original coordinates: [M, P, Dk], [M, P, Dv]."""
        return keys, values

    def kernel_layouts(self) -> KVLayout | None:
        """How kernels can read K and V of a page; None: they cannot, and `decode` is used. The same objects every time,
        as long as pages are read the same way."""
        return None

    def write_layouts(self) -> KVLayout | None:
        """How kernels write what `kernel_input` gives; None: they cannot."""
        return self.kernel_layouts()

    def constants(self) -> list[Tensor]:
        """Tensors that the layer holds besides pages."""
        return []

    def adapted(self) -> list[Tensor]:
        """Those of `constants` that were made for the current streams, and that a decode step loads."""
        return []

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        """See queries [s, R, Dk] of `streams` (int64 [s]) before tokens of the same chunk are encoded.

        Called for chunks, not for single decode steps, and only where the quantizer `needs_queries`.
        """

    def fit(self, streams: Tensor, keys: Tensor, values: Tensor, due: Tensor | None = None) -> None:
        """See keys [s, n, Dk] and values [s, n, Dv] of `streams`: those that `encode` is given next, and the newer ones
        still in the window. What adapts to its data does so the first time.

        due bool [s]: those of `streams` that this is true of; None: all. Only for codecs that are not `hosted`, after
        `room`, and without a look at any tensor on the host."""

    def reserve(self, streams: int) -> None:
        """Reserve memory for what so many streams adapt to; tensors then stay where they are until `select`."""

    def select(self, streams: Tensor) -> None:
        """Keep, repeat and order streams (beams): int64 [S']."""

    def fork(self) -> Codec:
        """A codec that goes on by itself from here. Tensors may be shared as long as none is changed in place."""
        return copy(self)

    def state(self) -> dict[str, Tensor]:
        """Those of `constants` that the stack alone does not determine, by name: what a saved cache has to hold."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` of a codec for the same layer gave.

        From a file it is a `State`: numbers are finite, and tensors with the names of a new codec's `state` have its
        dtypes and sizes, where those are not 0. A DamagedError says what else is wrong.
        """

    def lacks(self, paged: Tensor) -> str | None:
        """What `restore` should have given for the streams of which bool [S] `paged` have pages; None: nothing."""
        return None


class AroundCodec(Codec):
    """A codec of pages of another shape, made of one that adapts, is saved and follows streams in its place."""

    def __init__(self, codec: Codec) -> None:
        self.codec, self.hosted = codec, codec.hosted

    @property
    def adapts(self) -> bool:
        return self.codec.adapts

    def constants(self) -> list[Tensor]:
        return self.codec.constants()

    def adapted(self) -> list[Tensor]:
        return self.codec.adapted()

    def reserve(self, streams: int) -> None:
        self.codec.reserve(streams)

    def select(self, streams: Tensor) -> None:
        self.codec.select(streams)

    def fork(self) -> AroundCodec:
        twin = copy(self)
        twin.codec = self.codec.fork()
        return twin

    def state(self) -> dict[str, Tensor]:
        return self.codec.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.codec.restore(state)

    def lacks(self, paged: Tensor) -> str | None:
        return self.codec.lacks(paged)


@dataclass(frozen=True)
class Quantizer(Stage):
    """Decides the bytes of a page."""

    family: ClassVar[str] = "quantizer"
    aliases: ClassVar[Mapping[str, str | Alias]] = {
        "nbits": "bits",  # transformers' QuantizedCache, as q_group_size
        "k_bits": "k",
        "v_bits": "v",
        "group_size": "group",
        "q_group_size": "group",
    }

    @property
    def needs_queries(self) -> bool:
        """Whether `Codec.observe` has to be called."""
        return False

    @property
    def default_window_bits(self) -> int | None:
        """`bits` of the window of a stack without a `window(...)` of its own."""
        return None

    def codec(self, shape: PageShape) -> Codec:
        """What encodes and decodes the pages of one layer."""
        raise NotImplementedError

    def has_layer(self, layer: int) -> bool:
        """Whether it can make pages of a layer beyond those that the stack always compresses."""
        return True

    def adapted_bytes(self, shape: PageShape) -> int:
        """Bytes per stream of `Codec.adapted`, once the stream has pages."""
        return 0

    def shared_bytes(self, shape: PageShape) -> int:
        """Bytes that a layer holds for all of its `shape.heads` heads and rows, whatever the context."""
        return 0

    def fields(self, shape: PageShape) -> tuple[Field, ...]:
        """Fields of a page, which a plan needs before there is anything to load."""
        return self.codec(shape).fields
