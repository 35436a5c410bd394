"""An engine over kvcomp's blocks: continuous batching of a transformers model, greedy, with preemption.

    python examples/engine.py --model smollm2-135m --stack "int(bits=4)"

It shows what an engine has to do to serve a stack:

1. make a `Setup` of the stack and the model, and a pool uint8 [blocks, KV heads, page size, bytes] for every layer;
2. give every request blocks, as many as its tokens need, and take them back;
3. in each step lay the new tokens of all requests in one row, and plan it once: `Step.of`;
4. in each layer hand queries, keys and values to `BlockLayer.attend`, which writes pages and attends.

A block's bytes depend on its tokens alone. A preempted request therefore leaves as bytes, and resumes in other blocks.
To be short, this engine takes stacks that write token by token; others need a window per request (`Windows`) as well.
"""

from __future__ import annotations

import argparse
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from kvcomp import StackLike
from kvcomp.cache.blocks import BlockLayer, Pages, Setup, Step
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.integrations.huggingface.models import load_model

NAME = "kvcomp_blocks"
UNSERVED = ("softcap", "sliding_window", "s_aux")  # arguments of attention that this engine does not pass on
PROMPTS = ("The three most important ideas in computer science are", "Once upon a time, in a small village by the sea,")


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **given: Any) -> Any:
    """What transformers calls for attention: query [1, Hq, T, D], key, value [1, H, T, D] of all requests in a row."""
    for name in UNSERVED:
        if given.get(name) is not None:
            raise UnsupportedError(f"{name}={given[name]}: this engine serves full attention alone, as Llama has it")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    given["layers"][module.layer_idx].attend(given["step"], q, k, v, out)
    return out[None], None


AttentionInterface.register(NAME, attend)


@dataclass(eq=False)
class Request:
    """tokens: the prompt and what was written. past: how many of them are in `blocks`. saved: while it is preempted,
    the bytes of its blocks in every layer."""

    prompt: int
    limit: int
    tokens: list[int]
    past: int = 0
    blocks: list[int] = field(default_factory=list)
    saved: list[Tensor] | None = None


class Engine:
    """Requests wait, run and finish; those that run bring their new tokens in one forward of the model."""

    def __init__(self, model: Any, stack: StackLike, blocks: int = 256, running: int = 8) -> None:
        """blocks: how many the pool has; running: the most requests in a step."""
        modules = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
        config = model.config.get_text_config()
        self.heads, self.dim, query_heads = config.num_key_value_heads, modules[0].head_dim, config.num_attention_heads
        self.setup = setup = Setup(stack, len(modules), self.dim, model.dtype)
        if not setup.by_token:
            raise UnsupportedError(f"{stack}: this engine writes token by token: use int(bits=4), fp8 or turboquant")
        self.model, self.limit, self.device = model, running, model.device
        model.set_attn_implementation(NAME)
        shape = blocks, self.heads, setup.page_size, setup.record_bytes(self.heads) // setup.page_size
        self.pools = [torch.zeros(shape, dtype=torch.uint8, device=self.device) for _ in modules]
        pages = [Pages(setup, i, self.heads, self.device).at(pool) for i, pool in enumerate(self.pools)]
        self.layers = [BlockLayer(p, None, query_heads, m.scaling) for p, m in zip(pages, modules, strict=True)]
        self.free = list(range(blocks - 1, 0, -1))  # block 0 is nobody's: tables are padded with it
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = self.most_blocks = 0

    def add(self, prompt: list[int], tokens: int) -> Request:
        """A request for `tokens` tokens after a prompt.

        Raises:
            KvcompError: an empty prompt, or more tokens than the pool holds.
        """
        if not prompt or tokens < 1:
            raise KvcompError(f"prompt of {len(prompt)} tokens, tokens={tokens}: expected at least one of each")
        if (need := self._blocks(len(prompt) + tokens - 1)) > len(self.pools[0]) - 1:
            raise KvcompError(f"{len(prompt)} + {tokens} tokens need {need} blocks: give the engine more of them")
        request = Request(len(prompt), len(prompt) + tokens, list(prompt))
        self.waiting.append(request)
        return request

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.waiting or self.running:
            self.step()

    def step(self) -> list[Request]:
        """Let every running request write a token, after waiting ones have joined; returns those that are done."""
        preempted = self.preemptions
        for request in list(self.running):  # the oldest first
            while request in self.running and not self._grow(request):
                self._preempt(self.running[-1])
        while preempted == self.preemptions and self.waiting and len(self.running) < self.limit:
            if not self._grow(self.waiting[0]):
                break
            self._resume(self.waiting.popleft())
        self.most_blocks = max(self.most_blocks, len(self.pools[0]) - 1 - len(self.free))
        for request, token in zip(self.running, self._forward().tolist(), strict=True):
            request.past = len(request.tokens)
            request.tokens.append(token)
        done = [request for request in self.running if len(request.tokens) == request.limit]
        for request in done:
            self._leave(request)
        return done

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.setup.page_size)

    def _grow(self, request: Request) -> bool:
        """Give a request the blocks that its tokens need; False: there are not as many."""
        missing = self._blocks(len(request.tokens)) - len(request.blocks)
        if missing > len(self.free):
            return False
        request.blocks += [self.free.pop() for _ in range(missing)]
        return True

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.free += request.blocks
        request.blocks = []

    def _preempt(self, request: Request) -> None:
        """Keep the bytes of a request's blocks on the host, and let it wait before all others."""
        request.saved = [pool[request.blocks].cpu() for pool in self.pools]
        self._leave(request)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _resume(self, request: Request) -> None:
        """Let a request run that has its blocks, with the bytes that it left with."""
        for pool, saved in zip(self.pools, request.saved or (), strict=False):
            pool[request.blocks[: len(saved)]] = saved.to(self.device)
        request.saved = None
        self.running.append(request)

    @torch.inference_mode()
    def _forward(self) -> Tensor:
        """The next token of each running request, int64 [R]."""
        new = [r.tokens[r.past :] for r in self.running]
        positions = [torch.arange(r.past, len(r.tokens)) for r in self.running]
        width, size = max(len(r.blocks) for r in self.running), self.setup.page_size
        table = torch.tensor([r.blocks + [0] * (width - len(r.blocks)) for r in self.running])
        slots = torch.cat([row[at // size] * size + at % size for row, at in zip(table, positions, strict=True)])
        ends = torch.tensor([len(tokens) for tokens in new]).cumsum(0)
        lengths, prompts = zip(*((len(r.tokens), r.prompt) for r in self.running), strict=True)
        on_device = table.to(self.device), slots.to(self.device)
        step = Step.of(self.setup, self.heads, [0, *ends.tolist()], lengths, prompts, *on_device)
        row = torch.tensor([[t for tokens in new for t in tokens]]), torch.cat(positions)[None], ends - 1
        ids, places, last = (x.to(self.device) for x in row)
        how: dict[str, Any] = {"use_cache": False, "logits_to_keep": last, "layers": self.layers, "step": step}
        return self.model(input_ids=ids, position_ids=places, **how).logits[0].argmax(-1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Continuous batching of a transformers model over kvcomp's blocks.")
    parser.add_argument("--model", default="smollm2-135m", help="an alias, a folder or a hub id")
    parser.add_argument("--stack", default="int(bits=4)", help="a stack that writes token by token")
    parser.add_argument("--prompt", action="append", help="a request's prompt; may be given several times")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--blocks", type=int, default=64, help="blocks in the pool")
    given = parser.parse_args(arguments)
    model, tokenizer = load_model(given.model)
    engine = Engine(model, given.stack, given.blocks)
    requests = [engine.add(tokenizer(prompt).input_ids, given.tokens) for prompt in given.prompt or PROMPTS]
    engine.run()
    for request in requests:
        print(
            "|".join(map(tokenizer.decode, (request.tokens[: request.prompt], request.tokens[request.prompt :]))), "\n"
        )
    held, tokens = engine.most_blocks * engine.pools[0][0].nbytes, engine.most_blocks * engine.setup.page_size
    dense = tokens * 2 * engine.heads * engine.dim * model.dtype.itemsize
    print(f"{engine.most_blocks} blocks at most: {dense / held:.1f} times smaller than K and V in {model.dtype}")


if __name__ == "__main__":
    main()
