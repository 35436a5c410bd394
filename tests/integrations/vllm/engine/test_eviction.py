"""Policies that choose what stays of a prompt: the blocks that this frees, and the text that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

ENGINE = Callable[..., dict[str, Any]]
TEXT = Callable[[int, int], list[int]]
SHARE = Callable[[list[list[int]], list[list[int]]], float]
UNDECIDED = Callable[[list[list[int]], dict[str, Any]], float]
ROOMY = Callable[[str], list[dict[str, Any]]]

TOKENS = 32
CLOSE = 0.15
LENGTHS = (20, 100, 300, 130, 96, 340, 200, 15)
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
EXACT, LOSSY = "snapkv(budget=96, window=32) + none", "snapkv(budget=96, window=32) + int8"
HOLDS = "h2o(budget=128) + none"


@pytest.fixture(scope="module")
def requests(text: TEXT) -> list[dict[str, Any]]:
    return [{"prompt": text(n, 40 * i), "tokens": TOKENS, "margins": True} for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def long(text: TEXT) -> list[dict[str, Any]]:
    """Requests that write over the ends of several pages."""
    lengths = ((100, 100), (300, 100), (130, 120))
    return [{"prompt": text(n, 50 * i), "tokens": tokens, "margins": True} for i, (n, tokens) in enumerate(lengths)]


@pytest.fixture(scope="module")
def roomy(engine: ENGINE, requests: list[dict[str, Any]], long: list[dict[str, Any]]) -> ROOMY:
    """roomy(stack): rounds with space for all at once: requests of which every other one is aborted, all of the same,
    and the long ones."""

    @cache
    def run(stack: str) -> list[dict[str, Any]]:
        leaving = [request | {"abort_after": 5 if i % 2 else None} for i, request in enumerate(requests)]
        result = engine(stack, [leaving, requests, long], max_num_batched_tokens=4096)
        assert result["metrics"]["vllm:num_preemptions"] == 0
        done: list[dict[str, Any]] = result["rounds"]
        return done

    return run


@pytest.mark.parametrize("stack", [EXACT, LOSSY])
def test_text_equals_hugging_face(
    roomy: ROOMY, hugging_face: Any, share: SHARE, requests: list[dict[str, Any]], stack: str
) -> None:
    aborted, whole, _ = roomy(stack)
    some = [i for i, n in enumerate(LENGTHS) if n in (96, 100, 340)]  # what stays of them: all, almost all, few
    expected = [hugging_face(stack, requests[i]["prompt"], TOKENS) for i in some]
    assert share([whole["outputs"][i] for i in some], expected) >= 0.95
    assert [len(output) for output in aborted["outputs"]] == [TOKENS, 5] * 4
    assert aborted["held"][-1] == whole["held"][-1] == 0
    for early, late in zip(aborted["outputs"], whole["outputs"], strict=True):
        assert late[: len(early)] == early


@pytest.mark.parametrize(
    "stack",
    [
        "snapkv(keep=0.4, window=16) + kivi(bits=4, group=32) + window(sinks=4, recent=40)",
        "keydiff(keep=0.5) + kivi(bits=4, group=32) + quest(pages=2)",
        "tova(keep=0.3) + turboquant(bits=4)",
    ],
)
def test_other_stacks(engine: ENGINE, hugging_face: Any, share: SHARE, text: TEXT, loose: TEXT, stack: str) -> None:
    """Channels that share a scale, sinks and recent tokens, a selector over what is kept, heads that agree."""
    prompts = [text(310, 300), loose(200, 2), text(40, 30)]
    asked = [{"prompt": prompt, "tokens": TOKENS} for prompt in prompts]
    written = engine(stack, [asked], max_num_batched_tokens=4096)["rounds"][0]["outputs"]
    assert share(written, [hugging_face(stack, prompt, TOKENS) for prompt in prompts]) >= 0.95


@pytest.mark.parametrize(
    "stack",
    [
        HOLDS,
        "h2o(budget=100) + int(bits=4, group=32) + window(sinks=4, recent=32)",
        "tova(budget=128) + int8",
        "rkv(budget=128) + int8",
        "snapkv(budget=160, window=16, hold=true) + kivi(bits=4, group=32) + quest(pages=2)",
        "knorm(budget=128, hold=true) + none + window(sinks=4, recent=16)",
    ],
)
def test_budgets_that_hold(
    engine: ENGINE, hugging_face: Any, share: SHARE, long: list[dict[str, Any]], stack: str
) -> None:
    """Pages leave while a request writes, in each head those that Hugging Face evicts."""
    written = engine(stack, [long], max_num_batched_tokens=4096)["rounds"][0]["outputs"]
    assert share(written, [hugging_face(stack, one["prompt"], one["tokens"]) for one in long]) >= 0.95


@pytest.mark.parametrize(("stack", "close"), [(EXACT, 0.0), (LOSSY, CLOSE), (HOLDS, 0.0)])
def test_cut_prompts(
    engine: ENGINE, roomy: ROOMY, undecided: UNDECIDED, requests: list[dict[str, Any]], stack: str, close: float
) -> None:
    """The queries that vote may come in other steps than the end of the prompt: 300 and 200 are cut within them."""
    cut = engine(stack, [requests], max_num_batched_tokens=64)
    assert undecided(cut["rounds"][0]["outputs"], roomy(stack)[1]) <= close


@pytest.mark.parametrize(("stack", "blocks", "close"), [(EXACT, 12, 0.0), (LOSSY, 21, CLOSE), (HOLDS, 12, 0.0)])
def test_preemption(
    engine: ENGINE,
    roomy: ROOMY,
    undecided: UNDECIDED,
    long: list[dict[str, Any]],
    stack: str,
    blocks: int,
    close: float,
) -> None:
    """What is computed again keeps of its prompt what it did at first, and its own words see no more than that."""
    options = {"max_model_len": 512, "num_gpu_blocks_override": blocks}
    small = engine(stack, [long], max_num_batched_tokens=4096, **options)
    assert small["metrics"]["vllm:num_preemptions"] > 0
    assert undecided(small["rounds"][0]["outputs"], roomy(stack)[-1]) <= close


def test_drafts(engine: ENGINE, roomy: ROOMY, undecided: UNDECIDED, long: list[dict[str, Any]]) -> None:
    result = engine(EXACT, [long], max_num_batched_tokens=4096, speculative_config=DRAFTS)
    drafted, accepted = (result["metrics"][f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert 0 < accepted < drafted
    assert undecided(result["rounds"][0]["outputs"], roomy(EXACT)[-1]) == 0


def test_blocks_go_back(engine: ENGINE, text: TEXT) -> None:
    """After its prompt a request holds blocks for what is kept and for what it writes; others get the rest.

    A block of int8 pages can hold 16 exact tokens, or 11 queries.
    """
    stack = "snapkv(budget=128, window=32) + int8"
    asked = [{"prompt": text(448, 100 * i), "tokens": 70} for i in range(3)]
    alone = engine(stack, [asked[:1], asked], max_num_batched_tokens=4096)["rounds"]
    window, queries = 64 // 16, -(-32 // 11)
    first = 448 // 64 + window + queries  # blocks while the prompt is computed
    behind = 128 // 64 + 1 + window  # and until 64 tokens follow it
    assert alone[0]["held"] == [first] + [behind] * 64 + [behind + 1] * 4 + [0]
    blocks = first + 2 * (behind + 1) + 1  # one prompt, and two requests that are after theirs
    tight = engine(stack, [asked], max_num_batched_tokens=4096, max_model_len=1024, num_gpu_blocks_override=blocks)
    assert tight["metrics"]["vllm:num_preemptions"] == 0
    assert sum(size > 2 * behind for size in tight["rounds"][0]["held"]) > 60  # all three at once
    assert tight["rounds"][0]["outputs"] == alone[1]["outputs"]


def test_blocks_stay_few(engine: ENGINE, text: TEXT) -> None:
    """A request that holds its budget writes on in the blocks of the pages that leave, and others get the rest."""
    stack = "h2o(budget=128) + int8 + window(sinks=4, recent=16)"
    asked = [{"prompt": text(256, 100 * i), "tokens": 200} for i in range(3)]
    alone = engine(stack, [asked[:1], asked], max_num_batched_tokens=4096)["rounds"]
    held = alone[0]["held"]
    behind = held[1]
    assert behind < held[0]
    assert max(held[1:-1]) <= behind + 1
    assert alone[0]["written"][-1] == 200
    blocks = held[0] + 2 * (behind + 1) + 1
    tight = engine(stack, [asked], max_num_batched_tokens=4096, max_model_len=1024, num_gpu_blocks_override=blocks)
    assert tight["metrics"]["vllm:num_preemptions"] == 0
    assert tight["rounds"][0]["outputs"] == alone[1]["outputs"]
