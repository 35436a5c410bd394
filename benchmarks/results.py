"""What a run leaves on disk: its configuration, and a record per sample and stack."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvcomp.errors import KvcompError

ACCURACY, NLL = "accuracy", "nll"  # what a score is: right answers, or nats per token, the lower the better


class RunError(KvcompError):
    """A run that cannot start, continue or be read as asked."""


@dataclass(frozen=True)
class Record:
    """One sample answered with one stack. Bytes: held at the end of the answer, read by its last step."""

    task: str
    context: int
    index: int
    stack: str
    hash: str
    score: float
    prediction: str
    references: list[str]
    depth: float | None
    tags: list[str]  # groups of its task that the sample belongs to
    origin: str  # the texts that the prompt was made of
    prompt_tokens: int
    new_tokens: int
    effective_bits: float
    held: int
    held_dense: int
    read: int
    read_dense: int
    ms_per_token: float  # median over the decode steps
    prefill_s: float  # the dense prefill that stacks share; 0 for one that entered alone
    metric: str = ACCURACY
    prefill_own_s: float | None = None  # what this stack added, or all of its own; None: it is in prefill_s, of all
    peak: int | None = None  # bytes held when decoding began, and what memory grew by at most until its end

    @property
    def key(self) -> tuple[str, int, int, str]:
        return (self.task, self.context, self.index, self.hash)


class Results:
    """The folder of a run: `config.json`, and `samples.jsonl` that grows by a line per record.

    Opening a folder that holds the same configuration continues it; any other one is refused and left as it
    is. A new folder appears with its first record, so that a run that cannot start leaves nothing behind.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.records: list[Record] = []
        self._config_file = folder / "config.json"
        self._samples = folder / "samples.jsonl"
        scratch = _scratch(self._config_file)  # of a run that was killed before its first record
        whole = 0
        with _readable(folder):
            if self._config_file.exists():
                self.config = _read_config(self._config_file)
                _require_same(self.config, config, folder)
                self.records, whole = _read_records(self._samples, "dropped; its sample runs again")
            elif folder.exists() and (not folder.is_dir() or any(file != scratch for file in folder.iterdir())):
                raise RunError(f"out: {str(folder)!r} exists and holds no kvcomp run. Choose another --out.")
            _require_writable(folder)
            if self._samples.exists() and whole < self._samples.stat().st_size:
                os.truncate(self._samples, whole)

    def append(self, record: Record) -> None:
        """Write the record to disk before anything else can go wrong; RunError where it cannot be written."""
        if not self._config_file.exists():
            write_text(self._config_file, json.dumps(self.config, indent=2) + "\n")
        with self._kept(), self._samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self.records.append(record)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"out: {str(self._samples)!r} cannot be written ({_reason(error)}). The {len(self.records)} finished "
                "answers before are kept; the same command continues once it can."
            ) from error


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run, as read from its folder."""

    folder: Path
    config: dict[str, Any]
    records: list[Record]


def read_run(folder: Path) -> Run:
    """Read a run and change nothing; a last line that was cut short is left out with a warning.

    Raises RunError where `folder` holds no run, no finished sample, or a damaged line before the last.
    """
    config_file, samples = folder / "config.json", folder / "samples.jsonl"
    with _readable(folder):
        if not config_file.is_file():
            what = "holds no config.json of kvcomp bench" if folder.is_dir() else "is not a folder"
            raise RunError(f"run: {str(folder)!r} {what}. Give a folder that was the --out of a bench.")
        config = _read_config(config_file)
        records = _read_records(samples, "left out of the report")[0]
    if not records:
        raise RunError(f"run: {str(folder)!r} holds no finished sample.")
    return Run(folder, config, records)


def write_text(file: Path, text: str) -> None:
    """Replace `file` and make its folder, or raise RunError and leave what was there as it was."""
    scratch = _scratch(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_text(text, encoding="utf-8", newline="")
            scratch.replace(file)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"out: {str(file)!r} cannot be written ({_reason(error)}).") from error


def _scratch(file: Path) -> Path:
    return file.with_name(file.name + ".part")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = error.filename or folder
        raise RunError(f"{str(name)!r} cannot be read ({_reason(error)}).") from error


def _require_writable(folder: Path) -> None:
    """Raise RunError where `folder`, or the one it would be made in, cannot be written: before hours of measuring."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        why = "not writable" if place.is_dir() else "not a folder"
        raise RunError(f"out: {str(folder)!r} cannot be written: {str(place)!r} is {why}. Choose another --out.")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"out: {str(file)!r} is not readable ({error}). Choose another --out.") from error
    if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
        raise RunError(f"out: {str(file)!r} was not written by kvcomp bench. Choose another --out.")
    return config


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two configurations, save the command itself: both values by name."""
    return {
        name: (old.get(part, {}).get(name), new.get(part, {}).get(name))
        for part in ("settings", "data", "versions", "machine")
        for name in dict.fromkeys([*old.get(part, {}), *new.get(part, {})])
        if old.get(part, {}).get(name) != new.get(part, {}).get(name)
    }


def _require_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    found = [f"{name}: {there!r} there, {now!r} now" for name, (there, now) in differences(old, new).items()]
    if found:
        raise RunError(
            f"out: {str(folder)!r} holds a run with another configuration ({'; '.join(found)}). "
            "Nothing was overwritten; choose another --out."
        )


def _read_records(file: Path, fate: str) -> tuple[list[Record], int]:
    """Return the records and the bytes of their lines. fate: what the warning says of a last line cut short."""
    if not file.exists():
        return [], 0
    lines = file.read_bytes().splitlines(keepends=True)
    names = {field.name for field in fields(Record)}
    required = {field.name for field in fields(Record) if field.default is MISSING}
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if not required <= set(values) <= names or not line.endswith(b"\n"):
                raise ValueError("not a whole record")
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise RunError(f"line {number} of {str(file)!r} is damaged ({error}).") from error
            warnings.warn(f"{file}: the last line was cut short and is {fate}.", stacklevel=3)
            return records, sum(map(len, lines[:-1]))
        records.append(Record(**values))
    return records, sum(map(len, lines))
