"""`kvcomp bench --engine vllm`: the same prompts answered by vLLM with kvcomp's plugin, one request at a time.

A stack has an engine in a process of its own, as vLLM keeps the backend of a process's first. As in the other engine,
the last token of a prompt is the first one that is decoded: a request is the prompt without it, whose first new token
is forced to be that one. So is every token of a text whose end is scored; vLLM says its likelihood before it is forced.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvcomp import Stack
from kvcomp.benchmarks.perplexity import Perplexity
from kvcomp.benchmarks.results import ACCURACY, NLL, Record, RunError
from kvcomp.benchmarks.samples import Sample
from kvcomp.benchmarks.settings import Settings, end_tokens
from kvcomp.benchmarks.tasks import find_task
from kvcomp.errors import KvcompError
from kvcomp.integrations.huggingface.models import load_tokenizer, locate
from kvcomp.integrations.huggingface.shapes import model_shape
from kvcomp.ledger import MIB

from .vllm_forcing import FORCED, forcing

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # as `load_model` has it
Wanted = dict[tuple[str, int], list[int]]  # places of samples by task and context
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the blocks in use and the bytes read are seen from here
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def answers(settings: Settings, stack: Stack, wanted: Wanted) -> Iterator[Record]:
    """Yield a record per sample, each as soon as it is done.

    Raises:
        KvcompError: what vLLM or the plugin refuses, or a process that ended before its time.
    """
    if find_spec("vllm") is None:
        raise RunError('engine: vllm is not installed: pip install "kvcomp[vllm]", or leave out --engine.')
    context = get_context("spawn")
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_process, args=(theirs, log, settings, stack, wanted), daemon=True)
        process.start()
        theirs.close()
        try:
            while (said := _next(ours, log)) is not None:
                if isinstance(said, KvcompError):
                    raise said
                yield said
            process.join(60)
        finally:
            process.terminate()
            process.join()


def _next(connection: Connection, log: Path) -> Any:
    try:
        return connection.recv()
    except EOFError:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise RunError(f"engine: the process of vllm ended before its time: {lines[-1]}") from None


def _process(connection: Connection, log: Path, settings: Settings, stack: Stack, wanted: Wanted) -> None:
    """What the process of an engine does: send records, and None after them, or the error that ends it."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        for record in _answers(settings, stack, wanted):
            connection.send(record)
        connection.send(None)
    except KvcompError as error:
        connection.send(error)
    finally:
        connection.close()


def _answers(settings: Settings, stack: Stack, wanted: Wanted) -> Iterator[Record]:
    tokenizer = load_tokenizer(settings.model, settings.loading)
    samples: list[tuple[int, Sample]] = []
    for (name, context), places in wanted.items():
        task = find_task(name, settings.chat)
        written = task.generate(tokenizer, context, settings.samples, settings.seed, settings.data)
        samples += [(context, written[place]) for place in places]
    _check(settings)
    engine = Engine(settings, stack)
    ends = end_tokens(engine.end_tokens, tokenizer)
    text = partial(tokenizer.decode, skip_special_tokens=True)
    for context, sample in samples:
        ids = tokenizer(sample.prompt).input_ids
        limit = min(sample.max_new_tokens, settings.max_new_tokens or sample.max_new_tokens)
        yield _record(engine, stack, context, sample, ids, limit, ends, text)


def _record(
    engine: Engine,
    stack: Stack,
    context: int,
    sample: Sample,
    ids: list[int],
    limit: int,
    ends: set[int],
    text: Callable[[list[int]], str],
) -> Record:
    task = find_task(sample.task)
    if isinstance(task, Perplexity):
        split = len(ids) - sample.max_new_tokens
        forced = ids[split - 1 : split + limit]
        done = engine.answer(ids[: split - 1], forced, lambda tokens: len(tokens) == limit)
        score, prediction, metric, prompt = -statistics.fmean(done.likelihoods[1:]), "", NLL, split
    else:
        asked = task

        def finished(tokens: list[int]) -> bool:
            return len(tokens) == limit or tokens[-1] in ends or asked.stop(text(tokens), sample)

        done = engine.answer(ids[:-1], ids[-1:], finished)
        prediction, metric, prompt = text(done.tokens), ACCURACY, len(ids)
        score = task.score(prediction, sample)
    tokens = prompt - 1 + len(done.tokens)  # the last one is not in the cache
    dense = tokens * engine.token_bytes
    return Record(
        task=sample.task,
        context=context,
        index=sample.index,
        stack=str(stack),
        hash=stack.hash,
        score=score,
        prediction=prediction,
        references=list(sample.references),
        classes=list(sample.classes) or None,
        depth=sample.depth,
        tags=list(sample.tags),
        origin=sample.origin,
        prompt_tokens=prompt,
        new_tokens=len(done.tokens),
        effective_bits=8 * done.held * DTYPE.itemsize / dense,
        held=done.held,
        held_dense=dense,
        read=done.read,
        read_dense=dense,
        ms_per_token=1000 * statistics.median(done.steps),
        prefill_s=0.0,
        prefill_own_s=done.prefill,
        metric=metric,
    )


@dataclass
class Done:
    """One request: its new tokens after the prompt's last one, the log-likelihood of every new token, seconds of the
    prefill and of each decode step, bytes held at the end, and bytes that the last step read."""

    tokens: list[int] = field(default_factory=list)
    likelihoods: list[float] = field(default_factory=list)
    prefill: float = 0.0
    steps: list[float] = field(default_factory=list)
    held: int = 0
    read: int = 0


class Engine:
    """vLLM with one stack, in this process."""

    def __init__(self, settings: Settings, stack: Stack) -> None:
        shape = model_shape(settings.model, loading=settings.loading)
        self.token_bytes = shape.token_bytes // shape.itemsize * DTYPE.itemsize
        self.engine = _started(_options(settings, stack))
        core = self.engine.engine_core.engine_core
        self.pool = core.scheduler.kv_cache_manager.block_pool
        pools = core.scheduler.kv_cache_config.kv_cache_tensors  # one allocation, in which kinds of blocks lie mixed
        self.block_bytes = max(pool.size for pool in pools) // self.pool.num_gpu_blocks
        layers = self.engine.vllm_config.compilation_config.static_forward_context.values()
        self.attention = [layer.impl for layer in layers if hasattr(layer, "impl")]
        self.answer([0], [0], lambda tokens: True)  # what runs for the first time takes seconds

    @property
    def end_tokens(self) -> int | list[int] | None:
        """Tokens that end an answer, as the model's files say."""
        found: int | list[int] | None = self.engine.model_config.try_get_generation_config().get("eos_token_id")
        return found

    def answer(self, prompt: Sequence[int], forced: Sequence[int], finished: Callable[[list[int]], bool]) -> Done:
        """Decode greedily after a prompt and `forced`, of which the first is no part of the answer."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=None, ignore_eos=True, logprobs=0, extra_args={FORCED: list(forced)}
        )
        self.engine.add_request("answer", {"prompt_token_ids": list(prompt)}, params)
        done, over = Done(), False
        while not over:
            start = time.perf_counter()
            outputs = self.engine.step()
            seconds = time.perf_counter() - start
            blocks = self.pool.num_gpu_blocks - self.pool.get_num_free_blocks() - 1  # block 0 is nobody's
            if blocks:  # none, where the request is at its longest
                done.held = blocks * self.block_bytes
            if done.likelihoods:
                done.steps.append(seconds)
            else:
                done.prefill += seconds
            if not outputs:  # the prompt is not all in
                continue
            new = outputs[0].outputs[0]
            done.tokens = list(new.token_ids[1:])
            done.likelihoods = [of[token].logprob for token, of in zip(new.token_ids, new.logprobs, strict=True)]
            over = outputs[0].finished or bool(done.tokens and finished(done.tokens))
        self.engine.abort_request(["answer"])
        done.read = sum(attention.read() for attention in self.attention)
        return done


def _options(settings: Settings, stack: Stack) -> dict[str, Any]:
    """Arguments of vLLM's engine.

    Raises:
        RunError: a model or a context that it does not take.
    """
    source, found = locate(settings.model, settings.loading)
    if "gguf_file" in found:
        raise RunError(f"model: {settings.model!r}: --engine vllm takes an alias, a folder or a hub id, no .gguf file.")
    shape, longest = model_shape(settings.model, loading=settings.loading), max(settings.contexts)
    if shape.positions is not None and longest > shape.positions:
        raise RunError(f"context: {longest} is more than the {shape.positions} tokens of {settings.model}.")
    given = {
        "model": str(source),
        "dtype": str(DTYPE).removeprefix("torch."),
        "enforce_eager": True,
        "max_model_len": longest,
        "max_num_seqs": 1,
        "max_num_batched_tokens": settings.prefill_chunk or longest,
        "block_size": stack.page_size,
        "enable_prefix_caching": False,
        "logits_processors": [forcing()],
        "additional_config": {"kvcomp": {"stack": str(stack)}},
        **found,
        "tokenizer_revision": settings.loading.revision,
    }
    if not torch.cuda.is_available():
        token_bytes = shape.token_bytes // shape.itemsize * DTYPE.itemsize
        given["kv_cache_memory_bytes"] = 2 * longest * token_bytes + 64 * MIB
    return given


def _check(settings: Settings) -> None:
    """Raise what the plugin refuses of any stack, before the first is measured."""
    from vllm.engine.arg_utils import EngineArgs

    from kvcomp.integrations.vllm.checks import accepted

    for stack in map(Stack.parse, settings.stacks):
        accepted(EngineArgs(**_options(settings, stack)).create_engine_config())


def _started(options: dict[str, Any]) -> Any:
    """vLLM's engine; a refusal of the plugin as it is, and any other by its first line."""
    from vllm import LLM

    try:
        return LLM(**options).llm_engine
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KvcompError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise RunError(f"engine: vllm does not start: {str(error).splitlines()[0]}") from error
