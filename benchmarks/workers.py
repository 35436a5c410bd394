"""`kvcomp bench --workers N`: samples answered by N processes, each with the model; the parent alone writes the run.

Processes are those of Python's multiprocessing, started anew (`spawn`, as CUDA needs it), with a pipe each: the parent
gives a process one sample at a time, and is sent each record as soon as it is there. What a process that was killed had
not sent, another one answers.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from kvcomp import Stack
from kvcomp.benchmarks.answering import answer
from kvcomp.benchmarks.results import Record, RunError
from kvcomp.benchmarks.samples import Sample
from kvcomp.benchmarks.settings import VLLM, Settings
from kvcomp.benchmarks.tasks import find_task
from kvcomp.console import note
from kvcomp.errors import KvcompError, KvcompWarning
from kvcomp.fingerprint import Fingerprint
from kvcomp.integrations.huggingface.fingerprint import fingerprint
from kvcomp.integrations.huggingface.models import load_model
from kvcomp.text import quote

MOST = 1024
PATIENCE = 10  # seconds in which a process that was told to end does


@dataclass(frozen=True)
class Job:
    """One sample, and the stacks that have to answer it."""

    task: str
    context: int
    index: int
    stacks: tuple[str, ...]


@dataclass
class _Worker:
    """A process. job: what it answers now; answered: the stacks of that which have."""

    number: int
    process: BaseProcess
    connection: Connection
    ready: bool = False
    job: Job | None = None
    answered: set[str] = field(default_factory=set)


def require_workers(workers: int, settings: Settings) -> None:
    """Refuse a number of processes that cannot be had.

    Raises:
        KvcompError: it is no such number, more than there are GPUs, the engine has processes of its own, or the model
            is spread over devices.
    """
    if not 1 <= workers <= MOST:
        raise RunError(f"workers: {quote(workers)} is not between 1 and {MOST}.")
    if workers > 1 and settings.engine == VLLM:
        raise RunError(
            f"workers: --engine {VLLM} has one process a stack, and starts no {workers}: leave out --workers, or give "
            "each job a part with --shard."
        )
    if workers > 1:
        settings.loading.refuse(("device_map",), "each of --workers has the model on one device")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and settings.loading.device is None else 0
    if workers > 1 and 0 < gpus < workers:
        raise RunError(f"workers: {workers} is more than the {gpus} GPUs here, one for each: give --workers {gpus}.")


def answers(settings: Settings, jobs: Sequence[Job], workers: int) -> Generator[Fingerprint | Record, None, None]:
    """Yield the fingerprint of each process's model, once it is loaded, and the records as they come.

    Raises:
        KvcompError: what a process raised.
        RunError: a process ended by an error of its own, or none is left.
    """
    left = deque(jobs)
    team: list[_Worker] = []
    try:
        with _uninterrupted():
            for number in range(min(workers, len(jobs))):
                team.append(_started(settings, number, workers))
        while left or any(worker.job for worker in team):
            for worker in team:
                _give(worker, left)
            ready = wait([worker.connection for worker in team])
            for worker in [worker for worker in team if worker.connection in ready]:
                try:
                    said = worker.connection.recv()
                except (EOFError, OSError):
                    team.remove(worker)
                    _bury(worker, left, len(team))
                    continue
                if isinstance(said, KvcompError):
                    raise said
                if isinstance(said, str):
                    warnings.warn(said, KvcompWarning, stacklevel=2)
                elif said is None:
                    worker.job = None
                else:
                    worker.ready = True
                    worker.answered |= {said.stack} if isinstance(said, Record) else set()
                    yield said
    finally:
        for worker in team:
            worker.connection.close()
            worker.process.terminate()
        for worker in team:
            worker.process.join(PATIENCE)
            worker.process.kill()
            worker.process.join()


def _started(settings: Settings, number: int, workers: int) -> _Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    threads = max(1, torch.get_num_threads() // workers)
    process = context.Process(target=_process, args=(theirs, settings, number, threads), daemon=True)
    process.start()
    theirs.close()
    return _Worker(number, process, ours)


def _give(worker: _Worker, left: deque[Job]) -> None:
    """Give a process that has nothing to do the next sample."""
    if left and worker.ready and worker.job is None:
        worker.job, worker.answered = left.popleft(), set()
        with suppress(OSError):  # it has just ended: reading from it says so
            worker.connection.send(worker.job)


def _bury(worker: _Worker, left: deque[Job], others: int) -> None:
    """Put what a killed process did not answer before the other samples.

    Raises:
        RunError: it was not killed but failed, or no other is there.
    """
    worker.connection.close()
    worker.process.join(PATIENCE)
    code = worker.process.exitcode
    how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    if code is None or code >= 0 or not others:
        raise RunError(
            f"workers: process {worker.number + 1} {how}, and the run with it. Finished answers are kept; the same "
            "command continues, with fewer --workers if memory was short."
        )
    note("warning", "yellow", f"process {worker.number + 1} {how}; {others} go on, and answer its sample.")
    if worker.job and (stacks := tuple(stack for stack in worker.job.stacks if stack not in worker.answered)):
        left.appendleft(replace(worker.job, stacks=stacks))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: processes that are started meanwhile never see it, and end when their parent says so."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it is started with the first process otherwise, and unblocks signals then
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _process(connection: Connection, settings: Settings, number: int, threads: int) -> None:
    """What a process does: send its model's fingerprint, then for each sample its records and None, until the parent
    is gone. Warnings are sent as text, an error of kvcomp as it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)

    def told(message: Warning | str, *_: Any, **__: Any) -> None:
        connection.send(str(message))

    warnings.showwarning = told
    try:
        for said in _said(connection, settings, number):
            connection.send(said)
    except KvcompError as error:
        with suppress(OSError):
            connection.send(error)
    except (EOFError, ConnectionError):  # of the pipe: the parent has ended
        sys.stderr.flush()
        os._exit(0)


def _said(connection: Connection, settings: Settings, number: int) -> Iterator[Fingerprint | Record | None]:
    loading = settings.loading
    if loading.device is None and torch.cuda.is_available():
        torch.cuda.set_device(number)
        loading = replace(loading, device=f"cuda:{number}")
    model, tokenizer = load_model(settings.model, loading)
    yield fingerprint(model, settings.model)
    place = ("", 0)
    samples: list[Sample] = []
    how = settings.max_new_tokens, settings.prefill_chunk, settings.context_first
    while True:
        job: Job = connection.recv()
        if place != (job.task, job.context):
            task = find_task(job.task, settings.chat)
            samples = task.generate(tokenizer, job.context, settings.samples, settings.seed, settings.data)
            place = job.task, job.context
        stacks = [Stack.parse(stack) for stack in job.stacks]
        yield from answer(model, tokenizer, samples[job.index], job.context, stacks, *how)
        yield None
