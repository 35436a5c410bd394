"""The three stage families and what each has to provide.

A stage is a frozen dataclass: its fields are the arguments of its spec, `metadata={"help": ...}` documents them. It
configures; the objects that hold tensors (`Codec`) are made from it once per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from kvcomp.attention import Part
from kvcomp.errors import SpecError
from kvcomp.fingerprint import Fingerprint
from kvcomp.kernel_layout import Sides
from kvcomp.pages import Field, Summary
from kvcomp.text import is_plain, quote

WHOLE = 2**53  # whole numbers of arguments lie within +-WHOLE: beyond every count, within int64 and exact as floats
LEAST_SHARE = 1e-6  # a smaller share of any prompt, or of any head's channels, is nothing


def arg(default: Any, help: str) -> Any:
    """A dataclass field with a default and the one-line help that `kvcomp stacks` prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Stage:
    """Base of every stage."""

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    @property
    def page_multiple(self) -> int:
        """The page size must be a multiple of this many tokens; 1 when the stage does not care."""
        return 1

    @property
    def default_window(self) -> tuple[int, int]:
        """(sinks, recent) that the method publishes; used where the stack has no `window(...)` of its own."""
        return 0, 0

    @property
    def required_sinks(self) -> int:
        """Sinks without which the method is wrong; a smaller explicit `window(sinks=)` is refused."""
        return 0

    @property
    def prefill_chunk(self) -> int | None:
        """Tokens per chunk where the prompt must enter in chunks, each attending to the compressed cache.

        Such a prefill is the stack's own. None: the prompt enters at once, and may share a dense prefill.
        """
        return None

    @property
    def implied(self) -> tuple[str, ...]:
        """Arguments that follow from the others, and that `str(stack)` leaves out."""
        return ()

    def identity(self, argument: str) -> Any:
        """What an argument stands for in the stack's hash: its value, or the content of a file that it names."""
        return getattr(self, argument)

    def serves(self, model: Callable[[], Fingerprint]) -> None:
        """Raise a KvcompError where the stage was made for another model, which `model` tells only when asked."""

    def __post_init__(self) -> None:
        """Refuse what no argument may be. A subclass checks its own arguments and calls this."""
        for argument in (f.name for f in fields(self)):
            value = getattr(self, argument)
            if isinstance(value, int):
                self.check(-WHOLE <= value <= WHOLE, argument, f"a whole number within +-{WHOLE}")
            elif isinstance(value, str):
                self.check(is_plain(value) and bool(value.strip()), argument, "text, without control characters")

    def check(self, ok: bool, argument: str, accepted: str) -> None:
        """Raise a SpecError naming the argument, its value and what is accepted, unless `ok`."""
        if not ok:
            raise SpecError(f"{self.name}({argument}={quote(getattr(self, argument))}): {argument} must be {accepted}")

    def check_share(self, argument: str, least: float = LEAST_SHARE) -> None:
        """Raise a SpecError unless the argument is None or a share from `least` to 1."""
        value = getattr(self, argument)
        self.check(value is None or 0 < value <= 1, argument, "in (0, 1]")
        self.check(value is None or value >= least, argument, f"at least {least:g}: a smaller share is none at all")


@dataclass(frozen=True)
class PageShape:
    """What a codec is made for: one layer's pages. `heads` is the number of KV heads.

    centred: whether pages may have a centre, as those of caches lack that were saved before there were any.
    """

    page_size: int
    k_dim: int
    v_dim: int
    heads: int
    dtype: torch.dtype
    device: torch.device
    layer: int
    centred: bool = True


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
    def rotates(self) -> bool:
        """Whether pages have other coordinates than K and V: `read_output` is not the identity, or `read_query` changes
        queries."""
        return True

    @property
    def fields(self) -> tuple[Field, ...]:
        """Fields of a page; the layout of a layer is made from them once."""
        raise NotImplementedError

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        """Fields [M, *shape] of M pages; streams int64 [M]."""
        raise NotImplementedError

    def kernel_input(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor] | None:
        """Coordinates [M, P, Rk] and [M, P, Rv] from which kernels write, a segment of `kernel_sides` at a time, what
        `encode` gives; behind them each token's norm where a side has a gain. None: they cannot."""
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

    def inverse(self, keys: Tensor, values: Tensor, streams: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded K and V of M pages, whose streams are int64 [M], in original coordinates: [M, P, Dk], [M, P, Dv]."""
        return keys, values

    def kernel_sides(self) -> Sides | None:
        """How kernels can read K and V of a page; None: they cannot, and `decode` is used. The same objects every time,
        as long as pages are read the same way."""
        return None

    def constants(self) -> list[Tensor]:
        """Tensors that the layer holds besides pages."""
        return []

    def adapted(self) -> list[Tensor]:
        """Those of `constants` that were made for the streams at hand, and that a decode step loads."""
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

    def room(self, streams: int) -> None:
        """Have room for what so many streams adapt to; tensors stay where they are from then on, until `select`."""

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


@dataclass(frozen=True)
class Quantizer(Stage):
    """Decides the bytes of a page."""

    family: ClassVar[str] = "quantizer"

    @property
    def needs_queries(self) -> bool:
        """Whether `Codec.observe` has to be called."""
        return False

    def codec(self, shape: PageShape) -> Codec:
        raise NotImplementedError

    def adapted_bytes(self, shape: PageShape) -> int:
        """Bytes per stream of `Codec.adapted`, once the stream has pages."""
        return 0

    def shared_bytes(self, shape: PageShape) -> int:
        """Bytes that a layer holds for all of its `shape.heads` heads and rows, whatever the context."""
        return 0

    def fields(self, shape: PageShape) -> tuple[Field, ...]:
        """Fields of a page, which a plan needs before there is anything to load."""
        return self.codec(shape).fields


class ModelPart(Protocol):
    """What a policy may ask of the model's attention in its layer, beside queries, keys and values."""

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Vectors [..., n, Dk] turned by the rotary embedding of positions int64 [n]; negative ones turn back."""

    def output(self) -> Tensor:
        """W_o [Hq, Dv, M]: a head's part of the output projection, so that its output o adds o @ W_o[head]."""


@dataclass(frozen=True)
class Chunk:
    """Tokens that arrive together in rows without padding, as an eviction policy sees them.

    queries [b, Hq, n, Dk] (None where the engine cannot give them), keys [b, Hkv, n, Dk], values [b, Hkv, n, Dv], all
    post-RoPE; alive [b, Hkv, n] bool: what earlier policies of the stack kept. `past` tokens came before; of this
    chunk the first `sinks` and the last `recent` tokens are the exact window's and must be kept.
    model: None where no policy `needs_model`. chosen [b, Hkv, n] bool: what `Policy.choose` gave, None if not asked.
    scored [b, Hkv, n]: scores that an engine made of parts of the queries, and that stand for the policy's own; None
    where all queries are here. before: how many of the `past` tokens belong to the same prompt, which comes in chunks.
    """

    queries: Tensor | None
    keys: Tensor
    values: Tensor
    alive: Tensor
    past: int
    sinks: int
    recent: int
    scale: float
    layer: int
    layers: int
    model: ModelPart | None = None
    chosen: Tensor | None = None
    scored: Tensor | None = None
    before: int = 0


class Held(NamedTuple):
    """What S = B x `heads` streams hold, as a policy sees it that lets pages go.

    tokens [S]: all that each holds, of which the first `sinks` stay. pages [S]: how many full pages of `page_size` lie
    behind them, oldest first, before the exact window. attention [S, n] float32: how much of a query's attention each
    page received on average, since it was written and over the query heads of its KV head; queries [S, n] float32: the
    number of these queries. Both None unless the policy `watches`, or `trims` a prompt that comes in chunks. before
    [S]: how many of the tokens were held before that prompt, and stay; None: the budget is that of all. layer, layers:
    as in `Chunk`.
    """

    tokens: Tensor
    pages: Tensor
    page_size: int
    sinks: int
    heads: int
    attention: Tensor | None
    queries: Tensor | None
    before: Tensor | None = None
    layer: int = 0
    layers: int = 1


@dataclass(frozen=True)
class Policy(Stage):
    """Decides which tokens enter pages, and which pages leave."""

    family: ClassVar[str] = "policy"
    needs_queries: ClassVar[bool] = False

    @property
    def reconstructs(self) -> int | None:
        """How many tokens of the prompt the engine lets the model repeat at a time, to ask `choose` then; None: not."""
        return None

    @property
    def needs_model(self) -> bool:
        """Whether `select` asks for `Chunk.model`."""
        return False

    def gathers(self, sinks: int, recent: int) -> int:
        """From how many tokens of a prompt `select` chooses at least, after its first chunk: an engine that gets
        smaller chunks keeps them in full precision until there are as many, or the prompt ends. 0: from any chunk."""
        return 0

    def choose(self, received: Sequence[Tensor], sinks: int, recent: int) -> list[Tensor]:
        """bool [1, Hkv, n] of each layer: the tokens of a row's prompt to keep, where the policy `reconstructs`.

        received [1, Hkv, n] of each layer: the most attention that a token got from any query while the model repeated
        the prompt. The engine asks once, between the prefill and `select`, whose `Chunk.chosen` then holds the answer.
        """
        raise NotImplementedError

    def select(self, chunk: Chunk) -> Tensor:
        """bool [b, Hkv, n]: the tokens of a chunk to keep, a subset of `chunk.alive`."""
        raise NotImplementedError

    def kept(self, tokens: int, sinks: int, recent: int, layer: int, layers: int) -> int:
        """How many of `tokens` prefilled tokens a stream of one of `layers` layers keeps, on average over its heads.

        What a plan and `effective_bits` are computed from.
        """
        raise NotImplementedError

    @property
    def watches(self) -> bool:
        """Whether `expired` needs the attention that pages receive."""
        return False

    @property
    def trims(self) -> bool:
        """Whether `expired` is asked after each chunk of a prompt but the first, too, whatever happens later."""
        return False

    @property
    def expires(self) -> bool:
        """Whether `expired` may name any pages."""
        return type(self).expired is not Policy.expired

    def expired(self, held: Held) -> Tensor | None:
        """bool [S, n]: the pages to free (None: none); n as long as the longest stream."""
        return None

    @property
    def same_tokens(self) -> tuple[str, ...]:
        """Of "heads" (of a row, in a layer) and "layers" those that keep the same tokens: their pages line up."""
        return ()


class Summaries(NamedTuple):
    """What a selector chooses from: summary fields [S, n, ...] of pages of `page_size` tokens.

    Of a stream's n pages the first counts [S] exist. Each row has `heads` KV heads: stream = row * heads + head.
    by_tokens: single tokens are read.
    """

    fields: Mapping[str, Tensor]
    counts: Tensor
    heads: int
    page_size: int
    by_tokens: bool = False

    @property
    def pages(self) -> int:
        """n"""
        fields = self.fields
        return fields.ids.shape[1] if isinstance(fields, Summary) else next(iter(fields.values())).shape[1]


class Choice(NamedTuple):
    """What a step reads: positions int64 [S, k], valid ones first and ascending, and how many are `valid` [S].

    Positions of pages in each stream's list, or of tokens in those pages.
    """

    positions: Tensor
    valid: Tensor


class Index:
    """One layer's selector, as `Codec` is one layer's quantizer. A stream is row * heads + head.

    What is not overridden here is a selector that knows nothing but the summaries of pages.
    """

    def __init__(self, selector: Selector) -> None:
        self.selector = selector

    def observe(self, streams: Tensor, queries: Tensor) -> None:
        """As `Codec.observe`, where the selector `needs_queries`."""

    def fit(self, streams: Tensor, keys: Tensor) -> None:
        """See keys [s, n, Dk] of `streams`, as `Codec.fit`."""

    def summarize(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        """Summary fields [M, ...] of M pages, from their keys [M, P, Dk] and values [M, P, Dv] before quantization; the
        stream of each is int64 [M]."""
        return self.selector.summarize(keys, values)

    def choose(self, queries: Tensor, scale: float, held: Summaries) -> Choice:
        """What each stream reads, as `Selector.select`."""
        return self.selector.select(queries, scale, held)

    def rest(
        self, queries: Tensor, scale: float, held: Summaries, choice: Choice, softcap: float | None
    ) -> Part | None:
        """Attention of queries [S, G, Dk] over what stands for all that was not chosen; None: nothing does."""
        return None

    def constants(self) -> list[Tensor]:
        """Tensors that the layer holds besides summaries."""
        return []

    def adapted(self) -> list[Tensor]:
        """Those of `constants` that a decode step loads."""
        return []

    def select(self, streams: Tensor) -> None:
        """Keep, repeat and order streams (beams): int64 [S']."""

    def fork(self) -> Index:
        """An index that goes on by itself from here, as `Codec.fork`."""
        return copy(self)

    def state(self) -> dict[str, Tensor]:
        """As `Codec.state`."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """As `Codec.restore`."""

    def lacks(self, paged: Tensor) -> str | None:
        """As `Codec.lacks`."""
        return None


@dataclass(frozen=True)
class Selector(Stage):
    """Decides which pages, or tokens, a decode query reads."""

    family: ClassVar[str] = "selector"
    by_tokens: ClassVar[bool] = False  # chooses single tokens, where the fields of pages allow to read them

    @property
    def needs_queries(self) -> bool:
        """Whether `Index.observe` has to be called."""
        return False

    def index(self, shape: PageShape) -> Index:
        """What one layer needs."""
        return Index(self)

    def index_bytes(self, shape: PageShape) -> tuple[int, int]:
        """Bytes per stream of `Index.constants` and of `Index.adapted`, once the stream has pages."""
        return 0, 0

    def active(self, layer: int) -> bool:
        """Whether that layer reads selectively; an inactive layer stores no summaries."""
        return True

    @property
    def share(self) -> int:
        """How many active layers in a row read the pages that the first of them chooses; only that has summaries."""
        return 1

    @property
    def same_pages(self) -> dict[str, str]:
        """Of "heads" and "layers" those that read the same pages, which must hold the same tokens, and the argument
        that says so."""
        return {}

    def summary_fields(self, shape: PageShape) -> tuple[Field, ...]:
        raise NotImplementedError

    def summarize(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Summary fields [M, ...] of M pages from their keys [M, P, Dk] (post-RoPE) and values [M, P, Dv] before
        quantization; for selectors whose `index` needs no more than that."""
        raise NotImplementedError

    def select(self, queries: Tensor, scale: float, held: Summaries) -> Choice:
        """What queries [S, G, Dk] of each stream read: pages, or, `held.by_tokens`, as many tokens as fill pages."""
        raise NotImplementedError

    def reads(self, pages: int, page_size: int) -> int:
        """How many of `pages` pages a step reads, or as many tokens, or the most; what a plan is computed from."""
        raise NotImplementedError
