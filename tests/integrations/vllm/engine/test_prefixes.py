"""Prefix caching: what requests find in blocks of others, and that it leaves their texts as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcomp.cache.blocks.setup import Setup

ENGINE = Callable[..., dict[str, Any]]
TEXT = Callable[[int, int], list[int]]
UNDECIDED = Callable[[list[list[int]], dict[str, Any]], float]

BLOCK, VOCABULARY = 64, 512
TOKENS = 24
LENGTHS = (20, 340, 400, 193)
CLOSE = 0.15

# A prompt comes in pieces of a block here, and reads those before it from pages, whoever wrote them.
EQUAL = [
    "int(bits=4)",
    "int(bits=4) + quest(pages=12)",
    "none + window(sinks=4, recent=40)",
    "snapkv(budget=96, window=32) + int(bits=4)",
    "snapkv(keep=0.3, window=80) + none + window(sinks=4, recent=32)",
    "streaming(sinks=4, recent=128) + none",
    "h2o(budget=128) + int8",
]

MOST = "snapkv(keep=0.9, window=80) + none + window(sinks=4, recent=32)"


def hits(setup: Setup, lengths: tuple[int, ...], more: int = 0) -> list[int]:
    """How many tokens prompts find of which others wrote so many, with so many more after them."""
    each = BLOCK // setup.page_size
    limits = [min(n, max(n + more - max(setup.voters, 1), 0)) // BLOCK * each for n in lengths]
    return [setup.geometry.found(limit, each)[1] if setup.geometry.shared else 0 for limit in limits]


def prompt(n: int, seed: int) -> list[int]:
    chosen = torch.Generator().manual_seed(seed)
    return list(torch.randint(VOCABULARY, (n,), generator=chosen, dtype=torch.int64, device="cpu").tolist())


@pytest.mark.parametrize("stack", EQUAL)
def test_texts_with_hits_and_without(engine: ENGINE, tiny: dict[str, Any], stack: str) -> None:
    """The same prompts again, beside a fresh one; longer ones that begin alike; and these without the cache."""
    setup = Setup(stack, 2, 64, torch.float32, caching=True)
    asked = [{"prompt": prompt(n, i), "tokens": TOKENS} for i, n in enumerate(LENGTHS)]
    fresh = {"prompt": prompt(270, 9), "tokens": TOKENS}
    longer = [one | {"prompt": one["prompt"] + prompt(70, 7)} for one in asked]
    rounds = [asked, [*asked, fresh], longer, [one | {"alone": True} for one in longer]]
    options = {"enable_prefix_caching": True, "long_prefill_token_threshold": BLOCK, "enable_chunked_prefill": True}
    result = engine(stack, rounds, max_num_batched_tokens=2048, **(tiny | {"max_num_seqs": 8}), **options)
    first, again, long, alone = result["rounds"]
    found = hits(setup, LENGTHS)
    assert any(found) == ("h2o" not in stack)
    assert [one["cached"] for one in (first, again, alone)] == [[0] * 4, [*found, 0], [0] * 4]
    assert long["cached"] == hits(setup, LENGTHS, 70)
    assert result["metrics"]["vllm:prefix_cache_hits"] == sum(again["cached"]) + sum(long["cached"])
    assert again["outputs"][:-1] == first["outputs"]
    assert long["outputs"] == alone["outputs"]
    assert [one["held"][-1] for one in result["rounds"]] == [0] * 4


@pytest.mark.parametrize(("stack", "blocks"), [(MOST, 19), (EQUAL[2], 20)])
def test_preempted_requests_find_their_prefix(engine: ENGINE, tiny: dict[str, Any], stack: str, blocks: int) -> None:
    """Where pages lose nothing, the text is that of the undisturbed run, also after a policy chose anew."""
    asked = [{"prompt": prompt(200, i), "tokens": 180} for i in range(3)]
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 2048, **tiny, "max_model_len": 384}
    roomy, small = (engine(stack, [asked], **options, num_gpu_blocks_override=n) for n in (200, blocks))
    assert roomy["metrics"]["vllm:num_preemptions"] == 0 < small["metrics"]["vllm:num_preemptions"]
    assert small["rounds"][0]["outputs"] == roomy["rounds"][0]["outputs"]


@pytest.fixture(scope="module")
def klt(tmp_path_factory: pytest.TempPathFactory) -> str:
    from kvcomp.integrations.huggingface.calibrate import calibrate
    from kvcomp.integrations.huggingface.models import load_model

    file = tmp_path_factory.mktemp("klt") / "klt.safetensors"
    licence = Path(__file__).parents[4] / "LICENSE"
    calibrate(*load_model("smollm2-135m"), "klt", [licence], 512, 256, "smollm2-135m").save(file)
    return f"klt(bits=4, calibration='{file}')"


@pytest.mark.parametrize("stack", ["kivi(bits=4)", "klt"])
def test_recent_tokens_are_computed_again(
    engine: ENGINE, undecided: UNDECIDED, text: TEXT, klt: str, stack: str
) -> None:
    """A request that finds a prefix reads it from pages, and has the tokens after it in full precision: its text
    differs where the model is not sure, if at all."""
    setup = Setup(klt if stack == "klt" else stack, 30, 64, torch.float32, caching=True)
    asked = [{"prompt": text(n, 40 * i), "tokens": TOKENS, "margins": True} for i, n in enumerate(LENGTHS)]
    options = {"max_num_batched_tokens": 4096, "enable_prefix_caching": True}
    first, again = engine(str(setup.stack), [asked, asked], **options)["rounds"]
    assert again["cached"] == hits(setup, LENGTHS)
    assert sum(again["cached"]) > 300
    assert undecided(again["outputs"], first) <= CLOSE


def test_prompt_logprobs_in_any_order(engine: ENGINE, tiny: dict[str, Any]) -> None:
    """Two prompts that begin alike, each first and last: requests that want to know their whole prompt read no hits."""
    begin = prompt(200, 1)
    asked = [{"prompt": begin + prompt(60, seed), "tokens": 4, "prompt_logprobs": True} for seed in (2, 3)]
    result = engine("kivi(bits=4, group=32)", [asked, asked[::-1]], enable_prefix_caching=True, **tiny)
    forward, reverse = (round_["prompts"] for round_ in result["rounds"])
    assert [len(given) for given in forward] == [259, 259]
    for a, b in zip(forward, reverse[::-1], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-4)
