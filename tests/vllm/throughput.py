"""Tokens per second of SmolLM2-135M in vLLM with and without stacks: python tests/vllm/throughput.py -n 1,4 [STACK ...]

Prompts of a thousand tokens, 32 new tokens each, so many requests at once as -n says. Seconds are processor time of the
one thread that there is: what else runs on the machine counts little. "all" is new tokens over the whole time, the
prompts' too; "decode" those behind the step after which every request has its first token. An empty STACK is vLLM
alone; options of the engine may follow a "|": '|{"dtype": "bfloat16"}'.
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
STACKS = ("", "int8", "int(bits=4)", "turboquant(bits=4)", "kivi(bits=4)", "int(bits=4) + quest(keep=0.1)")
LENGTH, TOKENS = 1000, 32


def requests(folder: str, n: int) -> list[dict[str, Any]]:
    """n requests with prompts of the licence, each from another token on."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)((HERE.parents[1] / "LICENSE").read_text()).input_ids
    return [{"prompt": ids[60 * i : 60 * i + LENGTH], "tokens": TOKENS} for i in range(n)]


def measured(stack: str, folder: str, at_once: list[int]) -> dict[str, Any]:
    """What `engine_process` says of a stack."""
    stack, _, more = stack.partition("|")
    options = {
        "model": folder,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 1 << 30,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
        "block_size": 64,
        "disable_log_stats": False,
    } | json.loads(more or "{}")
    if stack:
        options["additional_config"] = {"kvcomp": {"stack": stack}}
    warm = [{"prompt": list(range(100)), "tokens": 2}]
    rounds = [warm, *(requests(folder, n) for n in at_once)]
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "engine_process.py")],
        input=json.dumps({"options": options, "rounds": rounds}),
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def rates(round_: dict[str, Any], n: int) -> tuple[float, float]:
    """New tokens per second over all, and behind the last request's first token."""
    written, at = round_["written"], round_["at"]
    assert written[-1] == n * TOKENS
    started = round_["prompts_in"]
    return written[-1] / at[-1], (written[-1] - written[started]) / (at[-1] - at[started])


def main() -> None:
    from kvcomp.integrations.models import converted

    parser = ArgumentParser()
    parser.add_argument("-n", default="1,4,16")
    parser.add_argument("stacks", nargs="*")
    given = parser.parse_args()
    at_once = [int(n) for n in given.n.split(",")]
    folder = str(converted("smollm2-135m"))
    heads = "".join(f" all, {n} | decode, {n} |" for n in at_once)
    print(f"| stack |{heads}\n|---|{'---|' * 2 * len(at_once)}", flush=True)
    for stack in given.stacks or STACKS:
        result = measured(stack, folder, at_once)
        if "error" in result:
            print(f"| {stack} | {result['error']} |", flush=True)
            continue
        found = [rates(r, n) for r, n in zip(result["rounds"][1:], at_once, strict=True)]
        cells = "".join(f" {every:.1f} | {decode:.1f} |" for every, decode in found)
        print(f"| {stack or 'vLLM alone'} |{cells}", flush=True)


if __name__ == "__main__":
    main()
