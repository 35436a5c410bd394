"""Tokens per second of SmolLM2-135M in vLLM with and without stacks:

    python tests/integrations/vllm/engine/throughput.py -n 1,4 [STACK ...]

Prompts of --length tokens, 32 new tokens each, so many requests at once as -n says. Seconds are processor time of the
one thread that there is, so that what else runs on the machine counts little, or with --wall those of the clock, where
OMP_NUM_THREADS may say more threads. "all" is new tokens over the whole time, the prompts' too; "decode" those after
the step after which every request has its first token. An empty STACK is vLLM alone; options of the engine may follow
a "|": '|{"dtype": "bfloat16"}'.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FP8 = '|{"kv_cache_dtype": "fp8"}'
BFLOAT16 = '|{"dtype": "bfloat16"}'
STACKS = (
    "",
    "int8",
    "int(bits=4)",
    "turboquant(bits=4)",
    "kivi(bits=4)",
    "int(bits=4) + quest(keep=0.1)",
    BFLOAT16,
    f"int(bits=4){BFLOAT16}",
    FP8,
    "",  # again: what the machine did meanwhile
)
TOKENS = 32


def requests(folder: str, n: int, length: int) -> list[dict[str, Any]]:
    """n requests with prompts of the licence, each from another token on; after its end it begins anew."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)((HERE.parents[3] / "LICENSE").read_text()).input_ids
    several = ids * (-(-(60 * n + length) // len(ids)))
    return [{"prompt": several[60 * i : 60 * i + length], "tokens": TOKENS} for i in range(n)]


def measured(stack: str, folder: str, at_once: list[int], length: int) -> dict[str, Any]:
    """What `engine_process` says of a stack."""
    stack, _, more = stack.partition("|")
    options = {
        "model": folder,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": max(2048, length + TOKENS),
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 2 << 30,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    } | json.loads(more or "{}")
    if stack:
        options["block_size"] = 64
        options["additional_config"] = {"kvcomp": {"stack": stack}}
    warm = [{"prompt": list(range(100)), "tokens": 2}]
    rounds = [warm, *(requests(folder, n, length) for n in at_once)]
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "engine_process.py")],
        input=json.dumps({"options": options, "rounds": rounds}),
        env=environment | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def rates(round_: dict[str, Any], n: int, clock: str) -> tuple[float, float]:
    """New tokens per second over all, and after the last request's first token."""
    written, at = round_["written"], round_[clock]
    assert written[-1] == n * TOKENS
    started = round_["prompts_in"]
    return written[-1] / at[-1], (written[-1] - written[started]) / (at[-1] - at[started])


def label(stack: str) -> str:
    """A stack and the engine's options as a cell of a table."""
    name, _, more = stack.partition("|")
    options = "".join(f", {key} {value}" for key, value in json.loads(more or "{}").items())
    return f"{name or 'vLLM alone'}{options}"


def main() -> None:
    from kvcomp.integrations.huggingface.models import converted

    parser = ArgumentParser()
    parser.add_argument("-n", default="1,4,16")
    parser.add_argument("--length", type=int, default=2000)
    parser.add_argument("--wall", action="store_const", const="wall", default="at")
    parser.add_argument("stacks", nargs="*")
    given = parser.parse_args()
    at_once = [int(n) for n in given.n.split(",")]
    folder = str(converted("smollm2-135m"))
    heads = "".join(f" all, {n} | decode, {n} |" for n in at_once)
    print(f"| stack |{heads}\n|---|{'---|' * 2 * len(at_once)}", flush=True)
    for stack in given.stacks or STACKS:
        result = measured(stack, folder, at_once, given.length)
        if "error" in result:
            print(f"| {label(stack)} | {result['error']} |", flush=True)
            continue
        found = [rates(r, n, given.wall) for r, n in zip(result["rounds"][1:], at_once, strict=True)]
        cells = "".join(f" {every:.1f} | {decode:.1f} |" for every, decode in found)
        print(f"| {label(stack)} |{cells}", flush=True)


if __name__ == "__main__":
    main()
