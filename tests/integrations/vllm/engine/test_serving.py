"""What a serving engine does to requests: aborts, drafts, preemption, cut prompts, shared prefixes.

Tokens of one step see each other exactly, and those before them as their pages have them. So what moves the border of a
step changes no word where pages lose nothing. Where they do, a text may part from the undisturbed one at a token of
which the model is not sure: by a margin of `CLOSE` nats at most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

ENGINE = Callable[..., dict[str, Any]]
TEXT = Callable[[int, int], list[int]]
UNDECIDED = Callable[[list[list[int]], dict[str, Any]], float]
ROOMY = Callable[[str], list[dict[str, Any]]]

TOKENS = 32
CLOSE = 0.15
LENGTHS = (20, 100, 300, 130, 64, 340, 200, 15)
BY_TOKEN, WINDOWED = "int8", "kivi(bits=4)"
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}


@pytest.fixture(scope="module")
def requests(text: TEXT) -> list[dict[str, Any]]:
    return [{"prompt": text(n, 40 * i), "tokens": TOKENS, "margins": True} for i, n in enumerate(LENGTHS)]


def leaving(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same requests, of which every other one is aborted."""
    return [request | {"abort_after": 5 if i % 2 else None} for i, request in enumerate(requests)]


@pytest.fixture(scope="module")
def roomy(engine: ENGINE, requests: list[dict[str, Any]]) -> ROOMY:
    """roomy(stack): rounds with space for all requests; the last is undisturbed, those before it have aborts."""

    @cache
    def run(stack: str) -> list[dict[str, Any]]:
        rounds = [requests] if stack == "none" else [leaving(requests), requests]
        result = engine(stack, rounds, max_num_batched_tokens=4096)
        assert result["metrics"]["vllm:num_preemptions"] == 0
        done: list[dict[str, Any]] = result["rounds"]
        return done

    return run


@pytest.mark.parametrize(("stack", "blocks"), [(BY_TOKEN, 14), (WINDOWED, 77)])
def test_preemption(
    engine: ENGINE, roomy: ROOMY, undecided: UNDECIDED, requests: list[dict[str, Any]], stack: str, blocks: int
) -> None:
    """A pool that is too small for all: some wait, some are preempted and computed again, as one exact chunk."""
    small = engine(stack, [requests], max_num_batched_tokens=4096, max_model_len=512, num_gpu_blocks_override=blocks)
    assert small["metrics"]["vllm:num_preemptions"] > 0
    assert undecided(small["rounds"][0]["outputs"], roomy(stack)[-1]) <= CLOSE


@pytest.mark.parametrize("stack", [BY_TOKEN, WINDOWED])
def test_aborts(roomy: ROOMY, stack: str) -> None:
    """Requests that end in mid-stream give their blocks back, and disturb neither those beside nor those after them.

    The other tests compare engines in which nothing was aborted with the second round.
    """
    aborted, after = roomy(stack)
    assert [len(output) for output in aborted["outputs"]] == [TOKENS, 5] * 4
    assert aborted["held"][-1] == after["held"][-1] == 0
    for early, whole in zip(aborted["outputs"], after["outputs"], strict=True):
        assert whole[: len(early)] == early


@pytest.mark.parametrize(("stack", "close"), [("none", 0.0), (BY_TOKEN, CLOSE)])
def test_cut_prompts(
    engine: ENGINE, roomy: ROOMY, undecided: UNDECIDED, requests: list[dict[str, Any]], stack: str, close: float
) -> None:
    """A chunk is exact to itself and reads what was before it from pages: where pages lose, a cut may change words."""
    cut = engine(stack, [requests], max_num_batched_tokens=64)
    assert undecided(cut["rounds"][0]["outputs"], roomy(stack)[-1]) <= close


@pytest.mark.parametrize(("stack", "close"), [("none", 0.0), ("kivi(bits=4) + window(sinks=0, recent=0)", CLOSE)])
def test_prefixes_found(
    engine: ENGINE, undecided: UNDECIDED, requests: list[dict[str, Any]], stack: str, close: float
) -> None:
    """Packed pages of an earlier request serve for a prompt that begins alike: read as they are, as after a cut."""
    asked = [request | {"tokens": 12} for request in requests]
    result = engine(stack, [asked, asked], max_num_batched_tokens=4096, enable_prefix_caching=True)
    first, second = result["rounds"]
    assert not any(first["cached"])
    assert second["cached"] == [(n - 1) // 64 * 64 for n in LENGTHS]
    assert undecided(second["outputs"], first) <= close


def test_streaming_frees_blocks(engine: ENGINE, text: TEXT) -> None:
    """After the prompt a request holds sinks, recent tokens, up to a page more and its window; others get the rest."""
    stack = "streaming(sinks=4, recent=128) + int8"
    asked = [{"prompt": text(448, 100 * i), "tokens": 70} for i in range(3)]
    alone = engine(stack, [asked[:1], asked], max_num_batched_tokens=4096)["rounds"]
    held = alone[0]["held"]
    window = held[0] - 7  # all blocks after those of the prompt's 448 tokens
    assert max(held[2:-1]) <= 128 // 64 + 2 + window
    assert held[-1] == 0
    blocks = 7 + window + 2 * (128 // 64 + 2 + window) + 1  # one prompt, and two requests that are after theirs
    tight = engine(stack, [asked], max_num_batched_tokens=4096, max_model_len=1024, num_gpu_blocks_override=blocks)
    assert tight["metrics"]["vllm:num_preemptions"] == 0
    assert tight["rounds"][0]["outputs"] == alone[1]["outputs"]


@pytest.mark.parametrize(("stack", "close"), [(BY_TOKEN, CLOSE), (WINDOWED, 0.0)])
def test_drafts(
    engine: ENGINE, roomy: ROOMY, undecided: UNDECIDED, requests: list[dict[str, Any]], stack: str, close: float
) -> None:
    """Drafts of n-grams, some accepted, some rejected. Drafts see each other exactly."""
    result = engine(stack, [requests], max_num_batched_tokens=4096, speculative_config=DRAFTS)
    drafted, accepted = (result["metrics"][f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert 0 < accepted < drafted
    assert undecided(result["rounds"][0]["outputs"], roomy(stack)[-1]) <= close
