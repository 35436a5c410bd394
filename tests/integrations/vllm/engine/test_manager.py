"""Blocks that vLLM's manager holds for requests, step by step, of groups that its planner makes of kvcomp's specs."""

from __future__ import annotations

import random
from importlib.util import find_spec
from math import ceil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcomp.cache.blocks.setup import Setup
from kvcomp.integrations.vllm import plugin
from kvcomp.stages.stack import Stack

LAYERS, HEADS, DIM, LENGTH = 4, 2, 64, 1024
STACKS = ["snapkv(budget=128, window=32) + int8", "streaming(sinks=4, recent=64) + int8"]
STACKS += ["h2o(budget=128) + int8", "kivi(bits=4, group=32) + window(sinks=4, recent=40)", "int8"]


def planned(config: Any, specs: dict[str, Any], memory: int) -> Any:
    """What vLLM makes of the specs of one worker's layers."""
    from vllm.v1.core import kv_cache_utils

    if find_spec("vllm.v1.core.kv_cache_planning") is None:  # before 0.33
        return kv_cache_utils.get_kv_cache_configs(config, [specs], [memory])[0]
    from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs

    return get_kv_cache_configs(config, [specs], [memory], get_global_kv_cache_groups(config, [specs]))[0]


class Blocks:
    """A manager of `blocks` blocks of `size` tokens. `ahead`: a step is scheduled while the last one is in flight."""

    def __init__(self, stack: str, size: int = 64, blocks: int = 32, ahead: bool = False) -> None:
        plugin.register()
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import FullAttentionSpec
        from vllm.v1.worker.utils import customize_attention_spec

        from kvcomp.integrations.vllm.backend import backend_for
        from kvcomp.integrations.vllm.window import Window

        self.setup = Setup(Stack.parse(stack), layers=LAYERS, dim=DIM, dtype=torch.float32, drafts=0)
        self.size, self.ahead, self.settled = size, ahead, dict[str, int]()
        config: Any = VllmConfig()
        lengths = {"max_model_len": LENGTH, "original_max_model_len": LENGTH}
        config.model_config = SimpleNamespace(**lengths, supports_kv_cache_grouping=False)
        config.cache_config.block_size, config.cache_config.kv_cache_layout = size, "LBHNC"
        spec = FullAttentionSpec(block_size=size, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32)
        spec = customize_attention_spec(backend_for(self.setup), spec)
        specs: dict[str, Any] = {f"layers.{i}.attn": spec for i in range(LAYERS)}
        with set_current_vllm_config(config):
            windows = [Window(self.setup, HEADS, 3 * HEADS) for _ in range(LAYERS) if self.setup.slots]
        specs |= {window.name: window.get_kv_cache_spec(config) for window in windows}
        self.config = planned(config, specs, (blocks + 1) * LAYERS * spec.page_size_bytes)  # block 0 is nobody's
        self.manager = KVCacheManager(self.config, LENGTH, size, size, enable_caching=False)

    @property
    def used(self) -> int:
        pool = self.manager.block_pool
        return int(pool.num_gpu_blocks - pool.get_num_free_blocks() - 1)

    def request(self, name: str, prompt: int) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        return Request(name, [1] * prompt, SamplingParams(max_tokens=LENGTH), None)

    def step(self, request: Any, most: int = LENGTH) -> bool:
        """Compute the request's tokens, `most` at most, and write one after the last; False: there are no blocks."""
        tokens = min(max(request.num_tokens - request.num_computed_tokens, 1), most)
        if self.manager.allocate_slots(request, tokens) is None:
            return False
        self.settled[request.request_id] = request.num_computed_tokens - request.num_in_flight_tokens
        request.num_computed_tokens += tokens
        request.num_in_flight_tokens = tokens if self.ahead else 0
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(1)
        return True

    def leave(self, request: Any) -> None:
        self.manager.free(request)
        request.num_computed_tokens = request.num_in_flight_tokens = 0

    def held(self, request: Any) -> set[int]:
        """The request's blocks after its last step: those that the setup says, and no others."""
        pages, *window = self.manager.get_blocks(request.request_id).blocks
        settled, prompt, page = self.settled[request.request_id], request.num_prompt_tokens, self.setup.page_size
        first, last = self.setup.geometry.extent(settled, prompt).gap
        free = range(ceil(first * page / self.size), last * page // self.size)
        assert len(pages) == ceil(request.num_computed_tokens / self.size)
        for column, block in enumerate(pages):  # what a step brings itself goes when the next one begins
            assert block.is_null == (column in free) or column * self.size >= settled
        for blocks in window:
            spec = self.config.kv_cache_groups[1].kv_cache_spec
            kept = spec.kept_blocks if settled >= prompt else spec.blocks
            assert [block.is_null for block in blocks] == [i >= kept for i in range(spec.blocks)]
        return {block.block_id for blocks in (pages, *window) for block in blocks if not block.is_null}


@pytest.mark.parametrize("stack", STACKS)
def test_plan(stack: str) -> None:
    """The pages of all layers are one group and their windows another, in blocks of the same bytes."""
    blocks = Blocks(stack)
    setup, specs = blocks.setup, [group.kv_cache_spec for group in blocks.config.kv_cache_groups]
    kinds = ["EvictingSpec" if setup.stack.policies else "FullAttentionSpec", "WindowSpec"][: 1 + bool(setup.slots)]
    assert [type(spec).__name__ for spec in specs] == kinds
    assert {spec.page_size_bytes * setup.page_size // 64 for spec in specs} == {HEADS * setup.record_bytes(HEADS)}
    assert [len(group.layer_names) for group in blocks.config.kv_cache_groups] == [LAYERS] * len(kinds)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("stack", STACKS)
def test_requests_in_one_pool(stack: str, size: int, ahead: bool) -> None:
    """However prompts are cut, and whoever is preempted and comes back as a prompt with its own words after."""
    chance, blocks, thrown = random.Random(0), Blocks(stack, size, 1664 // size, ahead), 0
    requests = [blocks.request(str(i), prompt) for i, prompt in enumerate((330, 64, 500, 640, 1))]
    running: list[Any] = []
    for _ in range(300):
        running += [one for one in requests if one not in running]
        for one in list(running):
            while one in running and not blocks.step(one, chance.choice([50, 64, 300])):
                blocks.leave(running.pop())
                thrown += 1
        held = [blocks.held(one) for one in running]
        assert sum(map(len, held)) == len(set().union(*held)) == blocks.used
    for one in running:
        blocks.leave(one)
    assert thrown > 0 == blocks.used


def test_what_a_request_lets_go_another_gets() -> None:
    """A block of int8 pages can hold 16 exact tokens, or 11 queries."""
    window, queries = 64 // 16, -(-32 // 11)
    first, behind = 448 // 64 + window + queries, 128 // 64 + 1 + window
    blocks = Blocks(STACKS[0], blocks=first + behind + 2)
    one, other = (blocks.request(name, 448) for name in ("one", "other"))
    assert blocks.step(one)
    assert len(blocks.held(one)) == blocks.used == first
    assert not blocks.step(other)
    assert blocks.step(one)
    assert len(blocks.held(one)) == blocks.used == behind
    assert blocks.step(other)
    assert len(blocks.held(other)) == first
