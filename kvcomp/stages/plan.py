"""What a layer will do and hold, known before any run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from kvcomp.geometry import Geometry
from kvcomp.layout import Field, PageLayout

from .joint import LatentStage
from .latent import make_codec, page_fields, stored
from .one_sided import filled
from .policy import Policy
from .quantizer import Codec, PageShape, Quantizer
from .selector import Selector

COUNTER = torch.int64
TABLE_ENTRY = torch.int32
EXACT_GROUP = 32  # channels that share a scale in an exact buffer of 8 bits
RECEIVED = 2 * torch.float32.itemsize  # of a page whose attention a policy watches


@dataclass(frozen=True)
class LayerPlan:
    """The stages of one layer.

    leader: the layer whose choice of pages this one reads. latent: whether it caches latents, see `stages.latent`.
    sliding: how many tokens a query sees, its own among them, where the layer has a sliding window. chosen_tokens: how
    many of all tokens the model's own indexer chooses, where that is known; for predictions alone. joint: what makes
    the latents of K and V, where the model caches these; None: the model itself, if it has any.
    exact_bits: of the numbers of sinks and window, 16 or 8; None: as many as the model's dtype has.
    """

    quantizer: Quantizer
    policies: tuple[Policy, ...]
    selector: Selector | None
    sinks: int
    recent: int
    page_size: int
    layer: int
    layers: int
    leader: int | None = None
    latent: bool = False
    sliding: int | None = None
    exact_bits: int | None = None
    chosen_tokens: int | None = None
    joint: LatentStage | None = None

    @cached_property
    def needs_queries(self) -> bool:
        """Whether a stage asks for queries of the prompt."""
        stages = (self.quantizer, self.chooser, *self.policies)
        return any(stage.needs_queries for stage in stages if stage is not None)

    def within(self, tokens: int) -> LayerPlan:
        """This plan for streams of at most so many tokens: a window of more than all of them needs no more memory."""
        return replace(self, sinks=min(self.sinks, tokens), recent=min(self.recent, tokens))

    def quantizer_alone(self) -> LayerPlan:
        """This plan for a layer of which the other stages know nothing, such as one with an indexer of its own."""
        return replace(self, policies=(), selector=None, leader=None, joint=None, latent=False)

    @cached_property
    def needs_model(self) -> bool:
        """Whether a policy asks for `Chunk.model`."""
        return any(policy.needs_model for policy in self.policies)

    @cached_property
    def reconstructs(self) -> bool:
        """Whether a policy asks that the model repeat the prompt."""
        return any(policy.reconstructs is not None for policy in self.policies)

    @cached_property
    def watched(self) -> bool:
        """Whether some policy needs the attention that pages receive."""
        return any(policy.watches for policy in self.policies)

    @cached_property
    def trims(self) -> bool:
        """Whether pages of a prompt that comes in chunks may leave before its end."""
        return any(policy.trims for policy in self.policies)

    @cached_property
    def gathers(self) -> int:
        """From how many tokens of a prompt the policies choose at least."""
        return max((policy.gathers(self.sinks, self.recent) for policy in self.policies), default=0)

    @cached_property
    def chooser(self) -> Selector | None:
        """The selector, where this layer chooses for itself: only then its pages have summaries."""
        return self.selector if self.leader is None else None

    @cached_property
    def geometry(self) -> Geometry:
        """Where tokens lie: sinks, window and pages, by counts alone."""
        return Geometry(self.page_size, self.sinks, self.recent)

    @cached_property
    def slots(self) -> int:
        """Tokens that the exact buffer of a stream can hold."""
        return self.geometry.slots

    def room(self, tokens: int) -> int:
        """Slots that a stream's exact buffer has once it held `tokens` tokens: a power of two until it is whole."""
        return min(self.slots, max(16, 1 << (tokens - 1).bit_length())) if tokens else 0

    def pages_of(self, tokens: int) -> int:
        """Full pages of a stream that keeps `tokens` tokens after a prefill."""
        return self.geometry.pages(tokens)

    def stored(self, tokens: int) -> tuple[int, int]:
        """(pages, tokens in the exact buffer) of a stream after prefilling `tokens` tokens."""
        # every policy counts from the prompt, not from what the one before left: the strictest decides
        given = (tokens, self.sinks, self.recent, self.layer, self.layers)
        kept = min([tokens, *(policy.kept(*given) for policy in self.policies)])
        left = 0 if self.sliding is None else max(tokens - self.sliding + 1, 0) // self.page_size
        return self.geometry.pages(kept) - left, self.geometry.exact(kept)

    def chosen(self, pages: int) -> int:
        """How many of a stream's pages a decode query reads, or the most where the selector's rule gives no number."""
        return pages if self.selector is None else self.selector.reads(pages, self.page_size)

    def by_tokens(self, layout: PageLayout) -> bool:
        """Whether decode queries read single tokens. Attention that a policy watches is that of pages, and so is that
        over values which are less a centre, as those of latents may be."""
        whole = self.watched or not layout.tokenwise or (self.latent and bool(layout.centres))
        return self.selector is not None and self.selector.by_tokens and not whole

    def attended(self, tokens: int) -> int:
        """Tokens that the query of a decode step after prefilling `tokens` tokens attends to, its own included."""
        if self.chosen_tokens is not None:
            return min(self.chosen_tokens, tokens + 1)
        pages, exact = self.stored(tokens)
        seen = self.chosen(pages) * self.page_size + exact + 1
        return seen if self.sliding is None else min(tokens + 1, self.sliding)

    def shape(
        self,
        k_dim: int,
        v_dim: int,
        heads: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        centred: bool | None = None,
    ) -> PageShape:
        """Of pages of keys [k_dim] and values [v_dim]. centred: as of `PageShape`; None: not where the layer is latent,
        whose values no kernel centres."""
        device = torch.device("cpu") if device is None else device
        centred = not self.latent if centred is None else centred
        kept = None if self.joint is None else self.joint.kept(v_dim)
        return PageShape(self.page_size, k_dim, v_dim, heads, dtype, device, self.layer, centred, self.latent, kept)

    def streams(self, heads: int, k_dim: int, v_dim: int) -> tuple[int, int, int]:
        """KV heads, and channels of keys and values (of latents and rotary keys), of what is held where a model caches
        so many."""
        return (heads, k_dim, v_dim) if self.joint is None else (1, heads * (k_dim + v_dim), 0)

    def build(self, shape: PageShape) -> tuple[Codec, PageLayout]:
        """The layer's codec, and the layout of its pages."""
        codec = make_codec(self.quantizer, shape)
        return codec, self._layout(codec.fields, shape)

    def layout(self, shape: PageShape) -> PageLayout:
        """The layout that `build` gives, without a codec: nothing has to be loaded."""
        return self._layout(page_fields(self.quantizer, shape), shape)

    def _layout(self, fields: tuple[Field, ...], shape: PageShape) -> PageLayout:
        summary = self.chooser.summary_fields(shape) if self.chooser is not None else ()
        return page_layout(self.page_size, fields + summary)


@lru_cache(maxsize=256)
def page_layout(page_size: int, fields: tuple[Field, ...]) -> PageLayout:
    """The same object for all layers whose pages are alike: offsets, and what kernels know of it, are found once."""
    return PageLayout(page_size, fields)


def exact_dtype(bits: int | None, dtype: torch.dtype) -> torch.dtype:
    """Of the rows in which sinks and window of a model's `dtype` are stored, as `LayerPlan.exact_bits` says."""
    if bits == 8:
        return torch.int8
    return torch.float16 if bits == 16 and dtype.itemsize > 2 else dtype


def exact_width(bits: int | None, dim: int) -> int:
    """Numbers of such a row of `dim` channels: in 8 bits the scales of groups follow, of two bytes each."""
    return dim + 2 * -(-dim // EXACT_GROUP) if bits == 8 else dim


def _exact_bytes(plan: LayerPlan, k_dim: int, v_dim: int, dtype: torch.dtype) -> int:
    """Of a token in sinks or window."""
    bits = plan.exact_bits
    dims = (k_dim + v_dim,) if plan.latent else (k_dim, v_dim)
    return sum(exact_width(bits, dim) for dim in dims) * exact_dtype(bits, dtype).itemsize


def held_parts(plan: LayerPlan, k_dim: int, v_dim: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that one stream of the layer holds after prefilling `tokens` tokens, by part as in `LayerStore.held`.

    k_dim, v_dim: channels of keys and values; where the layer is latent, of latents and rotary keys.

    Constants that streams share (a Hadamard matrix, a calibrated basis: `shared_bytes`) and the log of padding are left
    out.
    """
    layout, (adapted, _) = _layout(plan, k_dim, v_dim, dtype)
    pages, exact = plan.stored(tokens)
    slots = plan.room(exact)
    token = _exact_bytes(plan, k_dim, v_dim, dtype)
    counters = 2 if plan.sliding is None else 3
    sinks = min(plan.sinks, slots) * token
    mean = (k_dim + v_dim * plan.latent) * dtype.itemsize if plan.exact_bits == 8 else 0
    return _present(
        pages=pages * layout.body_bytes,
        summaries=pages * layout.summary_bytes,
        sinks=sinks,
        window=slots * token - sinks,
        table=pages * (TABLE_ENTRY.itemsize + (RECEIVED if plan.watched else 0)) + counters * COUNTER.itemsize + mean,
        constants=adapted if pages else 0,
    )


def shared_bytes(plan: LayerPlan, k_dim: int, v_dim: int, heads: int, dtype: torch.dtype) -> int:
    """Bytes that the layer holds for all of its streams, whatever the context and the batch."""
    maps = 0 if plan.joint is None else plan.joint.map_bytes(k_dim)
    return plan.quantizer.shared_bytes(filled(stored(_shape(plan, k_dim, v_dim, heads, dtype)))) + maps


def read_parts(plan: LayerPlan, k_dim: int, v_dim: int, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of one stream that a decode step after prefilling `tokens` tokens loads, by part as in `LayerStore.read`.

    The step's own token is in the window by then. A step reads the stream's whole table, all its summaries where it
    selects, the pages chosen, and the exact buffer.
    """
    layout, (_, adapted) = _layout(plan, k_dim, v_dim, dtype)
    pages, exact = plan.stored(tokens)
    token = _exact_bytes(plan, k_dim, v_dim, dtype)
    if plan.chosen_tokens is not None and plan.chosen_tokens <= tokens:
        return _indexed_parts(plan, layout, pages, tokens, token) | _present(constants=adapted if pages else 0)
    sinks = min(plan.sinks, exact + 1)
    chosen, centres = plan.chosen(pages), 0
    if plan.by_tokens(layout):  # of each token, or of all pages that they may lie in
        centres = min(pages, chosen * plan.page_size) * layout.centre_bytes
    return _present(
        pages=chosen * layout.body_bytes + centres,
        summaries=pages * layout.summary_bytes,
        sinks=sinks * token,
        window=(exact + 1 - sinks) * token,
        table=pages * TABLE_ENTRY.itemsize,
        constants=adapted if pages else 0,
    )


def _indexed_parts(plan: LayerPlan, layout: PageLayout, pages: int, tokens: int, token: int) -> dict[str, int]:
    """Bytes of one stream that a step reads of the tokens that the model's own indexer chose: if it chooses them at
    random among those in pages and the others, of `token` bytes each."""
    chosen = plan.chosen_tokens or 0
    paged = round(chosen * pages * plan.page_size / (tokens + 1))
    if layout.tokenwise:
        read = paged * layout.token_bytes + min(pages, paged) * layout.centre_bytes
    else:  # pages that one of them lies in
        read = round(pages * (1 - (1 - paged / max(pages * plan.page_size, 1)) ** plan.page_size)) * layout.body_bytes
    return _present(pages=read, window=(chosen - paged) * token, table=paged * TABLE_ENTRY.itemsize)


def held_by_stream(plan: LayerPlan, k_dim: int, v_dim: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one stream of the layer holds after prefilling `tokens` tokens: the sum of `held_parts`."""
    return sum(held_parts(plan, k_dim, v_dim, tokens, dtype).values())


def read_by_stream(plan: LayerPlan, k_dim: int, v_dim: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one stream that a decode step after prefilling `tokens` tokens loads: the sum of `read_parts`."""
    return sum(read_parts(plan, k_dim, v_dim, tokens, dtype).values())


def _layout(plan: LayerPlan, k_dim: int, v_dim: int, dtype: torch.dtype) -> tuple[PageLayout, tuple[int, int]]:
    """A page's layout, and the bytes of constants made for a stream: those it holds, and those that a step reads."""
    shape = _shape(plan, k_dim, v_dim, 1, dtype)
    codec = plan.quantizer.adapted_bytes(filled(stored(shape)))
    held, read = (0, 0) if plan.chooser is None else plan.chooser.index_bytes(shape)
    return plan.layout(shape), (codec + held, codec + read)


def _shape(plan: LayerPlan, k_dim: int, v_dim: int, heads: int, dtype: torch.dtype) -> PageShape:
    """The shape of pages of tokens of which so many channels are cached."""
    return plan.shape(*((k_dim + v_dim, k_dim) if plan.latent else (k_dim, v_dim)), heads, dtype)


def _present(**parts: int) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}
