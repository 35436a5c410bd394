"""Calibration of a transformers model: it reads texts, and a method computes its tensors from what its layers saw."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcomp.architecture import without
from kvcomp.calibration.file import Calibration
from kvcomp.calibration.stage import Calibrated, Repeated, Seen
from kvcomp.calibration.statistics import Moments
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.files import readable
from kvcomp.stages.quantizer import Quantizer
from kvcomp.stages.registry import find, stages

from ..configs import cache_layers, decoder_config, layer_kinds, library_layer, max_positions
from .attention_module import AttentionModule, output_projection
from .fingerprint import fingerprint
from .forward import with_cache
from .handles import Call, HandleLayer
from .hook import hook
from .reconstruct import received

TOKENS, CONTEXT, SHORTEST = 20480, 2048, 16
REQUEST_TOKENS = 64  # positions that the request to repeat a context may take


class ReadingLayer(HandleLayer):
    """A layer that attends densely to one context, under the model's mask, and keeps nothing of it but what `seen`
    takes."""

    def __init__(self, seen: Seen, is_sliding: bool = False) -> None:
        super().__init__()
        self.seen, self.is_sliding, self.begun = seen, is_sliding, False
        self.output: Tensor | None = None  # as in Statistics

    def take(self, keys: Tensor, values: Tensor) -> None:
        self.chunk = keys, values

    def attention(self, call: Call) -> tuple[Tensor, Tensor | None]:
        keys, values = self.chunk
        result = call.dense(keys, values)
        if not self.begun:
            self.begun = True
            self.model = AttentionModule(call.module, call.query.shape[1], values.shape[3])
            self.output = output_cost(call.module, call.query.shape[1], keys.shape[1], values.shape[3])
        self.seen.add(call.query, keys, values)
        return result

    def dense(self, which: int) -> Tensor:
        raise UnsupportedError(
            "this model reads keys and values as tensors instead of through its attention function, so that its "
            "queries are not seen: it cannot be calibrated"
        )


def output_cost(module: torch.nn.Module, query_heads: int, heads: int, v_dim: int) -> Tensor | None:
    """B [H, Dv, Dv] float64: the sum of W_o' W_o over the query heads of a KV head, W_o the output projection's part.

    None where the attention module has no projection of that shape.
    """
    weight = output_projection(module, query_heads, v_dim)
    if weight is None:
        return None
    parts = rearrange(weight.double(), "(h g) v m -> h (g m) v", h=heads)
    return (parts.mT @ parts).cpu()


def calibrate(
    model: PreTrainedModel,
    tokenizer: Any,
    method: str,
    texts: Sequence[str | Path],
    tokens: int = TOKENS,
    context: int = CONTEXT,
    name: str | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
    fitting: Callable[[Collection[Any]], Iterable[Any]] = iter,
    **settings: Any,
) -> Calibration:
    """Run a model over texts and compute what a calibrated stage needs; `Calibration.save` writes it.

    Args:
        model: a decoder whose attention goes through transformers' attention interface, as for `CompressedCache`.
        tokenizer: the model's.
        method: a calibrated stage: oscar, svd, think, klt, dsa, kvzap, or one of another package.
        texts: files, each of which gives an equal share of the tokens, from its beginning.
        tokens: how many tokens to use in all; fewer where the texts have fewer.
        context: tokens that the model sees together.
        name: what the file is to call the model; by default what its config says.
        advance: called with the number of tokens of each context that is done.
        fitting: goes through the layers once all is read, as a progress bar does.
        settings: keyword-only arguments of the method's `calibrate`.

    Raises:
        KvcompError: no such method or setting, or a text that cannot be read or is too short.
        UnsupportedError: a model whose attention cannot be hooked.
    """
    stage = method_of(method)
    settings = settings_of(stage, settings)
    contexts = read_contexts(tokenizer, texts, tokens, context)
    windows = issubclass(stage, Quantizer)
    gathered = gather(model, contexts, advance, stage.seen, windows, stage.repeats, tokenizer)
    return Calibration(
        method=method,
        settings=settings,
        model=fingerprint(model, name),
        texts=tuple((Path(text).name, hashlib.sha256(Path(text).read_bytes()).hexdigest()) for text in texts),
        tokens=sum(map(len, contexts)),
        context=context,
        tensors={
            f"{layer}.{key}": tensor.float()
            for layer, seen in fitting(gathered.items())
            for key, tensor in stage.calibrate(seen, **settings).items()
        },
    )


def method_of(name: str) -> type[Calibrated]:
    """The calibrated stage of that name.

    Raises:
        KvcompError: there is none; the message names those that there are.
    """
    known = [known for known, stage in stages().items() if issubclass(stage, Calibrated)]
    if name not in known:
        raise KvcompError(f"method: {name!r} is not calibrated: choose one of {', '.join(known)}")
    found = find(name)
    assert issubclass(found, Calibrated)
    return found


def settings_of(stage: type[Calibrated], given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a method's `calibrate`, those given and the defaults of the others."""
    parameters = inspect.signature(stage.calibrate).parameters.values()
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in given:
        if name not in known:
            raise KvcompError(f"{stage.name} has no setting {name!r}: it has {', '.join(known) or 'none'}")
    return known | dict(given)


def read_contexts(tokenizer: Any, texts: Sequence[str | Path], tokens: int, context: int) -> list[list[int]]:
    """Token ids of contexts of `context` tokens, fewer at the end of a text's share; each begins as a prompt does.

    Raises:
        KvcompError: no text, one that cannot be read, or one of fewer than `context` tokens and of its share.
    """
    if not texts:
        raise KvcompError("text: give at least one file")
    if context < SHORTEST or tokens < context:
        raise KvcompError(
            f"context: {context}, tokens: {tokens}: a context needs at least {SHORTEST} tokens, and there must be as "
            "many tokens as one context has"
        )
    start = tokenizer("").input_ids[:1]  # what the tokenizer puts before every prompt
    contexts: list[list[int]] = []
    for i, text in enumerate(texts):
        share = tokens * (i + 1) // len(texts) - tokens * i // len(texts)
        ids = tokenizer(read_text(Path(text)), add_special_tokens=False).input_ids
        if len(ids) < min(share, context):
            raise KvcompError(
                f"text: {str(text)!r} has {len(ids)} tokens, less than a context of {context}: give a longer text, or "
                "a smaller --context"
            )
        step = context - len(start)
        for at in range(0, min(share, len(ids)), step):
            piece = start + ids[at : min(at + step, share)]
            if len(piece) > 1:
                contexts.append(piece)
    return contexts


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        KvcompError: it cannot be read, or is not UTF-8.
    """
    try:
        return readable(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise KvcompError(f"text: {str(path)!r}: {reason}.") from error


@torch.inference_mode()
def gather(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int]],
    advance: Callable[[int], None] = lambda tokens: None,
    seen: Callable[[], Seen] = Moments,
    windows: bool = False,
    repeats: int | None = None,
    tokenizer: Any = None,
) -> dict[int, Any]:
    """What `seen` makes of every full-attention layer, by its number, over contexts of token ids; windows: and of every
    layer with a sliding window.

    repeats: tokens of each context that the model repeats at a time, so that `seen` learns what they received; the
    tokenizer encodes the request. None: it does not.

    Raises:
        UnsupportedError: a model whose attention cannot be hooked, with layers that cannot be calibrated, such as
            latent ones (MLA), or without any that can.
    """
    config = decoder_config(model.config)
    kinds = layer_kinds(config)
    if (other := without(kinds, "calibrated")) is not None:
        raise UnsupportedError(f"{config.model_type} {other.traits.does}, which cannot be calibrated yet")
    limit = max_positions(config)
    longest = max(map(len, contexts))
    if limit is not None and longest > limit:
        raise KvcompError(f"context: {longest} is more than the {limit} positions of {config.model_type}")
    if limit is not None and repeats is not None and 2 * longest + REQUEST_TOKENS > limit:
        raise KvcompError(
            f"context: {longest}, which this method lets the model repeat, must leave as many of the {limit} positions "
            f"of {config.model_type} for that, and {REQUEST_TOKENS}: give a smaller context"
        )
    types, options = cache_layers(config)
    ours = {
        i: ReadingLayer(seen(), kind.traits.bounded)
        for i, kind in enumerate(kinds)
        if kind.traits.calibrated and (windows or not kind.traits.bounded)
    }
    if not ours:
        wanted = "full attention or a sliding window" if windows else "full attention"
        raise UnsupportedError(f"no layer of this {config.model_type} is {wanted}: nothing to calibrate")
    implementation = config._attn_implementation
    hook(config)
    try:
        for ids in contexts:
            layers: list[Any] = [
                ours[i] if i in ours else library_layer(kind, option)
                for i, (kind, option) in enumerate(zip(types, options, strict=True))
            ]
            prompt = torch.tensor([ids], device=model.device, dtype=torch.int64)
            model(input_ids=prompt, **with_cache(model, Cache(layers=layers)), use_cache=True, logits_to_keep=1)
            if repeats is not None:
                given = [layer.chunk if i in ours else layer for i, layer in enumerate(layers)]
                found = received(model, tokenizer, prompt, given, repeats)
                for layer, most in zip(ours.values(), found, strict=True):
                    cast(Repeated, layer.seen).repeated(most, layer.model)
            advance(len(ids))
    finally:
        config._attn_implementation = implementation
    return {i: layer.seen.result(layer.output) for i, layer in ours.items()}
