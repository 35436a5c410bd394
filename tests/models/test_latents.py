"""Every architecture that caches latents, or that chooses tokens by an indexer of its own: forks, files and crops go on
as transformers' own cache does, and steps decode no more than they have to."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from images import MODELS, tiny_model_of_images
from isolated import isolated
from situations import EXACT, Prompt, attempt, compared, dense_cache, generate, tokens
from tiny import NotBuiltError, architectures, tiny_config, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from kvcomp import CompressedCache
from kvcomp.architecture import LayerKind
from kvcomp.integrations.configs import layer_kinds

OURS = (LayerKind.LATENT, LayerKind.INDEXED)
NEW = 3


def _is_one(name: str) -> bool:
    try:
        config = tiny_config(name)
        config = config.get_text_config(decoder=True)
        return any(kind in OURS for kind in layer_kinds(config))
    except Exception:
        return False


NAMES = [
    *(name for name in architectures() if _is_one(name)),
    *(name for name in MODELS if name.startswith(("glm5_next", "mistral_large4"))),
]


def _model(name: str) -> tuple[PreTrainedModel, Prompt]:
    return tiny_model_of_images(name) if name in MODELS else (tiny_model(name), Prompt.padded())


def _next_turn(prompt: Prompt, said: Tensor) -> Prompt:
    """The prompt, what was said to it and a question."""
    ids = torch.cat([said, tokens(len(said), 7, seed=9)], 1)
    mask = prompt["attention_mask"]
    return Prompt(
        input_ids=ids, attention_mask=torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    )


def forked(model: PreTrainedModel, cache: CompressedCache, turn: Prompt) -> CompressedCache:
    twin, other = cache.fork(), turn["input_ids"].clone()
    other[:, -4:] = 77
    generate(model, Prompt(turn, input_ids=other), cache, 2)  # what the twin holds stays
    return twin


def loaded(model: PreTrainedModel, cache: CompressedCache, turn: Prompt) -> CompressedCache:
    with TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache")
        return CompressedCache.load(Path(folder) / "cache", model)


def cropped(model: PreTrainedModel, cache: CompressedCache, turn: Prompt) -> CompressedCache:
    cache.crop(-2)
    return cache


WAYS: dict[str, Callable[[PreTrainedModel, CompressedCache, Prompt], CompressedCache]] = {
    "forked": forked,
    "loaded": loaded,
    "cropped": cropped,
}


def _examined(name: str) -> dict[str, Any]:
    try:
        model, prompt = _model(name)
    except NotBuiltError as error:
        return {"not_built": str(error)}
    plain = deepcopy(model)
    theirs = dense_cache(plain)
    first = generate(plain, prompt, theirs, NEW)
    turn, twin = _next_turn(prompt, first.sequences), deepcopy(theirs)
    expected = generate(plain, turn, theirs, NEW)
    found: dict[str, Any] = {}
    crops = not isinstance(attempt(lambda: twin.crop(-2)), Exception)  # sliding and recurrent layers cannot
    for what, way in WAYS.items():
        if what == "cropped" and not crops:
            continue
        cache = CompressedCache(EXACT, model)
        assert generate(model, prompt, cache, NEW).sequences.tolist() == first.sequences.tolist()
        found[what] = compared(generate(model, turn, way(model, cache, turn), NEW), expected)
    found["parts"] = sorted(cache.traffic().parts)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_goes_on(name: str) -> None:
    found = isolated(lambda: _examined(name))
    assert "fatal" not in found, found["fatal"]
    if "not_built" in found:
        return
    assert {what: found[what] for what in WAYS if what in found and found[what] != "equal"} == {}
    assert "dense copy" not in found["parts"], "a step decoded all latents"


def test_the_families_are_there() -> None:
    assert len(NAMES) >= 20, NAMES
