"""The shape of a model from its config alone, for `kvcomp plan`: no weight is loaded.

Parameters are counted on the library's own model, built on the meta device; so every architecture that transformers
knows is counted as it is, not as a formula imagines it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from kvcomp.architecture import LayerKind, LayerShape, Matrices, ModelShape
from kvcomp.errors import UnsupportedError
from kvcomp.integrations.configs import cache_layers, decoder_config, field, layer_kinds, max_positions
from kvcomp.text import quote

from ..loading import DEFAULT, Loading
from .models import ModelError, explained, locate

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
CHOSEN = ("num_experts_per_tok", "experts_per_token", "top_k_experts")


@cache
def builtin() -> dict[str, dict[str, Any]]:
    """Public configs that need no network: name -> {"hub": id, "config": the fields that matter}."""
    table: dict[str, dict[str, Any]] = json.loads(files(__package__).joinpath("models.json").read_text("utf-8"))
    return table


def model_shape(name: str, weight_bits: float | None = None, loading: Loading = DEFAULT) -> ModelShape:
    """The shape of a built-in model (by name or hub id), a local folder, a .gguf file or a hub model.

    weight_bits: bits per parameter of every matrix, instead of what the config says.
    loading: its revision of a hub model, and whether code of its own may run.

    Raises:
        ModelError: no such model.
        UnsupportedError: a model whose cache or weights cannot be told from its config.
    """
    for short, entry in builtin().items():
        builtin_one = name.lower() in (short, entry["hub"].lower()) and not os.path.exists(name)
        if builtin_one and loading.revision is None:
            fields = dict(entry["config"])
            return shape_of(AutoConfig.for_model(fields.pop("model_type"), **fields), entry["hub"], weight_bits)
    near = get_close_matches(name.lower(), builtin(), n=1, cutoff=0.8)
    if near and "/" not in name and not os.path.exists(name):
        raise ModelError(
            f"model: {quote(name)} is not built in: did you mean {near[0]!r}? For a model of the hub give owner/name."
        )
    source, options = locate(name, loading)
    try:
        with explained(name, source):
            config = AutoConfig.from_pretrained(str(source), **options)
    except ModelError as error:
        raise ModelError(f"{error} Known without a network: {', '.join(builtin())}.") from error
    return shape_of(config, Path(name).stem if os.path.exists(source) else name, weight_bits)


def shape_of(outer: PreTrainedConfig, name: str, weight_bits: float | None = None) -> ModelShape:
    """The shape of the decoder that a transformers config describes."""
    config = decoder_config(outer)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"{name}: its decoder cannot be built from the config alone: {reason}") from error
    quantization = getattr(outer, "quantization_config", None) or getattr(config, "quantization_config", None)
    dtype = _dtype(config, outer)
    bits = _Bits(name, dtype, quantization, weight_bits)
    groups = {"dense": Matrices(), "experts": Matrices(), "lookup": Matrices()}
    for group, key, parameter in _matrices(model):
        groups[group] += Matrices(parameter.numel(), parameter.numel() * bits(key, group) / 8)
    total, active = (_number(config, fields) for fields in (EXPERTS, CHOSEN))
    if groups["experts"].parameters and not (total and active):
        raise UnsupportedError(f"{name}: its config does not say how many of its experts a token uses")
    return ModelShape(
        name=name,
        layers=tuple(_layers(config, dtype, model, name)),
        **groups,
        total_experts=total if groups["experts"].parameters else 0,
        active_experts=active if groups["experts"].parameters else 0,
        dtype=str(dtype).removeprefix("torch."),
        itemsize=dtype.itemsize,
        positions=max_positions(config),
    )


def _number(config: PreTrainedConfig, fields: tuple[str, ...]) -> int:
    """The value of the first of these fields that the config sets, 0 without any.

    Raises:
        UnsupportedError: layers that differ in it.
    """
    for name in fields:
        said = field(config, name)
        values = {value for value in (said if isinstance(said, list) else [said]) if value}
        if len(values) > 1:
            raise UnsupportedError(f"{config.model_type}: its layers differ in {name}, which a plan does not know yet")
        if values:
            return int(values.pop())
    return 0


def _dtype(*configs: PreTrainedConfig) -> torch.dtype:
    """What the model is kept in, bfloat16 where no config says."""
    named = next((str(config.dtype) for config in configs if config.dtype), "bfloat16")
    dtype: torch.dtype = getattr(torch, named.removeprefix("torch."))
    return dtype


def _matrices(model: Any) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(group, name, parameter) of every matrix; tied ones once, as the output head that they also are."""
    head = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables -= {id(head.weight)} if head is not None else set()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith("bias"):
            continue
        group = "lookup" if id(parameter) in tables else "experts" if ".experts." in name else "dense"
        yield group, name, parameter


class _Bits:
    """Bits per parameter of a matrix, as its checkpoint stores it."""

    def __init__(self, model: str, dtype: torch.dtype, quantization: Any, given: float | None) -> None:
        own = quantization if isinstance(quantization, dict) else getattr(quantization, "__dict__", {})
        self.plain, self.given = 8 * dtype.itemsize, given
        self.method = str(getattr(own.get("quant_method"), "value", own.get("quant_method") or ""))
        self.block = prod(own.get("weight_block_size") or (0,))
        if self.method not in ("", "fp8", "mxfp4") and given is None:
            raise UnsupportedError(
                f"{model}: the size of {self.method!r} weights is not known here: give --weight-bits"
            )

    def __call__(self, name: str, group: str) -> float:
        if self.given is not None:
            return self.given
        if self.method == "mxfp4" and group == "experts":
            return 4 + 8 / 32  # an E8M0 scale for 32 elements
        if self.method == "fp8" and ".layers." in name and not name.endswith((".gate.weight", ".router.weight")):
            return 8 + (32 / self.block if self.block else 0)  # a float32 scale a block
        return self.plain


def _layers(config: PreTrainedConfig, dtype: torch.dtype, model: nn.Module, name: str) -> list[LayerShape]:
    """What each layer caches, and what its attention multiplies."""
    widths = {key: parameter.shape[0] for key, parameter in model.named_parameters() if key.endswith("k_proj.weight")}
    types, options = cache_layers(config)
    each = zip(layer_kinds(config), types, options, config.per_layer_config, strict=True)
    found: list[LayerShape] = []
    for i, (kind, of_type, option, own) in enumerate(each):
        if kind is LayerKind.SHARED:  # caches nothing: an MLP, or it reads another layer's cache
            source = _source(config, i)
            if source is None:
                found.append(LayerShape(kind=kind))
            else:
                given = found[source]
                lent_of = given.prefill_width, given.decode_width, given.window
                found.append(LayerShape(0, 0, 0, own.num_attention_heads, *lent_of, kind=kind, source=source))
        elif of_type == "linear_attention" and getattr(own, "linear_num_value_heads", None):
            found.append(LayerShape(state=_state_bytes(own, dtype.itemsize), kind=kind))
        elif kind in (LayerKind.LATENT, LayerKind.INDEXED) and getattr(own, "kv_lora_rank", None):
            rank, rotary = own.kv_lora_rank, own.qk_rope_head_dim if _of(config, "no_rope_layers", i) != 0 else 0
            expanded = own.qk_nope_head_dim + own.qk_rope_head_dim + own.v_head_dim
            lent = _source(config, i) if _of(config, "kv_sharing_modes", i) == "reuse_but_indexer" else None
            cached: tuple[int, int, int] = (1, rank, rotary) if lent is None else (0, 0, 0)
            heads = own.num_attention_heads
            more = {"kind": kind, "source": lent, "latent": True, **_indexer(kind, own, config, i)}
            found.append(LayerShape(*cached, heads, expanded, rank + rotary + rank, **more))
        elif kind in (LayerKind.FULL, LayerKind.SLIDING, LayerKind.CHUNKED, LayerKind.INDEXED):
            heads = own.num_attention_heads
            kv_heads = getattr(own, "num_key_value_heads", None) or heads
            dim = getattr(own, "head_dim", None) or own.hidden_size // heads
            width = next((w for key, w in widths.items() if f".layers.{i}." in key), kv_heads * dim)
            if width != kv_heads * dim:
                raise UnsupportedError(
                    f"{name}: layer {i} has keys of {width} channels, but its config says {kv_heads} heads of {dim}"
                )
            sizes, window = (kv_heads, dim, dim, heads, 2 * dim, 2 * dim), option.get("sliding_window")
            found.append(LayerShape(*sizes, window, kind=kind, **_indexer(kind, own, config, i)))
        else:
            raise UnsupportedError(f"{name}: layer {i} is {of_type!r}, whose cache a plan does not know yet")
    return found


def _source(config: PreTrainedConfig, layer: int) -> int | None:
    """The layer whose keys and values one reads that caches none; None: it does not attend."""
    modes = field(config, "kv_sharing_modes") or ()
    if not any(modes) or not str(modes[layer]).startswith("reuse"):
        return None
    sources = getattr(config, "kv_source_layers", None)
    if sources is not None:
        return int(sources[layer])
    kinds = config.layer_types
    return max(i for i, mode in enumerate(modes[:layer]) if mode == "store" and kinds[i] == kinds[layer])


def _of(config: PreTrainedConfig, name: str, layer: int) -> Any:
    """What a list with a value for each layer says of one; None without such a list."""
    values = field(config, name)
    return values[layer] if values else None


def _indexer(kind: LayerKind, own: PreTrainedConfig, config: PreTrainedConfig, layer: int) -> dict[str, Any]:
    """Channels that a layer's indexer holds of a token, and tokens that it chooses, as `LayerShape` has them."""
    if kind is not LayerKind.INDEXED:
        return {}
    size: int = getattr(own, "index_head_dim", None) or own.indexer_head_dim
    if blocks := getattr(own, "index_topk_blocks", None):
        chosen = blocks * own.index_block_size
    elif budget := getattr(own, "indexer_budget", None):
        chosen = budget + own.indexer_compress_ratio - 1
    elif pool := getattr(own, "index_kpool", None):  # keys, gates, and which are valid
        size, chosen = 2 * size + 1, own.index_topk + (pool - 1 if own.index_kpool_always_select_tail else 0)
    else:
        chosen = own.index_topk
    return {"index": 0 if _of(config, "indexer_types", layer) == "shared" else size, "chosen": chosen}


def _state_bytes(config: PreTrainedConfig, itemsize: int) -> int:
    """Bytes per sequence of a gated delta net: a float32 matrix per value head, and the convolution's last inputs."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    recurrent = values * config.linear_key_head_dim * 4
    size: int = recurrent + (2 * keys + values) * config.linear_conv_kernel_dim * itemsize
    return size
