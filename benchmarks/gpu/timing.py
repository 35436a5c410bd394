"""How phases are timed, and where their results go: a line of JSON each."""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

OUT = Path(os.environ.get("OUT", "."))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
REPLAYS = 20


def emit(phase: str, **fields: Any) -> None:
    line = json.dumps({"phase": phase} | fields)
    print(line, flush=True)
    with (OUT / f"{phase}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def kept(phase: str, **fields: Any) -> Iterator[None]:
    """An error inside is a line, and the phase goes on."""
    try:
        yield
    except Exception as error:
        emit(phase, **fields, error=f"{type(error).__name__}: {error}"[:500])
        traceback.print_exc()
    if GPU:
        torch.cuda.empty_cache()


def wait() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def eager_ms(call: Callable[[], object], times: int = 7) -> float:
    """Median of the wall clock, host included."""
    call()
    taken = []
    for _ in range(times):
        start = wait()
        call()
        taken.append(1e3 * (wait() - start))
    return statistics.median(taken)


def graph_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call: all recorded as a CUDA graph, replayed and timed by events; without a GPU the wall clock."""
    if not GPU:
        return statistics.mean(eager_ms(call, 1) for call in calls)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / REPLAYS / len(calls)
