"""A run that is killed, interrupted, or started twice ends as one that was left alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import bench_process
import pytest
from bench_process import answers, arguments, finish, lines, start, wait_for

SAMPLES = 6


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    assert finish(start(arguments(tiny, folder / "run", SAMPLES), folder / "log")) == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_killed_run_continues_to_what_it_would_have_been(tiny: Path, alone: Path, tmp_path: Path, after: int) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(arguments(tiny, out, SAMPLES), log)
    wait_for(process, out, after) if after else wait_for_folder(process, out)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process) == -signal.SIGKILL
    assert finish(start(arguments(tiny, out, SAMPLES), log)) == 0, log.read_text()
    assert answers(out) == answers(alone)
    assert not (out / ".lock").exists()


def wait_for_folder(process: bench_process.BaseProcess, out: Path) -> None:
    """Until the lock is there, and no answer yet."""
    while process.is_alive() and not (out / ".lock").exists():
        pass


def test_an_interrupted_run_leaves_with_130_and_continues(tiny: Path, alone: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(arguments(tiny, out, SAMPLES), log)
    wait_for(process, out, 3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    assert "Traceback" not in log.read_text()
    assert len(lines(out)) < 2 * SAMPLES
    assert finish(start(arguments(tiny, out, SAMPLES), log)) == 0, log.read_text()
    assert answers(out) == answers(alone)


def test_two_processes_do_not_write_one_folder(tiny: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(arguments(tiny, out, SAMPLES), tmp_path / "first")
    wait_for(first, out, 1)
    second = start(arguments(tiny, out, SAMPLES), tmp_path / "second")
    assert sorted((finish(first), finish(second))) == [0, 2]
    refusal, way_out = (tmp_path / "second").read_text().splitlines()[-2:]
    assert refusal.startswith("error: out:")
    assert "choose another --out" in way_out
    assert "another kvcomp bench" in refusal
    assert answers(out) == answers(alone)
    assert finish(start(arguments(tiny, out, SAMPLES), tmp_path / "second")) == 0  # the lock went with its process
    assert answers(out) == answers(alone)


def test_two_processes_that_start_together_count_nothing_twice(tiny: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = [start(arguments(tiny, out, SAMPLES), tmp_path / name) for name in ("first", "second")]
    assert {finish(process) for process in both} <= {0, 2}
    assert answers(out) == answers(alone)
