"""These tests run in an environment of their own (`make test-vllm`): vLLM pins versions that the other tests do not.

Where vllm is not installed there is nothing to collect.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
POOL = 128 << 20
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",  # threads of vLLM's n-gram proposer spin: seconds a step where the cores are busy
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def folder() -> str:
    """The folder of SmolLM2-135M's weights."""
    from kvcomp.integrations.huggingface.models import converted

    return str(converted(MODEL))


@pytest.fixture(scope="session")
def text(folder: str) -> Callable[[int, int], list[int]]:
    """text(n, start): n token ids of a licence that models know by heart, from its token `start` on."""
    from transformers import AutoTokenizer

    licence = (HERE.parents[3] / "LICENSE").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(licence).input_ids
    return lambda n, start: ids[start : start + n]


@pytest.fixture(scope="session")
def loose(folder: str) -> Callable[[int, int], list[int]]:
    """loose(n, seed): n token ids of words in no order, which leave a model undecided."""
    import random

    from transformers import AutoTokenizer

    words = ["river", "stone", "market", "yellow", "engine", "paper", "garden", "winter", "doctor", "silver"]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def made(n: int, seed: int) -> list[int]:
        chosen = random.Random(seed).choices(words, k=n)
        return list(tokenizer(" ".join(chosen)).input_ids[:n])

    return made


@pytest.fixture(scope="session")
def share() -> Callable[[list[list[int]], list[list[int]]], float]:
    """share(one, other): of all tokens, those that are the same in the same place."""

    def same(one: list[list[int]], other: list[list[int]]) -> float:
        pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
        return sum(a == b for a, b in pairs) / len(pairs)

    return same


@pytest.fixture(scope="session")
def undecided() -> Callable[[list[list[int]], dict[str, Any]], float]:
    """undecided(texts, round): the largest margin, in nats, by which the round had preferred the first token in which
    one of the texts differs; 0 where none does. What comes after such a token has another text before it."""

    def largest(texts: list[list[int]], round_: dict[str, Any]) -> float:
        parted = [0.0]
        for text, own, margins in zip(texts, round_["outputs"], round_["margins"], strict=True):
            parted += [m for a, b, m in zip(text, own, margins, strict=True) if a != b][:1]
        return max(parted)

    return largest


class Engines:
    """A process of `engine_process`, kept while it may be: to import vLLM takes longest."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.process: subprocess.Popen[str] | None = None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            command = [sys.executable, str(HERE / "engine_process.py")]
            with self.log.open("a") as errors:
                self.process = subprocess.Popen(
                    command,
                    env=os.environ | ENVIRONMENT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.process = None
            raise AssertionError(self.log.read_text()[-4000:])
        if "speculative_config" in question["options"]:
            self.close()  # no other engine starts where one with drafts was
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(60)
            self.process = None


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for a model of random weights, as two ranks can share its two KV heads: SmolLM2-135M has three."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.2,  # far from a tie
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return {"model": str(folder), "skip_tokenizer_init": True, "max_model_len": 512, "max_num_seqs": 4}


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    made = Engines(tmp_path_factory.mktemp("engine"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def engine(folder: str, engines: Engines) -> Callable[..., dict[str, Any]]:
    """engine(stack, rounds, **options): what `engine_process` says of an engine with a stack (None: without)."""

    def started(stack: str | None, rounds: list[list[dict[str, Any]]], **options: Any) -> dict[str, Any]:
        given = {
            "model": folder,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": POOL,
            "distributed_executor_backend": "uni",
            "enable_prefix_caching": False,
            "block_size": 64,
            "seed": 0,
            "disable_log_stats": False,
        } | options
        if stack is not None:
            given["additional_config"] = {"kvcomp": {"stack": stack}}
        answer = engines.ask({"options": given, "rounds": rounds})
        assert "error" not in answer or not rounds, answer["error"]
        return answer

    return started


@pytest.fixture(scope="session")
def hugging_face() -> Callable[..., list[int]]:
    """hugging_face(stack, prompt, tokens, chunk): what the Hugging Face integration says, the prompt in chunks.

    Keys are coded as in vLLM: where it writes pages token by token, they have no centre.
    """
    import torch

    from kvcomp import CompressedCache
    from kvcomp.integrations.huggingface.models import load_model
    from kvcomp.stages.plan import LayerPlan

    torch.set_num_threads(1)
    model, _ = load_model(MODEL)
    build = LayerPlan.build

    def as_in_vllm(self: LayerPlan, shape: Any) -> Any:
        asks = self.sinks or self.recent or self.selector or self.policies
        tokenwise = not asks and self.layout(shape).tokenwise
        return build(self, replace(shape, centred=not tokenwise))

    def said(stack: str, prompt: list[int], tokens: int, chunk: int | None = None) -> list[int]:
        ids = torch.tensor([prompt])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LayerPlan, "build", as_in_vllm)
            return generated(stack, ids, tokens, chunk)

    def generated(stack: str, ids: Any, tokens: int, chunk: int | None) -> list[int]:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=CompressedCache(stack, model),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            prefill_chunk_size=chunk,
        )
        return list(out[0, ids.shape[1] :].tolist())

    return said
