"""Routing a model's attention through kvcomp: one registered attention and mask function per base implementation."""

from __future__ import annotations

import sys
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from kvcomp.errors import UnsupportedError

from .forward import NAMES, refuse_misnamed
from .handles import Attention, Call, Handle
from .keywords import CHOICES, HARMLESS, SERVED, VARLEN, given, refuse
from .masks import mask_function

PREFIX, SUFFIX = "kvcomp_", " (until cache.detach())"  # transformers' errors quote the name, so it tells the way out
CACHES = frozenset(NAMES)
MASKED = ("sdpa", "eager")  # attention that sees what its mask shows, and nothing else decides


class BaseModule:
    """An attention module as its base implementation is to see it: the config names that implementation."""

    def __init__(self, thing: Any, base: str) -> None:
        self._thing, self._base = thing, base

    def __getattr__(self, name: str) -> Any:
        if name == "_attn_implementation":
            return self._base
        found = getattr(self._thing, name)
        return BaseModule(found, self._base) if name == "config" else found


def eager_attention(module: torch.nn.Module) -> Attention:
    """The eager attention function of the module's modeling file."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if found is not None:
            function: Attention = found
            return function
    raise UnsupportedError(
        f"{type(module).__name__}: its modeling file has no eager_attention_forward: load the model with "
        "attn_implementation='sdpa'"
    )


def _base_attention(base: str) -> Attention:
    def attend(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if base == "eager":
            return eager_attention(module)(module, *args, **kwargs)
        function: Attention = AttentionInterface._global_mapping[base]
        return function(module if base == "sdpa" else BaseModule(module, base), *args, **kwargs)

    return attend


def _attention_function(base: str) -> Attention:
    function, masked = _base_attention(base), base in MASKED
    known = HARMLESS | SERVED if masked else (HARMLESS | SERVED) - VARLEN

    def kvcomp_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not CACHES.isdisjoint(kwargs):
            refuse_misnamed(module, kwargs)
        if isinstance(key, Handle) and key.pairs(value):
            served = known | CHOICES if masked and key.layer.chooses else known
            if not kwargs.keys() <= served and (unknown := given(kwargs, served)):
                raise refuse(module, unknown)
            window = kwargs.get("sliding_window")
            if not masked and window is not None and key.length > window and not key.layer.is_sliding:
                raise UnsupportedError(
                    f"{type(module).__name__} passes sliding_window={window} to {base} attention in a layer of full "
                    f"attention that holds {key.length} tokens: load the model with attn_implementation='sdpa'"
                )
            latent = key.expansion(value)
            return key.layer.answer(Call(function, module, query, attention_mask, scaling, kwargs, base, latent))
        return plain(function, base, module, query, key, value, attention_mask, scaling, kwargs)

    return kvcomp_attention


def plain(
    attend: Attention,
    base: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    mask: Any,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention over keys and values that the model passes, by its own implementation: handles are decoded."""
    call = Call(attend, module, query, mask, scaling, kwargs, base)
    choices = {name: kwargs[name] for name in CHOICES & kwargs.keys() if kwargs[name] is not None}
    decodes = isinstance(key, Handle) or isinstance(value, Handle)
    unknown = given(kwargs, HARMLESS | SERVED | CHOICES) if base in MASKED or decodes else []
    if unknown or (choices and base not in MASKED):
        function = eager_attention(module) if base == "eager" else AttentionInterface._global_mapping[base]
        named = signature(function).parameters.keys()
        if unserved := [name for name in (*unknown, *(choices if base not in MASKED else ())) if name not in named]:
            raise refuse(module, unserved)
    key, value = (x.dense() if isinstance(x, Handle) else x for x in (key, value))
    if base in MASKED:
        call = call.under_choice(key.shape[2])
    return call.dense_behind(key, value)


def hooked_name(base: str) -> str:
    """The name under which our attention with that base is registered: no kernel of a hub, which has a slash."""
    return PREFIX + base.replace("/", "%2F") + SUFFIX


def base_name(name: str) -> str | None:
    """The implementation that a hooked config had; None for a name that is not ours."""
    ours = name.startswith(PREFIX) and name.endswith(SUFFIX)
    return name.removeprefix(PREFIX).removesuffix(SUFFIX).replace("%2F", "/") if ours else None


def hook(config: PreTrainedConfig) -> str:
    """Route the config's attention through kvcomp; returns the implementation it had."""
    current = config._attn_implementation or "sdpa"
    original = base_name(current) or current
    name = hooked_name(original)
    if name not in AttentionInterface._global_mapping:
        base = original.removeprefix("paged|")  # of continuous batching, whose cache is another one
        if base != "eager" and base not in AttentionInterface._global_mapping:
            raise UnsupportedError(
                f"attn_implementation={original!r} is not registered with transformers, so it cannot be hooked: load "
                "the model with it, or with attn_implementation='sdpa'"
            )
        AttentionInterface.register(name, _attention_function(base))
        # without a mask function of the same name transformers would drop the padding silently
        if base in AttentionMaskInterface._global_mapping:
            AttentionMaskInterface.register(name, mask_function(base))
    config._attn_implementation = name
    return original
