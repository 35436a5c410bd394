"""`kvcomp bench` on a tiny model, in processes of its own that may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kvcomp.benchmarks.results import Record, read_run

PRELOAD = [
    "kvcomp.cli",
    "kvcomp.benchmarks.bench",
    "matplotlib.figure",
    "scipy.stats",
    "tokenizers",
    "transformers.models.llama.modeling_llama",
]
STACKS = ("none", "kivi(bits=4)")


def arguments(model: Path, out: Path, samples: int, stacks: tuple[str, ...] = STACKS) -> list[str]:
    chosen = [part for stack in stacks for part in ("--stack", stack)]
    tasks = ["--tasks", "niah_single_1", "--context", "400", "--samples", str(samples), "--max-new-tokens", "6"]
    return ["bench", "--model", str(model), *tasks, *chosen, "--out", str(out)]


def start(args: list[str], log: Path) -> BaseProcess:
    """Run the command in a process that begins with all modules loaded; what it says goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_command, args=(args, str(log)))
    process.start()
    return process


def _command(args: list[str], log: str) -> None:
    with open(log, "a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch

    from kvcomp.cli.app import app

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background processes ignore it
    torch.set_num_threads(1)
    sys.argv = ["kvcomp", *args]
    app(args)


def finish(process: BaseProcess) -> int:
    """The exit code; of a signal, minus its number."""
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def wait_for(process: BaseProcess, out: Path, lines: int) -> None:
    """Wait until that many answers are on disk, or the process has ended."""
    file = out / "samples.jsonl"
    while process.is_alive() and (not file.exists() or file.read_bytes().count(b"\n") < lines):
        time.sleep(0.002)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def answers(out: Path) -> dict[tuple[str, int, int, str], Record]:
    """The records by key, without what varies from run to run."""
    timeless = {"ms_per_token": 0.0, "prefill_s": 0.0, "prefill_own_s": None, "peak": None}
    records = [replace(record, **timeless) for record in read_run(out).records]  # type: ignore[arg-type]
    assert len(lines(out)) == len(records), "a key twice"
    return {record.key: record for record in records}
