"""The paired run: every prompt is prefilled once, densely, and then answered from the cache of each stack.

A stack that takes its prompt in chunks (`Stack.prefill_chunk`) is prefilled by itself instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from kvcomp import Stack
from kvcomp.benchmarks.answering import answer
from kvcomp.benchmarks.compare import Comparison
from kvcomp.benchmarks.machine import machine, versions
from kvcomp.benchmarks.preparing import misfits, require_positions, settle_model
from kvcomp.benchmarks.records import left_out
from kvcomp.benchmarks.report import publish, require_libraries
from kvcomp.benchmarks.results import ACCURACY, FIDELITY, NLL, Record, Results, Run, RunError, locked, write_text
from kvcomp.benchmarks.settings import HUGGING_FACE, Settings, as_options, flat
from kvcomp.benchmarks.tasks import find_task, origins
from kvcomp.console import progress, waiting
from kvcomp.integrations.huggingface.fingerprint import fingerprint
from kvcomp.integrations.huggingface.models import load_model, on_disk
from kvcomp.text import quote

Missing = dict[tuple[str, int], dict[int, list[Stack]]]  # stacks by task and context, and by the index of a sample
WORDS = {ACCURACY: "right", NLL: "perplexity", FIDELITY: "1 - TVD"}
SINCE = ("context_first",)  # settings that runs of older versions do not have: noted where they are on
APART = ("data", "engine", "named")  # settings that a configuration says elsewhere: in "data", "versions", "left_out"


def run(settings: Settings, out: Path, console: Console, command: str) -> Comparison:
    """Measure what `out` does not hold yet, and write `summary.csv` and `report.html` beside the samples.

    A task of a group that does not fit a context is left out there, and said so.

    Raises:
        RunError: `out` holds another run or answers of another model, is being written by another process or cannot be
            written, or a context is longer than the model's.
        TaskError: a task that was named does not fit a context.
    """
    require_libraries()
    with locked(out):
        return _run(settings, out, console, command)


def _run(settings: Settings, out: Path, console: Console, command: str) -> Comparison:
    stacks = [Stack.parse(stack) for stack in settings.stacks]
    config = {
        "command": command,
        "settings": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in flat(settings).items()
            if name not in APART and (value or name not in SINCE)
        },
        "data": origins(settings.tasks, settings.data),  # the texts themselves, wherever they lie
        "versions": versions(settings.engine),
        "machine": machine(),
    }
    results = Results(out, config)
    _require_same_files(results, stacks)
    done = {record.key for record in results.records}
    missing = _missing(settings, stacks, results)
    if missing:
        require_positions(settings.model, settings.contexts, settings.loading)
        found = misfits(settings, [place for place in missing if not _is_started(place, results)])
        results.note(left_out=[*results.config.get("left_out", []), *found])
        missing = _missing(settings, stacks, results)
    for line in left_out(results.config):
        console.print(line, soft_wrap=True)
    if done:
        console.print(f"{out} already holds {len(done)} answers; they are kept.", soft_wrap=True)
    if missing:
        measure = _measure if settings.engine == HUGGING_FACE else _measure_by_stack
        measure(settings, missing, results, console)
    write_text(out / "config.yaml", yaml.safe_dump(as_options(settings), sort_keys=False, width=200))
    return publish([Run(out, results.config, results.records)], out)


def _missing(settings: Settings, stacks: Sequence[Stack], results: Results) -> Missing:
    """The stacks that have not answered yet."""
    done = {record.key for record in results.records}
    absent = {(left["task"], left["context"]) for left in results.config.get("left_out", [])}
    counts = {task: find_task(task).count(settings.samples, settings.data) for task in settings.tasks}
    return {
        (task, context): wanted
        for context in settings.contexts
        for task in settings.tasks
        if (task, context) not in absent
        and (
            wanted := {
                index: todo
                for index in range(counts[task])
                if (todo := [s for s in stacks if (task, context, index, s.hash) not in done])
            }
        )
    }


def _is_started(place: tuple[str, int], results: Results) -> bool:
    """Whether a task fitted that context before."""
    return any((record.task, record.context) == place for record in results.records)


def _require_same_files(results: Results, stacks: Sequence[Stack]) -> None:
    """Raise RunError where answers were given with another calibration file of the same name."""
    hashes = {str(stack): stack.hash for stack in stacks}
    for record in results.records:
        if hashes.get(record.stack, record.hash) != record.hash:
            raise RunError(
                f"out: {quote(str(results.folder))} holds answers of {quote(record.stack)} with another calibration "
                "file. Nothing was overwritten; choose another --out."
            )


def _measure(
    settings: Settings,
    missing: Missing,
    results: Results,
    console: Console,
) -> None:
    with waiting(f"Loading {settings.model}"):
        model, tokenizer = load_model(settings.model, settings.loading)
    settle_model(results, fingerprint(model, settings.model))
    total = sum(len(stacks) for wanted in missing.values() for stacks in wanted.values())
    with progress(console=console) as shown:
        bar = shown.add_task("writing prompts", total=total)
        for (name, context), wanted in missing.items():
            task = find_task(name, settings.chat)
            samples = task.generate(tokenizer, context, settings.samples, settings.seed, settings.data)
            for index, stacks in wanted.items():
                shown.update(bar, description=f"{name} {context}, sample {index + 1} of {len(samples)}")
                scores: dict[str, str] = {}
                dense_s = own_s = 0.0
                how = settings.max_new_tokens, settings.prefill_chunk, settings.context_first
                for record in answer(model, tokenizer, samples[index], context, stacks, *how):
                    results.append(record)
                    metric = record.metric
                    scores[record.hash] = _score(record)
                    dense_s, own_s = max(dense_s, record.prefill_s), own_s + (record.prefill_own_s or 0.0)
                    shown.advance(bar)
                console.print(
                    f"{name} {context}, sample {index + 1}: {record.prompt_tokens} tokens, "
                    f"prefill {dense_s + own_s:.1f} s, "
                    f"{WORDS[metric]}: {' '.join(scores[stack.hash] for stack in stacks)}",
                    soft_wrap=True,
                )


def _measure_by_stack(
    settings: Settings,
    missing: Missing,
    results: Results,
    console: Console,
) -> None:
    """As `_measure`, one stack after the other: each has an engine of its own, and they share no prefill."""
    from kvcomp.benchmarks import vllm_engine

    settle_model(results, on_disk(settings.model, settings.loading))
    for stack in dict.fromkeys(stack for wanted in missing.values() for todo in wanted.values() for stack in todo):
        console.print(f"Starting {settings.engine} for {stack} ...", soft_wrap=True)
        wanted = {
            where: [index for index, stacks in todo.items() if stack in stacks] for where, todo in missing.items()
        }
        for record in vllm_engine.answers(settings, stack, wanted):
            results.append(record)
            console.print(
                f"{record.task} {record.context}, sample {record.index + 1}: {record.prompt_tokens} tokens, "
                f"prefill {record.prefill_own_s:.1f} s, {WORDS[record.metric]}: {_score(record)}",
                soft_wrap=True,
            )


def _score(record: Record) -> str:
    if record.metric == NLL:
        return f"{math.exp(record.score):.2f}"
    return f"{record.score:.1%}" if record.metric == FIDELITY else f"{record.score:.0%}"
