"""Files appear whole or not at all, with the right permissions, and leave nothing beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcomp.files import expanded, readable, usable, whole, write_whole


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o027)
    yield
    os.umask(old)


@pytest.mark.parametrize("content", [b"\0bytes\r\n", "text äöü\n", "", b""])
def test_what_is_written_is_there(content: bytes | str, tmp_path: Path) -> None:
    for _ in range(2):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert names(tmp_path) == ["file"]


@pytest.mark.usefixtures("umask")
def test_a_new_file_has_what_the_umask_leaves_and_an_old_one_what_it_had(tmp_path: Path) -> None:
    write_whole(tmp_path / "new", b"1")
    assert mode(tmp_path / "new") == 0o640
    for old in (0o600, 0o644, 0o664, 0o755):
        (tmp_path / "old").touch()
        (tmp_path / "old").chmod(old)
        with whole(tmp_path / "old") as scratch:
            scratch.unlink()  # as writers do that make a file of their own
            scratch.touch(0o600)
        assert mode(tmp_path / "old") == old


def test_a_symlink_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "target").write_text("old")
    (tmp_path / "link").symlink_to("far/target")
    (tmp_path / "chain").symlink_to(tmp_path / "link")
    (tmp_path / "dangling").symlink_to(tmp_path / "far" / "made")
    for link, target in (("link", "target"), ("chain", "target"), ("dangling", "made")):
        write_whole(tmp_path / link, link)
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / "far" / target).read_text() == link
    assert names(tmp_path) == ["chain", "dangling", "far", "link"]
    assert names(tmp_path / "far") == ["made", "target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    def fails() -> None:
        with whole(tmp_path / "file") as scratch:
            scratch.write_text("half of")
            raise error

    with pytest.raises(error):
        fails()
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("kept")
    with pytest.raises(error):
        fails()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def unusable(tmp_path: Path) -> list[tuple[str, str]]:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return [
        (f"{tmp_path}/a\0b", "NUL"),
        (f"{tmp_path}/a\ud800b", "surrogate"),
        (f"{tmp_path}/folder", "directory"),
        (f"{tmp_path}/pipe", "Not a regular file"),
        ("/dev/zero", "Not a regular file"),
        (f"{tmp_path}/loop", "symbolic link|No such file"),
        (f"{tmp_path}/{'n' * 300}", "name too long"),
    ]


def test_names_of_no_file_are_os_errors_and_are_left_alone(tmp_path: Path) -> None:
    for path, told in unusable(tmp_path):
        for use in (readable, lambda p: write_whole(p, b"content")):
            with pytest.raises(OSError, match=f"(?i){told}"):
                use(path)
    assert names(tmp_path) == ["folder", "loop", "pipe"]
    with pytest.raises(OSError, match="no home directory is known for ~nosuchuser"):
        expanded("~nosuchuser/file")
    with pytest.raises(OSError, match="No such file"):
        readable(tmp_path / "nothing")


def test_names_that_are_unusual_are_used(tmp_path: Path) -> None:
    for name in ("a b", "ünïcödé", "n" * 255, "-rf", "[x]*", os.fsdecode(b"\xff\xfe")):
        write_whole(tmp_path / name, name.encode(errors="surrogateescape"))
        assert readable(tmp_path / name) == tmp_path / name
        assert usable(tmp_path / name).exists()
    assert len(names(tmp_path)) == 6


SLOW = """
import sys, time
from kvcomp.files import whole
with whole(sys.argv[1]) as scratch:
    scratch.write_bytes(b"x" * 1000)
    print("begun", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    writers = []
    for _ in range(2):
        writers.append(subprocess.Popen([sys.executable, "-c", SLOW, str(file)], stdout=subprocess.PIPE))
        assert writers[-1].stdout.readline() == b"begun\n"
    try:
        assert len(names(tmp_path)) == 3
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        assert file.read_text() == "old"
        write_whole(tmp_path / "another", b"")
        assert len(names(tmp_path)) == 4  # those of another file are not looked at
        write_whole(file, "new")
        assert len(names(tmp_path)) == 3  # the living one's
    finally:
        writers[1].send_signal(signal.SIGKILL)
        writers[1].wait()
    write_whole(file, "newest")
    assert names(tmp_path) == ["another", "file"]
    assert file.read_text() == "newest"


def test_many_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom kvcomp.files import write_whole\n"
        "for i in range(40): write_whole(sys.argv[1], sys.argv[2] * 10000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "file"), c]) for c in "abc"]
    while any(w.poll() is None for w in writers):
        if (tmp_path / "file").exists():
            text = (tmp_path / "file").read_text()
            assert len(text) == 10000
            assert len(set(text)) == 1
        time.sleep(0.001)
    assert [w.wait() for w in writers] == [0, 0, 0]
    assert names(tmp_path) == ["file"]
