"""Tiny random models of every causal LM that the installed transformers has."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from overrides import MORE, OVERRIDES, SIZES, UNSET, VARIANTS
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LARGEST = 30_000_000  # parameters; what stays larger is not tiny
AS_MADE = ("A_log", "dt_", ".D", "conv", "bias", "norm", "time_", "rel_", "decay", "lambda")  # initial values matter


class NotBuiltError(Exception):
    """Why there is no tiny model of an architecture."""


CLASSES = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MORE}


def architectures() -> list[str]:
    """Every architecture with a causal LM, and the variants of some.

    A model of text and images whose text part is an architecture of its own is left to that and to `images.py`.
    """
    names = [name for name in CLASSES if not {f"{name}_text", f"{name}_vl_text"} & set(CLASSES)]
    return sorted([*names, *VARIANTS], key=str.lower)


def tiny_config(name: str) -> PreTrainedConfig:
    """A small config of an architecture or variant."""
    architecture, own = VARIANTS.get(name) or (name, OVERRIDES.get(name, {}))
    return shrunk(CONFIG_MAPPING[architecture], own)


def shrunk(cls: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    """A config with the sizes of `SIZES` where the class has such fields, and what is its `own`; its parts alike."""
    usual, fields = cls(), {}
    for name, value in SIZES.items():
        stored = (cls.attribute_map or {}).get(name, name)
        if stored != name and stored in SIZES:
            continue  # a second name of a field that is set under its first
        if isinstance(found := getattr(cls, name, None), property) and found.fset is None:
            continue
        try:
            default = getattr(usual, name)
        except AttributeError:
            continue
        except RuntimeError:  # differs between layers
            fields[name] = value
            continue
        if isinstance(default, list | tuple | dict) or (default is None and not name.endswith("token_id")):
            continue
        fields[name] = value
    if fields.get("kv_lora_rank") and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for part, kind in (cls.sub_configs or {}).items():
        if isinstance(default := getattr(usual, part, None), PreTrainedConfig):
            fields[part] = shrunk(type(default) or kind, OVERRIDES.get(default.model_type, {}))
    fields.update(own)
    return cls(**{name: value for name, value in fields.items() if value is not UNSET})


def tiny_model(name: str, implementation: str | None = None) -> PreTrainedModel:
    """The model of `tiny_config`, the same at every call, with weights that make every token matter.

    Raises:
        NotBuiltError: transformers cannot build it, or it stays large.
    """
    try:
        config = tiny_config(name)
        cls = getattr(transformers, CLASSES[VARIANTS.get(name, (name,))[0]])
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        config = config if isinstance(config, cls.config_class) else config.get_text_config(decoder=True)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(config).parameters())
        if size > LARGEST:
            raise NotBuiltError(f"{size / 1e6:.0f} million parameters with the sizes of overrides.py")
        torch.manual_seed(0)
        made = cls._from_config(config, attn_implementation=implementation) if implementation else cls(config)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {first_line(error)}") from error
    return spread(made.float().eval())


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights that make attention matter, and no token at which generation ends."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_(0, 1)
            elif parameter.dim() >= 2 and not any(part in name for part in AS_MADE):
                parameter.normal_(0, 0.12)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:200]
