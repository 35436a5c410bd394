"""Reading transformers configs: of models whose layers differ (Gemma 4), too, and of those that are no decoder."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from kvcomp.architecture import LayerKind
from kvcomp.errors import KvcompError, UnsupportedError

# By transformers' layer types; all others keep states of their own.
KINDS = {
    "full_attention": LayerKind.FULL,
    "indexed_attention": LayerKind.INDEXED,
    "minimax_m3_sparse": LayerKind.INDEXED,
    "sliding_attention": LayerKind.SLIDING,
    "chunked_attention": LayerKind.CHUNKED,
    "dummy": LayerKind.SHARED,
    "cross_attention": LayerKind.CROSS,
}
OF_LATENTS = {"full_attention": LayerKind.LATENT, "sliding_attention": LayerKind.CHUNKED}


def decoder_config(outer: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text decoder: the config itself, or its part for text.

    Raises:
        UnsupportedError: an encoder-decoder.
        KvcompError: a config that describes no stack of decoder layers, such as an image encoder's or a codec's.
    """
    if outer.is_encoder_decoder:
        raise UnsupportedError(
            f"{outer.model_type} is an encoder-decoder, which CompressedCache does not serve: use a decoder model"
        )
    try:
        config = outer.get_text_config(decoder=True)
    except ValueError as error:  # more than one
        raise KvcompError(
            f"the config of {outer.model_type} names several text models: pass the config of the one that decodes"
        ) from error
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise KvcompError(
            f"the config of {outer.model_type} describes no text decoder (num_hidden_layers={layers!r}): pass a "
            "decoder model or its config"
        )
    return config


def layer_fields(config: PreTrainedConfig, name: str, default: Any = None) -> list[Any]:
    """The values of a field, one per layer."""
    return [getattr(own, name, default) for own in config.per_layer_config]


def field(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """The value of a field of a config; where its layers differ in it, the list of their values.

    Read as an attribute, such a field raises transformers' AmbiguousGlobalPerLayerAttributeError, which is no
    AttributeError, so that `getattr` has no default for it.
    """
    mapped = (config.attribute_map or {}).get(name, name)
    if mapped in (getattr(config, "per_layer_attributes", None) or ()):
        return layer_fields(config, name, default)
    return getattr(config, name, default)


def max_positions(config: PreTrainedConfig) -> int | None:
    """The tokens that the model has positions for; None where its config sets no limit."""
    said = field(config, "max_position_embeddings")
    limits = [n for n in (said if isinstance(said, list) else [said]) if n is not None]
    return min(limits, default=None)


def cache_layers(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """Per layer, what it caches (transformers' layer type) and the options of transformers' own cache layer.

    Cross-attention layers, which read an image instead of the text, are of the kind "cross_attention".

    Raises:
        UnsupportedError: a layer type that this version of transformers has no cache layer for.
    """
    try:
        kinds, options = get_layer_types_and_kwargs(config)
    except ValueError as error:
        raise UnsupportedError(f"the layers of {config.model_type} are not known from its config: {error}") from error
    crossing = field(config, "cross_attention_layers") or ()
    kinds = ["cross_attention" if i in crossing else kind for i, kind in enumerate(kinds)]
    for i, kind in enumerate(kinds):
        if kind != "cross_attention" and kind not in DYNAMIC_LAYER_TYPE_MAPPING:
            _import_modeling(config)  # its cache layers register themselves there
            if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
                raise UnsupportedError(
                    f"layer {i} of {config.model_type} is {kind!r}, for which transformers has no cache layer: use the "
                    "model's own cache"
                )
    return kinds, options


def layer_kinds(config: PreTrainedConfig) -> list[LayerKind]:
    """What each layer is.

    Raises:
        UnsupportedError: a layer type that this version of transformers has no cache layer for.
    """
    latent = layer_fields(config, "kv_lora_rank")
    return [
        (OF_LATENTS if rank else KINDS).get(kind) or KINDS.get(kind, LayerKind.RECURRENT)
        for kind, rank in zip(cache_layers(config)[0], latent, strict=True)
    ]


def library_layer(kind: str, options: dict[str, Any]) -> Any:
    """Transformers' own cache layer for a kind of `cache_layers`."""
    return DYNAMIC_LAYER_TYPE_MAPPING["full_attention" if kind == "cross_attention" else kind](**options)


def _import_modeling(config: PreTrainedConfig) -> None:
    module = type(config).__module__
    with suppress(ImportError):
        import_module(module.replace("configuration_", "modeling_"))
