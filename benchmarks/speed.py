"""Decode speed: attention of one layer alone, and whole decode steps of a model, every stack beside dense peers.

What is compared runs in turns, a step each, so that a busy machine slows all of them alike; figures are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcomp.cache.layer import LayerStore
from kvcomp.errors import KvcompError
from kvcomp.kernels import dispatch
from kvcomp.stages.plan import held_by_stream, read_by_stream
from kvcomp.stages.stack import Stack

from .peers import HALF_TOLERANCE, PEERS, TOLERANCE, Geometry, ready

ATTENTION, MODEL = "attention", "model"
SDPA, DYNAMIC = "sdpa", "DynamicCache + sdpa"
QUANTO = "HF QuantizedCache, quanto 4 bit"
WARM = 3  # steps of each that are not counted
COPY = 1 << 28  # bytes of the tensor whose copy shows the bandwidth
FIRST, PIECE = 1 << 11, 1 << 15  # tokens that are written first, then at a time, where no policy has to see all at once


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a step, and of its quartiles; bytes of the cache that it reads (0: not known).

    held: bytes of that cache; plan_read, plan_held: what `kvcomp plan` counts for them; 0: not known, as of models.
    """

    what: str
    label: str
    context: int
    batch: int
    ms: float
    low: float
    high: float
    read: int
    ratio: float  # to the first of the same context and batch: how many times faster
    held: int = 0
    plan_read: int = 0
    plan_held: int = 0

    @property
    def gbps(self) -> float:
        """Bytes of the cache that a second reads, in GB."""
        return self.read / self.ms / 1e6


def bandwidth(device: torch.device) -> float:
    """GB/s that a copy of a large tensor reads and writes."""
    source = torch.zeros(COPY // 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        start = _now(device)
        target.copy_(source)
        seconds.append(_now(device) - start)
    return 2 * COPY / statistics.median(seconds) / 1e9


def attention(
    geometry: Geometry,
    stacks: Sequence[str],
    context: int,
    batch: int,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
    layer: int,
    tell: Callable[[str], None] = lambda _: None,
    tick: Callable[[int, int], None] = lambda *_: None,
) -> list[Timing]:
    """One decode query of each row over random K and V of one layer; each stack is checked against the reference.

    tell: is called with a line about peers and stacks that are not timed, and why: one whose kernel fails, or does not
    agree with the reference, leaves the others as they are.
    tick: is called after each turn with the turns done and their total.
    """
    torch.manual_seed(0)
    shape = (batch, geometry.heads, context)
    k = _drawn(*shape, geometry.k_dim, dtype=dtype, device=device)
    v = k[..., : geometry.v_dim] if geometry.latent else _drawn(*shape, geometry.v_dim, dtype=dtype, device=device)
    query = torch.randn(batch, geometry.query_heads, 1, geometry.k_dim, dtype=dtype, device=device)
    scale = geometry.k_dim**-0.5

    def dense() -> Tensor:
        if geometry.latent:  # one head of as many queries
            return F.scaled_dot_product_attention(query.transpose(1, 2), k, v).transpose(1, 2)
        return F.scaled_dot_product_attention(query, k, v, enable_gqa=True)

    calls: dict[str, Callable[[], Any]] = {SDPA: dense}
    whole = geometry.channels * batch * context * dtype.itemsize
    read, known = {SDPA: whole}, {SDPA: (whole, whole, whole)}
    absent: dict[str, list[str]] = {}
    for peer in PEERS:
        call = peer.obstacle(geometry, dtype, device) or ready(peer, query, k, v, dense())
        if isinstance(call, str):
            absent.setdefault(call, []).append(peer.label)
        else:
            calls[peer.label], read[peer.label] = call, (k.numel() + v.numel()) * peer.bytes_per_number
    for why, labels in absent.items():
        tell(f"not timed: {', '.join(labels)}: {why}")
    for spec in stacks:
        stack = Stack.parse(spec)
        if stack.latent is not None:
            why = f"{stack.latent.name} has maps of a model, and K and V are of none here: leave --attention out"
            tell(f"not timed: {stack}: {why}")
            continue
        store = LayerStore(replace(stack.plan(layer, layer + 1), latent=geometry.latent))
        store.start(k, v)
        ends = [context] if store.plan.policies else [*range(FIRST, context, PIECE), context]
        for at, end in zip([0, *ends], ends, strict=False):
            n, seen = end - at, None
            if store.plan.needs_queries and at == 0:  # what adapts to queries does so with the first pages
                seen = query.expand(-1, -1, n, -1) + torch.randn(1, 1, n, 1, dtype=dtype, device=device)
            store.write(k[:, :, at:end], v[:, :, at:end], None, seen, scale)
        call = _checked(store, query, scale)
        if isinstance(call, str):
            tell(f"not timed: {stack}: {call}")
            continue
        calls[str(stack)] = call
        read[str(stack)] = sum(store.read.values())
        planned = [f(store.plan, *geometry.cached, context, dtype) for f in (read_by_stream, held_by_stream)]
        streams = batch * geometry.heads
        known[str(stack)] = sum(store.held(set()).values()), streams * planned[0], streams * planned[1]
    return list(_timed(ATTENTION, calls, read, context, batch, steps, device, tick, known))


def _drawn(rows: int, heads: int, n: int, dim: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers about a mean of each channel: those about 0 would average to next to nothing over many tokens."""
    x = torch.randn(rows, heads, n, dim, dtype=dtype, device=device)
    return x.add_(torch.randn(1, heads, 1, dim, dtype=dtype, device=device))


def _checked(store: LayerStore, query: Tensor, scale: float) -> Callable[[], Any] | str:
    """A step of the store, once it agrees with the reference; else why there is none."""
    try:
        store.attend(query, scale)  # the next may be by a kernel that plans for what is read again
        fast = store.attend(query, scale).out
    except KvcompError:
        raise
    except Exception as failure:  # what it compiles, or the memory that it takes, may be missing
        return f"it failed: {str(failure) or type(failure).__name__}"
    with dispatch.reference_only():
        slow = store.attend(query, scale).out
    error = float((fast - slow).norm() / slow.norm())
    most = TOLERANCE if query.dtype == torch.float32 else HALF_TOLERANCE
    if not error < most:
        return f"its kernel is off by {error:.2g} of the reference's norm, and {most:.2g} is what rounding explains"
    return lambda: store.attend(query, scale)


@torch.inference_mode()
def model(
    network: Any,
    tokenizer: Any,
    stacks: Sequence[str],
    context: int,
    batch: int,
    steps: int,
    peers: Sequence[str],
    tick: Callable[[int, int], None] = lambda *_: None,
) -> list[Timing]:
    """Whole decode steps of a model after a prompt of `context` tokens of text, in `batch` equal rows.

    tick: is called after each turn with the turns done and their total.

    Raises:
        KvcompError: the packaged text is shorter, or the model's context is.
    """
    from transformers import DynamicCache

    from kvcomp import CompressedCache
    from kvcomp.integrations.huggingface import prefill
    from kvcomp.integrations.huggingface.forward import with_cache

    text = next(f for f in files("kvcomp.benchmarks").joinpath("data").iterdir() if f.name.endswith(".txt")).read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :context]
    if ids.shape[1] < context:
        raise KvcompError(f"context: {context} is more than the {ids.shape[1]} tokens of the packaged text")
    ids = ids.expand(batch, -1).to(network.device)
    rows: list[Any] = [DynamicCache(config=network.config)]
    network(ids, **with_cache(network, rows[0]), logits_to_keep=1)
    if QUANTO in peers:
        rows.append(_quanto(network, rows[0]))
    labels = [DYNAMIC, *peers]
    caches = [CompressedCache(stack, network) for stack in stacks]
    prefill(network, ids, caches)
    token = ids[:, -1:]
    calls: dict[str, Callable[[], Any]] = {}
    read = dict.fromkeys(labels, 0)
    for label, cache in zip([*labels, *(str(c.stack) for c in caches)], [*rows, *caches], strict=True):
        if cache in caches:
            calls[label] = partial(network, token, **with_cache(network, cache), logits_to_keep=1)
            calls[label]()
            read[label] = cache.traffic().read
        else:
            calls[label] = partial(_plain, network, token, with_cache(network, cache))
    return list(_timed(MODEL, calls, read, context, batch, steps, network.device, tick))


def _plain(network: Any, token: Tensor, cache: dict[str, Any]) -> None:
    """A step of a model as the library has it, without kvcomp's attention in its way."""
    with _unhooked(network):
        network(token, **cache, logits_to_keep=1)


@contextmanager
def _unhooked(network: Any) -> Iterator[None]:
    from kvcomp.integrations.huggingface.hook import base_name

    config = network.config.get_text_config(decoder=True)
    name = config._attn_implementation
    config._attn_implementation = base_name(name or "sdpa") or name
    try:
        yield
    finally:
        config._attn_implementation = name


def peers() -> list[str]:
    """Other caches that are installed."""
    return [QUANTO] if find_spec("optimum") and find_spec("optimum.quanto") else []


def _quanto(network: Any, dense: Any) -> Any:
    """transformers' own cache of 4 bits, filled with what the dense one holds."""
    from transformers import QuantizedCache

    cache = QuantizedCache("quanto", network.config, nbits=4)
    for i, layer in enumerate(dense.layers):
        cache.update(layer.keys.clone(), layer.values.clone(), i)
    return cache


def _timed(
    what: str,
    calls: dict[str, Callable[[], Any]],
    read: dict[str, int],
    context: int,
    batch: int,
    steps: int,
    device: torch.device,
    tick: Callable[[int, int], None],
    known: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Iterator[Timing]:
    """Run all in turns, and compare them with the first. known: bytes held, planned to be read and to be held."""
    taken: dict[str, list[float]] = {label: [] for label in calls}
    for step in range(WARM + steps):
        for label, call in calls.items():
            start = _now(device)
            call()
            if step >= WARM:
                taken[label].append(1e3 * (_now(device) - start))
            else:
                _now(device)
        tick(step + 1, WARM + steps)
    first = statistics.median(next(iter(taken.values())))
    for label, times in taken.items():
        low, median, high = statistics.quantiles(times, n=4)
        yield Timing(what, label, context, batch, median, low, high, read[label], first / median, *known.get(label, ()))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
