"""Which modules read the cache without transformers' attention interface, found by what their code does."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

WRITES = re.compile(  # layer_past.update(key, value, ...), and from transformers 5.24 on curr_cache.update(...)
    r"\b(?:\w+_)?past\w*\.update\(|\b(?:curr_|current_|\w+_attention_)?cache\.update\("
)
ATTENDS = re.compile(r"ALL_ATTENTION_FUNCTIONS|get_interface|attention_interface")


def outside_interface(model_or_config: torch.nn.Module | PreTrainedConfig) -> str | None:
    """The class of an attention module that takes K and V from the cache and attends by itself; None: there is none.

    Those of the model's modeling file count, as models may exchange their attention later (BigBird). A config is looked
    up among the causal language models that transformers knows.
    """
    kinds: list[Any] = []
    if isinstance(model_or_config, torch.nn.Module):
        kinds = [*(type(module) for module in model_or_config.modules()), *_file(type(model_or_config))]
    else:
        kinds = [*_classes(model_or_config)]
    return next((kind.__name__ for kind in kinds if _attends_alone(kind)), None)


def _classes(config: PreTrainedConfig) -> Iterator[type]:
    """The module classes of the modeling file of a config's causal language model."""
    try:
        model: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except (KeyError, ImportError):
        return
    yield from _file(model)


def _file(model: type) -> Iterator[type]:
    for thing in list(vars(sys.modules[model.__module__]).values()):
        if isinstance(thing, type) and issubclass(thing, torch.nn.Module) and thing.__module__ == model.__module__:
            yield thing


@cache
def _attends_alone(kind: type) -> bool:
    code = "" if issubclass(kind, PreTrainedModel) else _code(kind)
    return WRITES.search(code) is not None and ATTENDS.search(code) is None


def _code(kind: type) -> str:
    """The source of a class's methods, with those that it inherits, if one of them updates something.

    "" where no source is available.
    """
    owners = [owner for owner in kind.__mro__ if owner.__module__.split(".")[0] != "torch"]
    methods = {name: thing for owner in reversed(owners) for name, thing in vars(owner).items()}
    functions = [inspect.unwrap(thing) for thing in methods.values() if isinstance(thing, FunctionType)]
    if not any("update" in function.__code__.co_names for function in functions):
        return ""
    try:
        return "\n".join(map(inspect.getsource, functions))
    except (OSError, TypeError):
        return ""
