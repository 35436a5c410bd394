"""The paired run: every prompt is prefilled once, densely, and then answered from the cache of each stack.

A stack that takes its prompt in chunks (`Stack.prefill_chunk`) is prefilled by itself instead.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvcomp import CompressedCache, Stack
from kvcomp.benchmarks import memory
from kvcomp.benchmarks.compare import Comparison
from kvcomp.benchmarks.perplexity import Perplexity
from kvcomp.benchmarks.report import publish, require_libraries
from kvcomp.benchmarks.results import ACCURACY, NLL, Record, Results, Run, RunError
from kvcomp.benchmarks.samples import Sample, Task
from kvcomp.benchmarks.tasks import expand, find_task, origins
from kvcomp.integrations.huggingface import prefill
from kvcomp.integrations.huggingface.timing import clock
from kvcomp.integrations.models import load_model


@dataclass(frozen=True)
class Settings:
    """What is measured.

    max_new_tokens: caps the new tokens of every task, and the scored ones of a text; None leaves each task its own.
    data: where the texts of tasks come from, see `kvcomp.benchmarks.data`.
    chat: put the prompts of LongBench into the model's chat template, save those of its few-shot and code tasks.
    """

    model: str
    tasks: tuple[str, ...]
    contexts: tuple[int, ...]
    samples: int
    stacks: tuple[str, ...]
    seed: int = 0
    max_new_tokens: int | None = None
    data: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        tasks = expand(self.tasks, self.data)
        for argument, value in (("samples", self.samples), ("max-new-tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise RunError(f"{argument}: {value} is less than 1.")
        for argument, values in (("task", tasks), ("context", self.contexts), ("stack", self.stacks)):
            if not values:
                raise RunError(f"{argument}: at least one is needed.")
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "contexts", tuple(sorted(set(self.contexts))))
        object.__setattr__(self, "stacks", tuple(dict.fromkeys(str(Stack.parse(stack)) for stack in self.stacks)))


def run(settings: Settings, out: Path, console: Console, command: str) -> Comparison:
    """Measure what `out` does not hold yet, and write `summary.csv` and `report.html` beside the samples.

    Raises RunError when `out` holds another run or cannot be written, or when a context is longer than the model's.
    """
    require_libraries()
    stacks = [Stack.parse(stack) for stack in settings.stacks]
    config = {
        "command": command,
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items() if k != "data"},
        "data": origins(settings.tasks, settings.data),  # the texts themselves, wherever they lie
        "versions": _versions(),
        "machine": _machine(),
    }
    results = Results(out, config)
    done = {record.key for record in results.records}
    counts = {task: find_task(task).count(settings.samples, settings.data) for task in settings.tasks}
    missing = {
        (task, context): wanted
        for context in settings.contexts
        for task in settings.tasks
        if (
            wanted := {
                index: todo
                for index in range(counts[task])
                if (todo := [s for s in stacks if (task, context, index, s.hash) not in done])
            }
        )
    }
    if done:
        console.print(f"{out} already holds {len(done)} answers; they are kept.")
    if missing:
        _measure(settings, missing, results, console)
    return publish([Run(out, results.config, results.records)], out)


def _measure(
    settings: Settings,
    missing: dict[tuple[str, int], dict[int, list[Stack]]],
    results: Results,
    console: Console,
) -> None:
    console.print(f"Loading {settings.model} ...")
    model, tokenizer = load_model(settings.model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max(settings.contexts) > limit:
        raise RunError(f"context: {max(settings.contexts)} is more than the {limit} tokens of {settings.model}.")
    for name, context in missing:  # what cannot be written is better known before hours of measuring
        find_task(name, settings.chat).generate(tokenizer, context, 1, settings.seed, settings.data)
    total = sum(len(stacks) for wanted in missing.values() for stacks in wanted.values())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("writing prompts", total=total)
        for (name, context), wanted in missing.items():
            task = find_task(name, settings.chat)
            samples = task.generate(tokenizer, context, settings.samples, settings.seed, settings.data)
            for index, stacks in wanted.items():
                progress.update(bar, description=f"{name} {context}, sample {index + 1} of {len(samples)}")
                scores, dense_s, own_s = [], 0.0, 0.0
                for record in answer(model, tokenizer, samples[index], context, stacks, settings.max_new_tokens):
                    results.append(record)
                    scores.append(
                        f"{record.score:.0%}" if record.metric == ACCURACY else f"{math.exp(record.score):.2f}"
                    )
                    dense_s, own_s = max(dense_s, record.prefill_s), own_s + (record.prefill_own_s or 0.0)
                    progress.advance(bar)
                console.print(
                    f"{name} {context}, sample {index + 1}: {record.prompt_tokens} tokens, "
                    f"prefill {dense_s + own_s:.1f} s, "
                    f"{'right' if record.metric == ACCURACY else 'perplexity'}: {' '.join(scores)}",
                    highlight=False,
                    soft_wrap=True,
                )


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    context: int,
    stacks: Sequence[Stack],
    max_new_tokens: int | None,
) -> Iterator[Record]:
    """Yield a record per stack.

    One dense prefill of all tokens but the last fills every cache that can share it; the last prompt token is then
    the first one that each stack decodes, so that every token of the answer comes from its compressed pages. Of a
    text whose end is scored, the prompt is what stands before that end. The peak of memory is that of decoding alone:
    the prefill is shared.
    """
    task = find_task(sample.task)
    ids = tokenizer(sample.prompt, return_tensors="pt").input_ids.to(model.device)  # [1, L]
    limit = min(sample.max_new_tokens, max_new_tokens or sample.max_new_tokens)
    rest = ids[:, :0]
    if isinstance(task, Perplexity):
        ids, rest = ids.split([ids.shape[1] - sample.max_new_tokens, sample.max_new_tokens], dim=1)
    caches = [CompressedCache(stack, model) for stack in stacks]
    filled = prefill(model, ids[:, :-1], caches)
    for stack, (_, dense_s, own_s) in zip(stacks, filled, strict=True):
        cache = caches.pop(0)
        begun = cache.memory().held
        growth = memory.watch(model.device)
        if isinstance(task, Perplexity):
            outcome = _scored(model, torch.cat([ids[:, -1:], rest[:, :limit]], dim=1), cache)
        else:
            outcome = _answered(model, tokenizer, task, sample, ids[:, -1:], cache, limit)
        grown = growth()
        holds, traffic = cache.memory(), cache.traffic()
        del cache  # its pages are free before the next stack decodes
        yield Record(
            task=sample.task,
            context=context,
            index=sample.index,
            stack=str(stack),
            hash=stack.hash,
            score=outcome.score,
            prediction=outcome.prediction,
            references=list(sample.references),
            depth=sample.depth,
            tags=list(sample.tags),
            origin=sample.origin,
            prompt_tokens=ids.shape[1],
            new_tokens=len(outcome.seconds),
            effective_bits=holds.effective_bits,
            held=holds.held,
            held_dense=holds.dense,
            read=traffic.read,
            read_dense=traffic.dense,
            ms_per_token=1000 * statistics.median(outcome.seconds),
            prefill_s=dense_s,
            prefill_own_s=own_s,
            peak=None if grown is None else begun + grown,
            metric=NLL if isinstance(task, Perplexity) else ACCURACY,
        )


class _Outcome(NamedTuple):
    """What a stack made of a sample. seconds: of every decode step."""

    prediction: str
    score: float
    seconds: list[float]


def _answered(
    model: Any, tokenizer: Any, task: Task, sample: Sample, token: torch.Tensor, cache: Any, limit: int
) -> _Outcome:
    ends = _end_tokens(model, tokenizer)

    def finished(tokens: list[int]) -> bool:
        if tokens[-1] in ends:
            return True
        return task.stop(tokenizer.decode(tokens, skip_special_tokens=True), sample)

    tokens, seconds = decode(model, token, cache, limit, finished)
    prediction = tokenizer.decode(tokens, skip_special_tokens=True)
    return _Outcome(prediction, task.score(prediction, sample), seconds)


def _scored(model: Any, tokens: torch.Tensor, cache: Any) -> _Outcome:
    """Feed `tokens [1, n + 1]` one by one; the score is the mean nll of all but the first, in nats."""
    surprise, seconds = 0.0, []
    for at in range(tokens.shape[1] - 1):
        start = clock(model.device)
        logits = model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True).logits  # [1, 1, V]
        surprise -= float(logits[0, -1].float().log_softmax(-1)[tokens[0, at + 1]])
        seconds.append(clock(model.device) - start)
    return _Outcome("", surprise / len(seconds), seconds)


def decode(
    model: Any, token: torch.Tensor, cache: Any, limit: int, finished: Callable[[list[int]], bool]
) -> tuple[list[int], list[float]]:
    """Decode greedily from `token [1, 1]`; return the new tokens and the seconds that each step took."""
    tokens: list[int] = []
    seconds: list[float] = []
    while len(tokens) < limit and not (tokens and finished(tokens)):
        start = clock(model.device)
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits  # [1, 1, V]
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(token))
        seconds.append(clock(model.device) - start)
    return tokens, seconds


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return ends - {None}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("kvcomp", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
