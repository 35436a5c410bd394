"""Which sources a C kernel was compiled from. `setup.py` runs this file by itself: it must import nothing of kvcomp."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path


def digest(folder: Path) -> str | None:
    """A name for the C sources in a folder, which is compiled into the kernel; None where there are none, as in an
    installed copy of kvcomp."""
    sources = sorted([*folder.glob("*.c"), *folder.glob("*.h")])
    if not sources:
        return None
    found = sha256()
    for source in sources:
        found.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return found.hexdigest()[:32]
