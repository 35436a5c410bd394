"""What models call their cache: `cache` from transformers 5.24 on, `past_key_values` before, and in older code."""

from __future__ import annotations

from functools import cache as memoized
from inspect import signature
from typing import Any

from transformers import Cache, GenerationMixin, __version__

from kvcomp.errors import KvcompError

NAMES = ("cache", "past_key_values")


@memoized
def of_generate() -> str:
    """The keyword for a cache of `generate`, in the transformers that is installed."""
    known = signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in NAMES if name in known)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a model's forward; of one that takes any, that of `generate`."""
    known = signature(model.forward).parameters
    return {next((name for name in NAMES if name in known), of_generate()): cache}


def generating_with(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to `generate`."""
    return {of_generate(): cache}


def refuse_misnamed(module: Any, kwargs: dict[str, Any]) -> None:
    """A cache that a model took for some keyword of its attention, and did not use.

    Raises:
        KvcompError: there is one.
    """
    for name in NAMES:
        if isinstance(kwargs.get(name), Cache):
            other = next(known for known in NAMES if known != name)
            raise KvcompError(
                f"{name}=cache was handed to a model that knows no such argument and caches nothing: {other}=cache "
                f"is what {type(module).__name__} of transformers {__version__} takes"
            )
