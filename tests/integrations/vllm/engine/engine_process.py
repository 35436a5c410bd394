"""vLLM engines, one after another, in a process of their own: a line on stdin asks for one, a line on stdout answers.

A question is {"options": arguments of vllm.LLM, "rounds": [[{"prompt": [token ids], "tokens": how many to generate,
"abort_after": generated tokens after which the request is aborted, or null, "margins": whether they are asked for,
"alone": whether it reads nothing from the prefix cache, "prompt_logprobs": whether they are asked for}]]}.
The answer is {"error"} where the engine refused to start, or {"capacity": tokens, as vLLM reports it, "block_size",
"rounds": [{"outputs": [[token ids]], "margins": [[nats between each token and the next best]], "cached": [prompt tokens
found in the prefix cache], "prompts": [[log-probability of each token of a prompt but the first]], "held": [blocks in
use after each step], "written": [tokens of all requests after each step], "at": [seconds of processor time from the
start to the end of each step], "wall": [seconds by the clock], "prompts_in": the step after which each request has a
token}], "metrics": {name: value}}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def _margin(tokens: dict[int, Any]) -> float:
    best, second = sorted((token.logprob for token in tokens.values()), reverse=True)[:2]
    return best - second


def run(engine: Any, requests: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """All requests at once, greedily, until each has as many tokens as it asked for or was aborted."""
    from vllm import SamplingParams

    names = [f"{number}-{i}" for i in range(len(requests))]
    for name, request in zip(names, requests, strict=True):
        logprobs = 2 if request.get("margins") else None
        params = SamplingParams(
            temperature=0,
            max_tokens=request["tokens"],
            ignore_eos=True,
            logprobs=logprobs,
            prompt_logprobs=0 if request.get("prompt_logprobs") else None,
            skip_reading_prefix_cache=request.get("alone"),
            detokenize=False,
        )
        engine.add_request(name, {"prompt_token_ids": request["prompt"]}, params)
    aborts = {name: r["abort_after"] for name, r in zip(names, requests, strict=True) if r.get("abort_after")}
    outputs: dict[str, list[int]] = {name: [] for name in names}
    margins: dict[str, list[float]] = {name: [] for name in names}
    cached = dict.fromkeys(names, 0)
    prompts: dict[str, list[float]] = {name: [] for name in names}
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    held, written, at, wall, start, begun = [], [], [], [], time.process_time(), time.perf_counter()
    prompts_in: int | None = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            new = output.outputs[0]
            outputs[output.request_id] = list(new.token_ids)
            margins[output.request_id] = [_margin(tokens) for tokens in new.logprobs or ()]
            cached[output.request_id] = output.num_cached_tokens or 0
            given = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=False)
            prompts[output.request_id] = [tokens[token].logprob for token, tokens in given]
            if len(outputs[output.request_id]) >= aborts.get(output.request_id, sys.maxsize):
                engine.abort_request([output.request_id])
                del aborts[output.request_id]
        held.append(pool.num_gpu_blocks - pool.get_num_free_blocks() - 1)  # block 0 is nobody's
        if prompts_in is None and all(outputs.values()):
            prompts_in = len(at)
        written.append(sum(map(len, outputs.values())))
        at.append(time.process_time() - start)
        wall.append(time.perf_counter() - begun)
    return {
        "outputs": [outputs[name] for name in names],
        "margins": [margins[name] for name in names],
        "cached": [cached[name] for name in names],
        "prompts": [prompts[name] for name in names],
        "held": held,
        "written": written,
        "prompts_in": prompts_in,
        "at": at,
        "wall": wall,
    }


def answer(given: dict[str, Any]) -> dict[str, Any]:
    """What comes of one question; the engine is gone after it."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.v1.attention.selector import _cached_get_attn_backend

    _cached_get_attn_backend.cache_clear()  # it knows nothing of stacks
    try:
        llm = LLM(**given["options"])
    except Exception as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        cleanup_dist_env_and_memory()
        return {"error": " | ".join(str(cause) for cause in causes)}
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    result = {
        "capacity": cache.kv_cache_size_tokens,
        "block_size": cache.block_size,
        "rounds": [run(engine, requests, i) for i, requests in enumerate(given["rounds"])],
        "metrics": {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")},
    }
    engine.engine_core.shutdown()
    del llm, engine
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where vLLM writes its log
    for question in sys.stdin:
        print(json.dumps(answer(json.loads(question))), file=answers, flush=True)


if __name__ == "__main__":
    main()
