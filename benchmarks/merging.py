"""Shards of a run as one run again, for reports and for the run that goes on in their folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcomp.benchmarks import shards
from kvcomp.benchmarks.records import fingerprint_of
from kvcomp.benchmarks.results import CONFIG, Record, Results, Run, RunError, differences, locked, read_run
from kvcomp.benchmarks.shards import Shard
from kvcomp.errors import KvcompWarning
from kvcomp.text import quote

ALIKE = ("settings", "data", "versions")  # of shards; their machines may differ


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs of folders as `read_run` does; shards of one run, in its folder or given side by side, are one.

    Raises:
        RunError: a folder holds no run, or shards that are not of one run.
    """
    groups: list[list[Run]] = []
    for run in map(_read, folders):
        same = (g for g in groups if "shard" in run.config and "shard" in g[0].config and not _apart(g[0], run))
        group = next(same, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return [_joined(group[0].folder.parent, group) if len(group) > 1 else group[0] for group in groups]


def adopt(results: Results) -> None:
    """Take the answers of the shards in a run's folder into the run; the shards stay as they are.

    Raises:
        RunError: a shard is being written by another process, or is of another run.
    """
    parts = []
    for folder in shards.folders(results.folder):
        with locked(folder):
            parts += [read_run(folder)] if (folder / CONFIG).is_file() else []
    if not parts:
        return
    whole = _joined(results.folder, [Run(results.folder, results.config, list(results.records)), *parts])
    results.note(**{name: whole.config[name] for name in ("model", "left_out", "workers") if name in whole.config})
    known = {record.key for record in results.records}
    for record in whole.records:
        if record.key not in known:
            results.append(record)


def in_order(run: Run) -> list[Record]:
    """The records of a run by context, task, sample and stack, in whichever order they were measured."""
    settings = run.config["settings"]
    tasks = _positions([*settings.get("tasks", ()), *(record.task for record in run.records)])
    stacks = _positions([*settings.get("stacks", ()), *(record.stack for record in run.records)])

    def place(record: Record) -> tuple[int, ...]:
        return record.context, tasks[record.task], record.index, stacks[record.stack]

    return sorted(run.records, key=place)


def _positions(names: Sequence[str]) -> dict[str, int]:
    """Where each name is in the list of them without repetitions."""
    return {name: at for at, name in enumerate(dict.fromkeys(names))}


def _read(folder: Path) -> Run:
    """One folder with its shards."""
    parts = [part for part in shards.folders(folder) if (part / CONFIG).is_file()]
    own = [read_run(folder)] if not parts or (folder / CONFIG).exists() else []
    runs = [*own, *map(read_run, parts)]
    if not parts:
        return runs[0]
    return _joined(folder, runs)


def _joined(folder: Path, runs: Sequence[Run]) -> Run:
    """Runs of the same configuration as one, each answer once.

    Raises:
        RunError: they are of different runs, or answer the same sample differently.
    """
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise RunError("run: the same folder is given twice.")
    records: dict[tuple[str, int, int, str], Record] = {}
    hashes: dict[str, tuple[str, Run]] = {}
    for run in runs:
        if apart := _apart(runs[0], run):
            raise RunError(
                f"run: {quote(str(run.folder))} is no part of the same run as {quote(str(runs[0].folder))} ({apart}). "
                "Move it to another folder."
            )
        for record in run.records:
            other, first = hashes.setdefault(record.stack, (record.hash, run))
            before = records.setdefault(record.key, record)
            if other != record.hash or (before.score, before.prediction) != (record.score, record.prediction):
                what = f"sample {record.index} of {record.task} at {record.context} with {quote(record.stack)}"
                raise RunError(
                    f"run: {quote(str(run.folder))} contradicts {quote(str(first.folder))} in {what}: the stack's "
                    "calibration file or the answer is another one. Remove one of the two folders."
                )
    config: dict[str, Any] = {name: value for name, value in runs[0].config.items() if name != "shard"}
    for name in ("left_out", "workers"):
        united: list[Any] = []
        for run in runs:
            united += [value for value in run.config.get(name, []) if value not in united]
        config |= {name: united} if united else {}
    model = next((run.config["model"] for run in runs if "model" in run.config), None)
    config |= {"model": model} if model else {}
    _tell_absent(folder, runs)
    return Run(folder, config, in_order(Run(folder, config, list(records.values()))))


def _apart(run: Run, other: Run) -> str:
    """What shows that two folders are not of one run; empty: nothing does."""
    found = differences(run.config, other.config, ALIKE)
    if found:
        return "; ".join(f"{name}: {quote(there)} and {quote(here)}" for name, (there, here) in found.items())
    there, here = fingerprint_of(run.config), fingerprint_of(other.config)
    return "" if there is None or here is None or there.same(here) else "the models differ"


def _tell_absent(folder: Path, runs: Sequence[Run]) -> None:
    """Warn of shards that are not there, where shards are all there is."""
    if any("shard" not in run.config for run in runs):
        return
    found = [Shard.parse(run.config["shard"]) for run in runs]
    count = found[0].count
    if any(shard.count != count for shard in found):
        return
    absent = [str(Shard(n, count)) for n in range(1, count + 1) if Shard(n, count) not in found]
    if absent:
        warnings.warn(
            f"{folder} lacks {len(absent)} of {count} shards, the first of them {absent[0]}.",
            KvcompWarning,
            stacklevel=3,
        )
