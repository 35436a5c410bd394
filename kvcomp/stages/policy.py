"""Eviction policies: which tokens enter pages, and which pages leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from .arguments import Alias, dropped_share
from .stage import Stage


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
    """State of S = B x `heads` streams, passed to policies that evict pages while decoding.

    tokens [S]: all that each holds, of which the first `sinks` stay. pages [S]: how many full pages of `page_size` lie
    after them, oldest first, before the exact window. attention [S, n] float32: how much of a query's attention each
    page received on average, since it was written and over the query heads of its KV head; queries [S, n] float32: the
    number of these queries. Both lie on the pages' device, to be copied only where pages leave, and are None unless the
    policy `watches`, or `trims` a prompt that comes in chunks. before [S]: how many of the tokens were held before that
    prompt, and stay; None: the budget is that of all. layer, layers: as in `Chunk`. keys: decodes the keys [S, n, P,
    Dk] of all pages, anything where a stream has fewer, for who asks only where pages leave.
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
    keys: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Policy(Stage):
    """Decides which tokens enter pages, and which pages leave."""

    family: ClassVar[str] = "policy"
    aliases: ClassVar[Mapping[str, str | Alias]] = {
        "compression_ratio": dropped_share("keep"),  # kvpress
        "max_capacity_prompt": "budget",  # the authors of SnapKV, as the next two
        "window_size": "window",
        "kernel_size": "kernel",
        "alpha_safeguard": "floor",
        "n_sink": "sinks",
    }
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
    def keeps_newest(self) -> int | None:
        """How many of the newest tokens stay, where all older ones but the sinks leave, by whole pages. None: `select`
        chooses among the tokens of a prompt."""
        return None

    @property
    def limit(self) -> int | None:
        """How many tokens a stream may hold while decoding, where pages leave that exceed them; None: any number."""
        return None

    @property
    def uniform(self) -> bool:
        """Whether every head of every layer keeps exactly `kept` tokens."""
        return False

    @property
    def voters(self) -> int | None:
        """How many of a prompt's last queries `select` looks at: it needs no others. None: at all of them."""
        return None if self.needs_queries else 0

    @property
    def averages(self) -> bool:
        """Whether `select` goes by means over the queries, so that an engine which cuts a prompt may add up its parts
        and pass them as `Chunk.scored`."""
        return False

    def scores(self, chunk: Chunk) -> Tensor:
        """[b, Hkv, n] float: how much each token of the chunk is worth, where the policy `averages`."""
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
