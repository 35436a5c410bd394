"""The folder of a run: its configuration, and a record per sample and stack. One process writes it at a time."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvcomp.benchmarks.records import ACCURACY, FIDELITY, NLL, Record, RunError, config_of
from kvcomp.benchmarks.schema import SchemaError, parse_json
from kvcomp.benchmarks.shards import folders
from kvcomp.errors import KvcompWarning
from kvcomp.files import readable
from kvcomp.text import quote

__all__ = ["ACCURACY", "FIDELITY", "NLL", "Record", "Results", "Run", "RunError", "locked", "read_run", "write_text"]

CONFIG, SAMPLES, LOCK, SCRATCH = "config.json", "samples.jsonl", ".lock", ".part"
PARTS = ("settings", "data", "versions", "machine")  # of a configuration, that a run may differ in


class Results:
    """The folder of a run: `config.json`, and `samples.jsonl` that grows by a line per record.

    Opening a folder that holds the same configuration continues it; any other one is refused and left as it
    is. A new folder appears with its first record, so that a run that cannot start leaves no files. Who writes
    records holds the folder's lock from before it is opened (`locked`).
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.records: list[Record] = []
        self._config_file = folder / CONFIG
        self._samples = folder / SAMPLES
        whole = 0
        with _readable(folder):
            if self._config_file.exists():
                self.config = _read_config(self._config_file)
                _require_same(self.config, config, folder)
                self.records, whole = _read_records(self._samples, "dropped; its sample runs again")
            elif (
                folder.exists()
                and not folders(folder)
                and not (folder.is_dir() and all(map(_is_left, folder.iterdir())))
            ):
                raise RunError(f"out: {quote(str(folder))} exists and holds no kvcomp run. Choose another --out.")
            _require_writable(folder)
            if self._samples.exists() and whole < self._samples.stat().st_size:
                os.truncate(self._samples, whole)

    def note(self, **parts: Any) -> None:
        """Add parts to the configuration; where it is on disk already, there too."""
        self.config = {**self.config, **parts}
        if self._config_file.exists():
            self._write_config()

    def append(self, record: Record) -> None:
        """Write the record to disk before anything else can go wrong; RunError where it cannot be written."""
        if not self._config_file.exists():
            self._write_config()
        with self._kept(), self._samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self.records.append(record)

    def _write_config(self) -> None:
        write_text(self._config_file, json.dumps(self.config, indent=2) + "\n")

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"out: {str(self._samples)!r} cannot be written ({_reason(error)}). The {len(self.records)} finished "
                "answers before are kept; the same command continues once it can."
            ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made, as its only writer; the lock ends with the process, however that ends.

    Where no run came of it, the folder is as it was before.

    Raises:
        RunError: another process writes it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    _require_writable(folder)
    new = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    file = folder / LOCK
    lock = FileLock(file, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(
            f"out: {quote(str(folder))} is being written by another kvcomp bench. Wait until it ends, or choose "
            "another --out."
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = _reason(error) if isinstance(error, OSError) else str(error)
        raise RunError(f"out: {quote(str(folder))} cannot be locked ({reason}). Choose another --out.") from error
    try:
        yield
    finally:
        nothing = not (folder / CONFIG).exists()
        with suppress(OSError):
            file.unlink()  # a process that has it open sees that it is gone, and makes another
        lock.release()
        with suppress(OSError):  # somebody else has put something there
            for place in new if nothing else ():
                place.rmdir()


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run, as read from its folder."""

    folder: Path
    config: dict[str, Any]
    records: list[Record]


def read_run(folder: Path) -> Run:
    """Read a run and change nothing; a last line that was cut short is left out with a warning.

    Raises RunError where `folder` holds no run, no finished sample, or a damaged line.
    """
    config_file, samples = folder / CONFIG, folder / SAMPLES
    with _readable(folder):
        if not config_file.is_file():
            what = "holds no config.json of kvcomp bench" if folder.is_dir() else "is not a folder"
            raise RunError(f"run: {quote(str(folder))} {what}. Give a folder that was the --out of a bench.")
        config = _read_config(config_file)
        records = _read_records(samples, "left out of the report")[0]
    if not records:
        raise RunError(f"run: {quote(str(folder))} holds no finished sample.")
    return Run(folder, config, records)


def write_text(file: Path, text: str) -> None:
    """Replace `file` and make its folder, or raise RunError and leave what was there as it was.

    A link is replaced, not followed: what a folder holds decides nothing about places outside of it.
    """
    scratch = file.with_name(f"{file.name}.{os.getpid()}{SCRATCH}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.unlink(missing_ok=True)
            scratch.write_text(text, encoding="utf-8", newline="")
            scratch.replace(file)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"out: {str(file)!r} cannot be written ({_reason(error)}).") from error


def _is_left(file: Path) -> bool:
    """Whether a file is of a run that was killed before its first record."""
    return file.name == LOCK or (file.name.startswith(CONFIG) and file.name.endswith(SCRATCH))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError):  # a name that no file can have
            if isinstance(error, RunError):
                raise
            raise RunError(f"{quote(str(folder))} cannot be read ({error}).") from error
        name = error.filename or folder
        raise RunError(f"{quote(str(name))} cannot be read ({_reason(error)}).") from error


def _require_writable(folder: Path) -> None:
    """Raise RunError where `folder`, or the one it would be made in, cannot be written: before hours of measuring."""
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not (os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)):
        why = "not writable" if os.path.isdir(place) else "not a folder"
        what = f"{quote(str(folder))} cannot be written: {quote(str(place))} is {why}"
        raise RunError(f"out: {what}. Choose another --out.")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = parse_json(readable(file).read_bytes())
    except SchemaError as error:
        raise RunError(
            f"out: {str(file)!r} is not readable ({error}). Restore the file, or choose another --out."
        ) from error
    try:
        return config_of(config)
    except SchemaError as error:
        raise RunError(
            f"out: {str(file)!r} was not written by kvcomp bench, or is damaged: {error}. Restore the file, or choose "
            "another --out."
        ) from error


def differences(old: dict[str, Any], new: dict[str, Any], parts: Sequence[str] = PARTS) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two configurations, save the command itself: both values by name."""
    return {
        name: (old.get(part, {}).get(name), new.get(part, {}).get(name))
        for part in parts
        for name in dict.fromkeys([*old.get(part, {}), *new.get(part, {})])
        if old.get(part, {}).get(name) != new.get(part, {}).get(name)
    }


def _require_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    found = [f"{name}: {quote(there)} there, {quote(now)} now" for name, (there, now) in differences(old, new).items()]
    if found:
        raise RunError(
            f"out: {quote(str(folder))} holds a run with another configuration ({'; '.join(found)}). "
            "Nothing was overwritten; choose another --out."
        )


def _read_records(file: Path, fate: str) -> tuple[list[Record], int]:
    """Return the records, each key once, and the bytes of their lines.

    fate: what the warning says of a last line cut short.
    """
    if not file.exists():
        return [], 0
    found = _Found(file)
    lines = readable(file).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            warnings.warn(f"{file}: the last line was cut short and is {fate}.", KvcompWarning, stacklevel=3)
            lines.pop()
        elif line.strip():
            found.add(number, line)
    if found.again:
        warnings.warn(
            f"{file}: {len(found.again)} lines repeat answers of others and are not counted, the first of them line "
            f"{found.again[0]}.",
            KvcompWarning,
            stacklevel=3,
        )
    return list(found.records.values()), sum(map(len, lines))


class _Found:
    """The records of a file as its lines are read. again: lines of keys that were there before."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: dict[tuple[str, int, int, str], Record] = {}
        self.lines: dict[tuple[str, int, int, str], int] = {}
        self.hashes: dict[str, tuple[str, int]] = {}
        self.again: list[int] = []

    def add(self, number: int, line: bytes) -> None:
        """Add the record of a line.

        Raises:
            RunError: it is damaged, or contradicts another one.
        """
        where = f"line {number} of {str(self.file)!r}"
        try:
            record = Record.of(parse_json(line))
        except (SchemaError, RunError) as error:
            raise RunError(
                f"{where} is damaged ({error}). Restore the file, or remove that line: its sample then runs again."
            ) from error
        other, first = self.hashes.setdefault(record.stack, (record.hash, number))
        if other != record.hash:
            raise RunError(
                f"{where} has the hash {quote(record.hash)} for the stack {quote(record.stack)}, and line {first} "
                f"{quote(other)}: its calibration file was another one. Remove the lines of one of them."
            )
        if record.key not in self.records:
            self.records[record.key], self.lines[record.key] = record, number
            return
        before = self.records[record.key]
        if (before.score, before.prediction) != (record.score, record.prediction):
            raise RunError(
                f"{where} answers the same sample as line {self.lines[record.key]}, and differently: score "
                f"{record.score:g} and {before.score:g}. Remove the wrong one of the two lines."
            )
        self.again.append(number)
