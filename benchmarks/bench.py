"""The paired run: every prompt is prefilled once, densely, and then answered from the cache of each stack.

A stack that takes its prompt in chunks (`Stack.prefill_chunk`) is prefilled by itself instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import yaml
from rich.console import Console

from kvcomp import Stack
from kvcomp.benchmarks.answering import answer_all
from kvcomp.benchmarks.compare import Comparison
from kvcomp.benchmarks.machine import machine, versions
from kvcomp.benchmarks.merging import adopt
from kvcomp.benchmarks.preparing import misfits, require_positions, settle_model
from kvcomp.benchmarks.records import left_out
from kvcomp.benchmarks.report import publish, require_libraries
from kvcomp.benchmarks.results import ACCURACY, FIDELITY, NLL, Record, Results, Run, RunError, locked, write_text
from kvcomp.benchmarks.settings import HUGGING_FACE, Settings, as_options, flat
from kvcomp.benchmarks.shards import Shard
from kvcomp.benchmarks.tasks import find_task, origins
from kvcomp.benchmarks.workers import Job, answers, require_workers
from kvcomp.console import progress, waiting
from kvcomp.fingerprint import Fingerprint
from kvcomp.integrations.huggingface.fingerprint import fingerprint
from kvcomp.integrations.huggingface.models import load_model, on_disk
from kvcomp.text import quote

Missing = dict[tuple[str, int], dict[int, list[Stack]]]  # stacks by task and context, and by the index of a sample
MOST = 4096  # samples that are decoded together
WORDS = {ACCURACY: "right", NLL: "perplexity", FIDELITY: "1 - TVD"}
SINCE = ("context_first",)  # settings that runs of older versions do not have: noted where they are on
APART = ("data", "engine", "named")  # settings that a configuration says elsewhere: in "data", "versions", "left_out"


def run(
    settings: Settings,
    out: Path,
    console: Console,
    command: str,
    *,
    shard: Shard | None = None,
    workers: int = 1,
    batch: int = 1,
) -> Comparison:
    """Measure what `out` does not hold yet, and write `summary.csv` and `report.html` beside the samples.

    A task of a group that does not fit a context is left out there, and said so. Answers of shards in `out` are taken
    into the run.

    shard: measure this part of the run alone, into its folder in `out`.
    workers: processes that answer, each with the model.
    batch: samples of a task that are decoded together; their caches are all held at once.

    Raises:
        RunError: `out` holds another run or answers of another model, is being written by another process or cannot be
            written, or a context is longer than the model's.
        TaskError: a task that was named does not fit a context.
    """
    require_libraries()
    require_workers(workers, settings)
    _require_batch(batch, workers, settings)
    folder = out / shard.folder if shard else out
    with locked(folder):
        return _run(settings, folder, console, command, shard, workers, batch)


def _run(
    settings: Settings, out: Path, console: Console, command: str, shard: Shard | None, workers: int, batch: int
) -> Comparison:
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
    if shard:
        config["shard"] = str(shard)
    results = Results(out, config)
    there = results.config.get("shard")
    if there != config.get("shard"):
        raise RunError(f"out: {quote(str(out))} holds shard {there} of a run: give its folder's, and --shard {there}.")
    if not shard:
        adopt(results)
    _require_same_files(results, stacks)
    done = {record.key for record in results.records}
    missing = _missing(settings, stacks, results, shard)
    if missing:
        require_positions(settings.model, settings.contexts, settings.loading)
        whole = _missing(settings, stacks, results)  # shards leave out the same tasks
        found = misfits(settings, [place for place in whole if not _is_started(place, results)])
        results.note(left_out=[*results.config.get("left_out", []), *found])
        missing = _missing(settings, stacks, results, shard)
    elif shard and not done:
        raise RunError(f"shard: {shard} has nothing to answer: the run has fewer than {shard.number} samples.")
    for line in left_out(results.config):
        console.print(line, soft_wrap=True)
    if done:
        console.print(f"{out} already holds {len(done)} answers; they are kept.", soft_wrap=True)
    if missing:
        _note_workers(results, workers)
        if workers > 1:
            _measure_together(settings, missing, results, console, workers)
        elif settings.engine == HUGGING_FACE:
            _measure(settings, missing, results, console, batch)
        else:
            _measure_by_stack(settings, missing, results, console)
    write_text(out / "config.yaml", yaml.safe_dump(as_options(settings), sort_keys=False, width=200))
    return publish([Run(out, results.config, results.records)], out)


def _missing(settings: Settings, stacks: Sequence[Stack], results: Results, shard: Shard | None = None) -> Missing:
    """The stacks that have not answered yet. shard: only its samples."""
    done = {record.key for record in results.records}
    absent = {(left["task"], left["context"]) for left in results.config.get("left_out", [])}
    counts = {task: find_task(task).count(settings.samples, settings.data) for task in settings.tasks}
    missing: Missing = {}
    places = ((task, context) for context in settings.contexts for task in settings.tasks)
    samples = ((*place, index) for place in places for index in range(counts[place[0]]))
    for place, (task, context, index) in enumerate(samples):
        todo = [stack for stack in stacks if (task, context, index, stack.hash) not in done]
        if todo and (task, context) not in absent and (shard is None or shard.has(place)):
            missing.setdefault((task, context), {})[index] = todo
    return missing


def _note_workers(results: Results, workers: int) -> None:
    """Note how many processes measure a run at once, where it is not one alone all the time."""
    before = results.config.get("workers", [1] if results.records else [])
    if workers not in before and (before or workers > 1):
        results.note(workers=[*before, workers])


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


def _require_batch(batch: int, workers: int, settings: Settings) -> None:
    """Raise RunError where samples cannot be decoded together."""
    if not 1 <= batch <= MOST:
        raise RunError(f"batch: {quote(batch)} is not between 1 and {MOST}.")
    if batch > 1 and (workers > 1 or settings.engine != HUGGING_FACE):
        other = f"--workers {workers}" if workers > 1 else f"--engine {settings.engine}"
        raise RunError(f"batch: with {other}, samples are answered one by one: leave out --batch {batch}, or {other}.")


def _measure(settings: Settings, missing: Missing, results: Results, console: Console, batch: int) -> None:
    with waiting(f"Loading {settings.model}"):
        model, tokenizer = load_model(settings.model, settings.loading)
    settle_model(results, fingerprint(model, settings.model))
    total = sum(len(stacks) for wanted in missing.values() for stacks in wanted.values())
    how = settings.max_new_tokens, settings.prefill_chunk, settings.context_first
    with progress(console=console) as shown:
        bar = shown.add_task("writing prompts", total=total)
        for (name, context), wanted in missing.items():
            task = find_task(name, settings.chat)
            samples = task.generate(tokenizer, context, settings.samples, settings.seed, settings.data)
            left = list(wanted)
            while left:
                now, left = left[:batch], left[batch:]
                which = "-".join(dict.fromkeys(str(index + 1) for index in (now[0], now[-1])))
                shown.update(bar, description=f"{name} {context}, sample {which} of {len(samples)}")
                records: dict[int, list[Record]] = {}
                asked = [(samples[index], wanted[index]) for index in now]
                for record in answer_all(model, tokenizer, asked, context, *how):
                    results.append(record)
                    shown.advance(bar)
                    records.setdefault(record.index, []).append(record)
                    if len(records[record.index]) == len(wanted[record.index]):
                        _print_sample(console, records[record.index], wanted[record.index])


def _measure_together(settings: Settings, missing: Missing, results: Results, console: Console, workers: int) -> None:
    """As `_measure`, by several processes, which end with this one."""
    jobs = [
        Job(task, context, index, tuple(map(str, stacks)))
        for (task, context), wanted in missing.items()
        for index, stacks in wanted.items()
    ]
    total = sum(len(job.stacks) for job in jobs)
    console.print(f"Loading {settings.model} in {min(workers, len(jobs))} processes ...", soft_wrap=True)
    found: dict[tuple[str, int, int], list[Record]] = {}
    with progress(console=console) as shown, closing(answers(settings, jobs, workers)) as said:
        bar = shown.add_task(f"{workers} processes", total=total)
        for record in said:
            if isinstance(record, Fingerprint):
                settle_model(results, record)
                continue
            results.append(record)
            shown.advance(bar)
            records = found.setdefault((record.task, record.context, record.index), [])
            records.append(record)
            stacks = missing[record.task, record.context][record.index]
            if len(records) == len(stacks):
                _print_sample(console, records, stacks)


def _print_sample(console: Console, records: Sequence[Record], stacks: Sequence[Stack]) -> None:
    """A line for a sample that all stacks have answered."""
    scores = {record.hash: _score(record) for record in records}
    dense_s, own_s = max(r.prefill_s for r in records), sum(r.prefill_own_s or 0.0 for r in records)
    last = records[-1]
    console.print(
        f"{last.task} {last.context}, sample {last.index + 1}: {last.prompt_tokens} tokens, "
        f"prefill {dense_s + own_s:.1f} s, {WORDS[last.metric]}: {' '.join(scores[s.hash] for s in stacks)}",
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
