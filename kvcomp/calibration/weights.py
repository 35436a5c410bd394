"""Samples of the files of a model's weights: they identify a model without reading all of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

FILES = ("*.safetensors", "*.bin", "*.pt")  # of a folder
SAMPLES, SAMPLE = 256, 1024  # of each file, and bytes of a sample


class Digest(Protocol):
    """As those of hashlib."""

    def update(self, data: bytes, /) -> None: ...


def add_samples(digest: Digest, files: Iterable[Path]) -> None:
    """Add names, sizes and samples of files to a digest, in the order of their paths."""
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}/{size}/".encode())
        with file.open("rb") as stream:
            for at in range(SAMPLES):
                stream.seek(size * at // SAMPLES)
                digest.update(stream.read(SAMPLE))
