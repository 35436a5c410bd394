"""Where the texts and questions of a benchmark come from: a local folder, the Hugging Face hub, or the package.

A `Source` names one such text or question set, the files that hold it, and how to read them. `--data` says where
to look, and everything here takes its value:

    a folder    the files of every source are looked for in it and in its folders, two levels deep
    "hub"       the source is downloaded with the `datasets` package
    None        only what travels with the package

Which files a source accepts is documented where it is registered, and for users in docs/benchmarks.md. A benchmark
registers its sources when it is imported, and `kvcomp data check DIR` reads all of them:

    QASPER = register(Source("longbench/qasper", ("qasper",), ("qasper.jsonl",), read_jsonl, fetch="..."))
    items = load(QASPER, data)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from kvcomp.errors import KvcompError
from kvcomp.text import quote, shorten

HUB = "hub"
Data = str | Path | None  # the value of --data
T = TypeVar("T", bound=Sized)


class DataError(KvcompError):
    """Data that is not there, or is not what its name says."""


@dataclass(frozen=True)
class Source(Generic[T]):
    """One text or question set.

    name: unique among all benchmarks; a slash separates a benchmark from its part.
    tasks: the tasks that read it.
    files: names that are accepted, the best first; "folder/name" where the name alone says too little, and the
        wildcards of `Path.glob`.
    read: returns the content of a file; whatever it raises becomes a DataError that names the file.
    fetch: what to put into the folder, as a phrase: "dev-v2.0.json of SQuAD 2.0 (...)".
    hub: downloads the same content; None where the hub does not have it.
    fallback: returns what is read instead of the source without --data, or where the folder does not have it.
    fallback_name: says in words what that is, since results may depend on it.
    unit: what `len` of the content counts.
    listed: whether `kvcomp data check` names it as what its tasks are made of.
    """

    name: str
    tasks: tuple[str, ...]
    files: tuple[str, ...]
    read: Callable[[Path], T]
    fetch: str
    hub: Callable[[], T] | None = None
    fallback: Callable[[], T] | None = None
    fallback_name: str = ""
    unit: str = "items"
    listed: bool = True


@dataclass(frozen=True)
class Finding:
    """What a folder holds of one source: the file and how much is in it, or why it cannot be used."""

    source: Source[Any]
    file: Path | None
    count: int = 0
    problem: str = ""  # empty where `count` items can be loaded, from the file or, without one, the fallback


SOURCES: dict[str, Source[Any]] = {}


def register(source: Source[T]) -> Source[T]:
    """Make `source` known to `check`, and return it."""
    SOURCES[source.name] = source
    return source


def find(source: Source[Any], folder: str | Path) -> Path:
    """Return the best file of `source` in `folder`; DataError names the tasks and what to fetch."""
    file = _look(source, _folder(folder))
    if file is None:
        raise _missing(source, folder)
    return file


def load(source: Source[T], data: Data) -> T:
    """Return the content of `source` from the folder or the hub, or its fallback; it is read once.

    Raises DataError, in one line, where nothing is found, a file cannot be read, or the hub cannot be reached.
    """
    content: T
    if data == HUB and (source.hub or not source.fallback):
        content = _download(source.name)
        if isinstance(content, DataError):
            raise content
    elif (file := _file(source, data)) is not None:
        status = file.stat()
        content = _read(source.name, file, status.st_mtime_ns, status.st_size)
    elif source.fallback is not None:
        content = source.fallback()
    else:
        raise _missing(source, data)
    return content


def origin(source: Source[Any], data: Data) -> str:
    """Say which content `load` returns, in words that are the same on every machine: a file's name and SHA-256."""
    if data == HUB and source.hub:
        return "hub"
    if (file := _file(source, data)) is not None:
        status = file.stat()
        return f"{file.name} (sha256 {_digest(file, status.st_mtime_ns, status.st_size)})"
    return source.fallback_name or "missing"


def check(folder: str | Path) -> list[Finding]:
    """Read the file of every registered source in `folder`, and say what is there."""
    root = _folder(folder)
    findings = []
    for source in SOURCES.values():
        file = _look(source, root)
        try:
            findings.append(Finding(source, file, len(load(source, root))))
        except DataError as error:
            findings.append(Finding(source, file, problem=str(error)))
    return findings


def read_json(file: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that has one a line."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def hub_rows(path: str, name: str | None, split: str, **arguments: Any) -> Any:
    """Return the rows of a split from the hub; DataError where `datasets` is missing or the hub out of reach."""
    try:
        import datasets
    except ImportError as error:
        raise DataError('the hub needs the datasets package: pip install "kvcomp[bench]"') from error
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)  # it reports every attempt of five
    try:
        return datasets.load_dataset(path, name, split=split, **arguments)
    except Exception as error:  # datasets passes on whatever its many back ends raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} could not be loaded from the hub ({reason}).") from error
    finally:
        client.setLevel(level)


def _folder(folder: str | Path) -> Path:
    root = Path(os.path.expanduser(folder))
    if not os.path.isdir(root):
        raise DataError(f"data: {quote(str(folder))} is not a folder. Give a folder, or hub.")
    return root


def _look(source: Source[Any], root: Path) -> Path | None:
    for name in source.files:
        for depth in ("", "*/", "*/*/"):
            found = sorted(path for path in root.glob(depth + name) if path.is_file())
            if found:
                return found[0]
    return None


def _missing(source: Source[Any], data: Data) -> DataError:
    if data is None:
        offer = ", or --data hub to download it" if source.hub else ""
        return DataError(f"{_names(source)}: needs --data: a folder with {source.fetch}{offer}.")
    return DataError(f"{_names(source)}: no {source.files[0]} in {str(data)!r}. Put there {source.fetch}.")


def _file(source: Source[Any], data: Data) -> Path | None:
    return None if data is None or data == HUB else _look(source, _folder(data))


@cache
def _read(name: str, file: Path, mtime_ns: int, size: int) -> Any:
    source = SOURCES[name]
    try:
        content = source.read(file)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
        reason = shorten(f"{type(error).__name__}: {error}".splitlines()[0])
        raise DataError(f"{_names(source)}: {str(file)!r} is not {source.fetch} ({reason}).") from error
    if not len(content):
        raise DataError(f"{_names(source)}: {str(file)!r} is empty.")
    return content


@cache
def _digest(file: Path, mtime_ns: int, size: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


@cache
def _download(name: str) -> Any:
    """Return the content, or the DataError: a hub out of reach is slow to find out, so it is asked once."""
    source = SOURCES[name]
    if source.hub is None:
        return DataError(f"{_names(source)}: not on the hub. Give --data a folder with {source.fetch}.")
    try:
        return source.hub()
    except DataError as error:
        return DataError(f"{_names(source)}: {error}")


def _names(source: Source[Any]) -> str:
    return ", ".join(source.tasks)
