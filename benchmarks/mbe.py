"""A run as cards of Matched-Budget Evaluation (MBE) 0.1.0: a JSON file for each stack and context.

MBE compares methods whose caches fit the same shares of the uncompressed one: 50, 25, 12.5 and 6.25 %, in the model's
dtype. A card has the fields that its harness writes (github.com/rohithreddybc/kv-cache-compression-mbe at b4e729c,
`run_mbe.py`), the metrics that its manifest requires, and `results`, which its leaderboard shows. A stack counts at the
smallest budget that it fits, with everything that it holds: codes, scales and window. What no run measures is null.

    accuracy    {"full": {task: score}, "B25": {task: score}}: means over RULER's and LongBench's tasks, 0 to 1
    system      {"B25": {metric: value}}: GB (10^9 bytes) of keys and values, tokens/s and ms at batch 1, medians
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcomp import Stack
from kvcomp.benchmarks.merging import in_order
from kvcomp.benchmarks.results import ACCURACY, Record, Run, RunError, write_text
from kvcomp.benchmarks.summary import DENSE
from kvcomp.benchmarks.tasks import GROUPS
from kvcomp.calibration.stage import Calibrated
from kvcomp.text import quote

VERSION = "mbe-0.1.0"
BUDGETS = {"B06": 0.0625, "B12": 0.125, "B25": 0.25, "B50": 0.5}
SUITE = ("longbench", "ruler", "ifeval", "gsm8k", "agentic_trace")
LONGEST = 120  # characters of a file's name


def export(runs: Sequence[Run], out: Path) -> tuple[list[Path], list[str]]:
    """Write the cards of runs into `out`; return them, and the tasks and stacks that have no place on one.

    Raises:
        RunError: a run has no card to write, or `out` cannot be written.
    """
    made: list[Path] = []
    other: dict[str, None] = {}
    for run in runs:
        before = len(made)
        records = [record for record in in_order(run) if _suite(record)]
        other |= dict.fromkeys(record.task for record in run.records if not _suite(record))
        stacks: dict[tuple[int, str], list[Record]] = {}
        for record in records:
            stacks.setdefault((record.context, record.stack), []).append(record)
        for (context, stack), group in stacks.items():
            budget = _budget(group)
            if stack == DENSE:
                continue
            if budget is None:
                other[f"{stack} at {context} tokens, which holds {_retained(group):.1%} of the uncompressed cache"] = (
                    None
                )
                continue
            card = _card(run, context, stack, budget, group, stacks.get((context, DENSE), []))
            file = _file(out, card, context, made)
            write_text(file, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
            made.append(file)
        if len(made) == before:
            raise RunError(
                f"export: {quote(str(run.folder))} has no stack that holds at most half of the uncompressed cache on a "
                "task of ruler or longbench, which is what MBE compares: measure one, or leave out --export."
            )
    return made, list(other)


def _suite(record: Record) -> str | None:
    """MBE's name of what a sample measures; None: it has none."""
    found = (name for name in SUITE if record.task in GROUPS.get(name, ()))
    return next(found, None) if record.metric == ACCURACY else None


def _retained(group: Sequence[Record]) -> float:
    return sum(record.held for record in group) / sum(record.held_dense for record in group)


def _budget(group: Sequence[Record]) -> str | None:
    """The smallest budget that a stack fits; None: it holds more than half."""
    return next((name for name, share in BUDGETS.items() if _retained(group) <= share), None)


def _card(
    run: Run, context: int, stack: str, budget: str, group: Sequence[Record], full: Sequence[Record]
) -> dict[str, Any]:
    settings, machine = run.config["settings"], run.config["machine"]
    kinds = _kinds(stack)
    dtype = settings.get("dtype") or ("bfloat16" if machine.get("gpu") else "float32")
    accuracy = {"full": _accuracy(full)} if full else {}
    share = _retained(group)
    return {
        "method": stack,
        "type": " + ".join(kinds),
        "model": settings.get("model", "?"),
        "attention": "unknown",
        "prerequisite": "calibration" if _is_calibrated(stack) else "training-free",
        "hardware_tier": machine.get("gpu") or f"CPU: {machine.get('cpu')}, {machine.get('threads')} threads",
        "harness_version": VERSION,
        "accuracy": {**accuracy, budget: _accuracy(group)},
        "system": {**({"full": _system(full)} if full else {}), budget: _system(group)},
        "composability": {kind: "self" if kind in kinds else "composes" for kind in ("quantization", "eviction")},
        "notes": f"{share:.2%} of the uncompressed cache in {dtype}, {context} tokens, {len(group)} samples, batch 1. "
        "TTFT: the uncompressed prefill that stacks share, what the stack added, and one decode step.",
        "method_family": " + ".join(kinds),
        "results": [
            *([{"method": DENSE, "kv_budget": "100%", "accuracy": _mean(accuracy["full"])}] if full else []),
            {"method": stack, "kv_budget": f"{share:.2%}", "accuracy": _mean(_accuracy(group))},
        ],
        "kvcomp": {
            "context": context,
            "retained": share,
            "samples": len(group),
            "settings": settings,
            "model": dict(run.config.get("model", {})),
            "data": run.config.get("data", {}),
            "versions": run.config["versions"],
            "machine": machine,
        },
    }


def _kinds(stack: str) -> list[str]:
    parsed = Stack.parse(stack)
    kinds = ["quantization"] if parsed.quantizer.name != DENSE else []
    return [*kinds, *(["eviction"] if parsed.policies else []), *(["selection"] if parsed.selector else [])] or ["none"]


def _is_calibrated(stack: str) -> bool:
    return any(isinstance(stage, Calibrated) and stage.calibration for stage in Stack.parse(stack).stages)


def _accuracy(group: Sequence[Record]) -> dict[str, float | None]:
    """Means over the tasks of each part of the suite, every task counting the same."""
    tasks: dict[str, dict[str, list[float]]] = {name: {} for name in SUITE}
    for record in group:
        tasks[str(_suite(record))].setdefault(record.task, []).append(record.score)
    means = {name: [statistics.fmean(scores) for scores in found.values()] for name, found in tasks.items()}
    return {name: statistics.fmean(found) if found else None for name, found in means.items()}


def _mean(accuracy: dict[str, float | None]) -> float:
    return statistics.fmean(score for score in accuracy.values() if score is not None)


def _system(group: Sequence[Record]) -> dict[str, float | None]:
    first = [1000 * (r.prefill_s + (r.prefill_own_s or 0.0)) + r.ms_per_token for r in group]
    return {
        "peak_kv_memory_gb": max(record.held for record in group) / 1e9,
        "decode_throughput_tok_s": 1000 / statistics.median(record.ms_per_token for record in group),
        "ttft_ms": statistics.median(first),
        "max_batch_before_oom": None,
    }


def _file(out: Path, card: dict[str, Any], context: int, taken: Sequence[Path]) -> Path:
    """<method>_<model>_<context>.json, numbered where two are the same."""
    parts = (re.sub(r"[^A-Za-z0-9.-]+", "_", text)[:LONGEST].strip("_.") for text in (card["method"], card["model"]))
    name, number = "_".join([*parts, str(context)]), 0
    while (file := out / f"{name}{f'_{number}' if number else ''}.json") in taken:
        number += 1
    return file
