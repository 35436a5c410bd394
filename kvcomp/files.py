"""Files that are written whole or not at all, and paths that name no file.

write_whole(path, content)       bytes or text
with whole(path) as scratch:     a file that something else writes, by its name
    save_file(tensors, scratch)
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from kvcomp.text import quote

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: what a killed process left stays
    fcntl = None

FilePath = str | os.PathLike[str]


def write_whole(path: FilePath, content: bytes | str) -> None:
    """Replace a file by `content` (text as UTF-8), as `whole` does.

    Raises:
        OSError: as `whole`.
    """
    with whole(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole(path: FilePath) -> Iterator[Path]:
    """A scratch file that takes the place of `path` when the block ends; after an error `path` is as it was.

    A symlink stays, and its target is replaced. A file keeps its permissions; the umask decides those of a new one. The
    scratch file lies in a directory of its own beside `path`, which is removed at the end. What a killed process
    left there is removed by the next one that writes the same path.

    Raises:
        OSError: `path` cannot be written, is no regular file, or is a name that no file can have.
    """
    target = Path(os.path.realpath(usable(path)))
    mode = _mode(target)
    with _scratch_folder(target) as folder:
        scratch = folder / "new"
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            mode = os.fstat(file.fileno()).st_mode if mode is None else mode
        yield scratch
        os.chmod(scratch, stat.S_IMODE(mode))  # some writers replace the file by one that only its owner may read
        os.replace(scratch, target)


def named(path: FilePath) -> str:
    """The path as messages show it, whatever was given for one."""
    return quote(os.fspath(path) if isinstance(path, str | os.PathLike) else path)


def usable(path: FilePath) -> Path:
    """The path, if a file can have that name.

    Raises:
        OSError: it has NUL characters or surrogates.
    """
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise OSError(errno.EINVAL, f"a path is text, no {type(path).__name__}") from error
    try:
        if b"\0" in os.fsencode(text):
            raise OSError(errno.EINVAL, "a file name has no NUL characters")
    except UnicodeEncodeError as error:
        raise OSError(errno.EINVAL, "a file name has no surrogate characters") from error
    return Path(text)


def readable(path: FilePath) -> Path:
    """The path of a regular file. Devices and pipes, which may never end, are none.

    Raises:
        OSError: there is no such file, it is no regular one, or no file can have that name.
    """
    given = usable(path)
    _require_regular(given.stat(), given)
    return given


def read_text(path: FilePath, encoding: str = "utf-8") -> str:
    """The text of a regular file, or of a pipe, as of a shell's `<(command)`. Devices, which may never end, are none.

    Raises:
        OSError: as `readable`.
        UnicodeDecodeError: it is no text in that encoding.
    """
    given = usable(path)
    found = given.stat()
    if not stat.S_ISFIFO(found.st_mode):
        _require_regular(found, given)
    return given.read_text(encoding=encoding)


def expanded(path: FilePath) -> Path:
    """The path with `~` and `~user` replaced by home directories.

    Raises:
        OSError: there is no such user, or no file can have that name.
    """
    given = usable(path)
    try:
        return given.expanduser()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, f"no home directory is known for {given.parts[0]}") from error


def reason(error: OSError) -> str:
    """Why a file cannot be read or written, in the system's words."""
    return error.strerror or str(error)


def _mode(target: Path) -> int | None:
    """Permissions of a regular file; None where there is nothing."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    _require_regular(found, target)
    return found.st_mode


def _require_regular(found: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


@contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, removed at the end, that is locked as long as this process lives."""
    prefix = f".kvcomp-{sha256(os.fsencode(target.name)).hexdigest()[:12]}-"
    while True:
        folder = target.parent / f"{prefix}{uuid4().hex}"
        folder.mkdir(mode=0o700)
        try:
            lock = _locked(folder)
        except FileNotFoundError:  # another process took it for one that was left
            continue
        break
    try:
        for other in target.parent.glob(f"{prefix}*"):
            _remove_left(other)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, wait: bool = True) -> int | None:
    """A descriptor that holds the lock of a directory until it is closed; None where there are no locks.

    Raises:
        FileNotFoundError: the directory is gone.
        BlockingIOError: another process holds the lock, and this one does not wait.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        folder.stat()
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _remove_left(folder: Path) -> None:
    """Remove a scratch directory whose process is gone."""
    with suppress(OSError):
        lock = _locked(folder, wait=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
