"""A client of vLLM with a compressed cache: many requests at once over the OpenAI protocol, and what they cost.

    pip install "kvcomp[vllm]" openai
    KVCOMP_STACK="int(bits=4)" vllm serve MODEL --attention-backend CUSTOM --block-size 64
    python examples/vllm_client.py http://127.0.0.1:8000

The client knows nothing of kvcomp: a stack is the server's matter.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
import urllib.request

import openai

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
MAYORS = {"Arlen": "Tom Baker", "Belmont": "Ann Fisher", "Corvan": "Max Weaver", "Dunmore": "Eva Smith"}
MAYORS |= {"Elstow": "Jim Carter", "Farley": "Meg Cooper", "Gresham": "Sam Mason", "Hadleigh": "Kim Potter"}


def pool(address: str) -> tuple[int, int]:
    """Blocks in the server's pool, and tokens of a block."""
    text = urllib.request.urlopen(f"{address}/metrics", timeout=30).read().decode()
    config = next(line for line in text.splitlines() if line.startswith("vllm:cache_config_info{"))
    blocks, size = (re.search(rf'{name}="(\d+)"', config) for name in ("num_gpu_blocks", "block_size"))
    assert blocks, config
    assert size, config
    return int(blocks[1]), int(size[1])


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str, tokens: int) -> tuple[str, float]:
    """The streamed answer to one prompt, and the seconds until its first token."""
    start, first, pieces = time.perf_counter(), 0.0, []
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    async for event in stream:
        first = first or time.perf_counter() - start
        pieces += [choice.text for choice in event.choices]
    return "".join(pieces), first


async def ask_all(address: str, prompts: list[str], tokens: int) -> list[tuple[str, float]]:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
        model = (await client.models.list()).data[0].id
        return await asyncio.gather(*(ask(client, model, prompt, tokens) for prompt in prompts))


def main(address: str = "http://127.0.0.1:8000", fillers: int = 20, tokens: int = 8) -> dict[str, object]:
    prompts = [
        f"The mayor of {town} is called {name}. {FILLER * fillers}The mayor of {town} is called"
        for town, name in MAYORS.items()
    ]
    start = time.perf_counter()
    answers = asyncio.run(ask_all(address, prompts, tokens))
    seconds = time.perf_counter() - start
    for (town, name), (answer, first) in zip(MAYORS.items(), answers, strict=True):
        print(f"{town}: {answer.split('.')[0].strip()} (in the prompt: {name}), first token after {first:.2f} s")
    blocks, size = pool(address)
    print(f"{len(prompts)} requests at once: {len(prompts) * tokens / seconds:.1f} tokens/s")
    print(f"the server's pool holds {blocks * size:,} tokens in {blocks} blocks")
    return {"answers": [answer for answer, _ in answers], "capacity": blocks * size}


if __name__ == "__main__":
    main(*sys.argv[1:2])
