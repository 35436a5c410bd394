"""Prompts, answered from the cache of each stack: what a run repeats for every sample, or several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvcomp import CompressedCache, Stack
from kvcomp.benchmarks.decoding import Agreement, Answer, Decoding, Reader, Surprise, run_all
from kvcomp.benchmarks.fidelity import Fidelity, dense_logits
from kvcomp.benchmarks.perplexity import Perplexity
from kvcomp.benchmarks.results import ACCURACY, FIDELITY, NLL, Record
from kvcomp.benchmarks.samples import Sample, TaskError
from kvcomp.benchmarks.settings import end_tokens
from kvcomp.benchmarks.tasks import find_task
from kvcomp.integrations.huggingface import prefill
from kvcomp.integrations.huggingface.forward import with_cache
from kvcomp.integrations.huggingface.timing import clock


def answer(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    context: int,
    stacks: Sequence[Stack],
    max_new_tokens: int | None,
    prefill_chunk: int | None = None,
    context_first: bool = False,
) -> Iterator[Record]:
    """`answer_all` of one sample."""
    how = max_new_tokens, prefill_chunk, context_first
    yield from answer_all(model, tokenizer, [(sample, stacks)], context, *how)


@torch.inference_mode()
def answer_all(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[Sample, Sequence[Stack]]],
    context: int,
    max_new_tokens: int | None,
    prefill_chunk: int | None = None,
    context_first: bool = False,
) -> Iterator[Record]:
    """Yield a record per sample and stack, each as soon as it is done.

    One dense prefill of all tokens of a sample but the last fills every cache that can share it; the last prompt token
    is then the first one that each stack decodes, so that every token of the answer comes from its compressed pages. Of
    a text whose end is scored, the prompt is what stands before that end. The peak of memory is that of decoding alone:
    the prefill is shared. Samples are prefilled one after the other and then decoded together, each as if alone.

    context_first: the prefill is of what stands before the question, which every stack reads afterwards, by itself. The
    tokens are the same.

    Raises:
        TaskError: context_first, and a prompt that has no question after its context.
    """
    decodings: list[Decoding] = []
    records: dict[int, Callable[[], Record]] = {}
    for sample, stacks in asked:
        how = max_new_tokens, prefill_chunk, context_first
        for decoding, record in _begin(model, tokenizer, sample, context, stacks, *how):
            decodings.append(decoding)
            records[id(decoding)] = record
    for decoding in run_all(model, decodings):
        yield records.pop(id(decoding))()


def _begin(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    context: int,
    stacks: Sequence[Stack],
    max_new_tokens: int | None,
    prefill_chunk: int | None,
    context_first: bool,
) -> list[tuple[Decoding, Callable[[], Record]]]:
    """Prefill a sample; for each stack what is to be decoded, and what makes its record once that is done."""
    task = find_task(sample.task)
    ids = tokenizer(sample.prompt, return_tensors="pt").input_ids.to(model.device)  # [1, L]
    limit = min(sample.max_new_tokens, max_new_tokens or sample.max_new_tokens)
    rest = ids[:, :0]
    if isinstance(task, Perplexity):
        ids, rest = ids.split([ids.shape[1] - sample.max_new_tokens, sample.max_new_tokens], dim=1)
    caches = [CompressedCache(stack, model) for stack in stacks]
    compared = [CompressedCache("none", model)] if isinstance(task, Fidelity) else []
    known = ids.shape[1] - 1
    if context_first and not isinstance(task, Perplexity):
        known = context_tokens(tokenizer, sample, ids[0].tolist())
    filled = prefill(model, ids[:, :known], [*caches, *compared], tokenizer=tokenizer, chunk=prefill_chunk)
    asked_s = [_read(model, ids[:, known:-1], cache) for cache in caches]
    ends = end_tokens(model.generation_config.eos_token_id, tokenizer)

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    first = int(ids[0, -1])
    forced = [first, *rest[0, :limit].tolist()]
    dense = [dense_logits(model, cache, forced) for cache in compared]
    compared.clear()

    def reader() -> Reader:
        if dense:
            return Agreement(forced, dense[0])
        if isinstance(task, Perplexity):
            return Surprise(forced)
        asked = task

        def finished(tokens: list[int]) -> bool:
            return tokens[-1] in ends or asked.stop(text(tokens), sample)

        return Answer(first, limit, finished, text, lambda prediction: asked.score(prediction, sample))

    decodings = [Decoding(cache, reader()) for cache in caches]

    def record(at: int) -> Record:
        decoding, cache = decodings[at], caches[at]
        holds, traffic = cache.memory(), cache.traffic()
        return Record(
            task=sample.task,
            context=context,
            index=sample.index,
            stack=str(stacks[at]),
            hash=stacks[at].hash,
            score=decoding.reader.score,
            prediction=decoding.reader.prediction,
            references=list(sample.references),
            classes=list(sample.classes) or None,
            depth=sample.depth,
            tags=list(sample.tags),
            origin=sample.origin,
            prompt_tokens=ids.shape[1],
            new_tokens=decoding.reader.steps,
            effective_bits=holds.effective_bits,
            held=holds.held,
            held_dense=holds.dense,
            read=traffic.read,
            read_dense=traffic.dense,
            ms_per_token=decoding.ms_per_token,
            prefill_s=filled[at].dense_s,
            prefill_own_s=filled[at].own_s + asked_s[at],
            peak=decoding.peak,
            metric=FIDELITY if dense else NLL if isinstance(task, Perplexity) else ACCURACY,
            **_by_token(decoding.reader),
        )

    return [(decoding, partial(record, at)) for at, decoding in enumerate(decodings)]


def context_tokens(tokenizer: Any, sample: Sample, ids: list[int]) -> int:
    """How many tokens of a prompt lie before its question; one that holds parts of both is the question's.

    Raises:
        TaskError: there is no question after a context.
    """
    if sample.question is None:
        raise TaskError(
            f"context-first: {sample.task} has prompts without a question after their context: leave out the task, or "
            "--context-first."
        )
    before = tokenizer(sample.prompt[: len(sample.prompt) - sample.question]).input_ids
    same = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    return min(max(same, 2), len(ids) - 1)


def _read(model: Any, ids: Tensor, cache: CompressedCache) -> float:
    """Feed tokens ids [1, n] to a model with a cache; the seconds that it took."""
    if not ids.shape[1]:
        return 0.0
    begun = clock(ids.device)
    model(ids, **with_cache(model, cache), use_cache=True, logits_to_keep=1)
    return clock(ids.device) - begun


def _by_token(reader: Reader) -> dict[str, Any]:
    """What a record of fidelity has for each token."""
    if not isinstance(reader, Agreement):
        return {}
    return {"kl": _rounded(reader.kl), "overlap": _rounded(reader.overlap), "top1": reader.top1}


def _rounded(figures: Sequence[float]) -> list[float]:
    return [round(figure, 7) for figure in figures]
