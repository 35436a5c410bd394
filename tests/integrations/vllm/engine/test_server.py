"""`kvcomp serve`, asked by the OpenAI client."""

from __future__ import annotations

import asyncio
import os
import re
import runpy
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcomp.stages.stack import Stack

STACK = "kivi(bits=4) + window(recent=64)"
TOKENS = 24


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the stack, whose log has one line about it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        *(sys.executable, "-m", "kvcomp", "serve", folder, "--stack", STACK, "--served-model-name", "model"),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", "2048", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(128 << 20)),
        *("--enforce-eager", "--max-num-batched-tokens", "4096"),
    ]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, "the server did not start: " + log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        lines = [line for line in log.read_text().splitlines() if f" kvcomp: {Stack.parse(STACK)}: " in line]
        assert len(lines) == 1, lines
        assert re.search(r"5\.00 bits a number, 18,\d+ tokens in the pool, 3\.20x the 5,8\d+ of 16 bits", lines[0])
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_eight_streams_at_once(
    server: str, hugging_face: Any, text: Callable[[int, int], list[int]], folder: str
) -> None:
    """Eight requests of mixed length, streamed at once: each the text of the Hugging Face integration."""
    import openai
    from transformers import AutoTokenizer

    prompts = [text(n, 30 * i) for i, n in enumerate((10, 700, 65, 300, 128, 40, 500, 190))]
    client = openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none")

    async def streamed(prompt: list[int]) -> tuple[str, int]:
        pieces: list[str] = []
        stream = await client.completions.create(
            model="model",
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for event in stream:
            pieces += [choice.text for choice in event.choices]
        return "".join(pieces), len(pieces)

    async def all_at_once() -> list[tuple[str, int]]:
        return list(await asyncio.gather(*(streamed(prompt) for prompt in prompts)))

    answers = asyncio.run(all_at_once())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [tokenizer.decode(hugging_face(STACK, prompt, TOKENS)) for prompt in prompts]
    assert [answer for answer, _ in answers] == expected
    assert all(pieces > 1 for _, pieces in answers)


def test_the_example_client(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`examples/vllm_client.py`, as a user runs it."""
    example = runpy.run_path(str(Path(__file__).parents[4] / "examples" / "vllm_client.py"))
    found = example["main"](server, fillers=5)
    right = [name in answer for name, answer in zip(example["MAYORS"].values(), found["answers"], strict=True)]
    assert sum(right) >= 7, found["answers"]
    assert found["capacity"] > 2048
    said = capsys.readouterr().out
    assert "tokens/s" in said
    assert f"{found['capacity']:,} tokens" in said
