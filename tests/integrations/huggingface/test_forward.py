"""Caches given to models under the name that each version of transformers has for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from generation import tokens
from letters import Letters
from tiny_models import make
from torch import Tensor

from kvcomp import CompressedCache, KvcompError, prefill
from kvcomp.benchmarks import decoding, questions
from kvcomp.integrations.huggingface.forward import NAMES, generating_with, of_generate, with_cache


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield


class Current(torch.nn.Module):
    def forward(self, input_ids: Tensor, cache: Any = None) -> None: ...


class Older(torch.nn.Module):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> None: ...


class Wrapped(torch.nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None: ...


def test_a_forward_is_asked_for_its_name() -> None:
    assert list(with_cache(Current(), 1)) == ["cache"]
    assert list(with_cache(Older(), 1)) == ["past_key_values"]
    assert list(with_cache(Wrapped(), 1)) == [of_generate()]
    assert with_cache(make("llama"), 1) == generating_with(1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gptoss", "qwen3next", "deepseek"])
def test_every_model_takes_it_without_a_warning(name: str) -> None:
    model, ids = make(name, "eager" if name == "gptoss" else "sdpa"), tokens(1, 100)
    cache = CompressedCache("int(bits=4)", model)
    with torch.no_grad():
        model(ids, **with_cache(model, cache))
    assert cache.get_seq_length() == 100
    model.generate(ids, **generating_with(CompressedCache("none", model)), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("name", NAMES)
def test_either_name_is_served_or_refused(name: str) -> None:
    """A forward takes any keyword: a cache that it did not know would stay empty without a word."""
    model, ids = make("llama"), tokens(1, 100)
    cache = CompressedCache("int(bits=4)", model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            model(ids, **{name: cache})
        except KvcompError as error:
            refused = str(error)
            assert f"{name}=cache" in refused
            assert f"{of_generate()}=cache" in refused
            assert name != of_generate()
        else:
            assert cache.get_seq_length() == 100


def test_what_kvcomp_does_with_a_model_warns_of_nothing() -> None:
    model, ids = make("llama"), tokens(1, 300)
    caches = [CompressedCache(spec, model) for spec in ("kvzip(keep=0.5)", "none", "streaming(chunk=128)")]
    prefill(model, ids, caches, tokenizer=Letters())
    caches[1].compact((10, 280), ids, Letters(), keep=0.2)
    questions._continue(model, caches[0], torch.cat([ids, tokens(1, 3)], 1))
    decoding._step(model, [[5]], caches[2])
