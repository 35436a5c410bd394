"""Shards and workers of a run answer what one process would, also if a worker is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from bench_process import STACKS, answers, arguments, finish, lines, start, wait_for

from kvcomp.benchmarks import workers
from kvcomp.benchmarks.merging import read_runs
from kvcomp.benchmarks.report import publish
from kvcomp.benchmarks.results import Record, Results, RunError
from kvcomp.benchmarks.settings import Settings
from kvcomp.benchmarks.shards import Shard
from kvcomp.benchmarks.workers import Job, require_workers
from kvcomp.errors import KvcompError
from kvcomp.integrations.loading import Loading

SAMPLES = 5
TIMES = ("ms_per_token", "prefill_s", "prefill_own_s", "peak_mib")


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert bench(tiny, folder / "run", folder / "log") == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.fixture(scope="module")
def array(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in two shards."""
    folder = tmp_path_factory.mktemp("array")
    for shard in ("2/2", "1/2"):
        assert bench(tiny, folder / "run", folder / "log", "--shard", shard) == 0, (folder / "log").read_text()
    return folder / "run"


def bench(model: Path, out: Path, log: Path, *more: str) -> int:
    return finish(start([*arguments(model, out, SAMPLES), *more], log))


def table(out: Path, *folders: Path) -> list[dict[str, Any]]:
    """The rows of a report without what is measured in seconds and resident bytes."""
    rows = [asdict(line.row) for line in publish(read_runs(folders), out).lines]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes that answer for another one."""
    children = psutil.Process(pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def test_processes_do_not_take_ctrl_c_from_their_start_on() -> None:
    code = """
from multiprocessing import get_context
from time import sleep
from kvcomp.benchmarks.workers import _uninterrupted
with _uninterrupted():
    process = get_context("spawn").Process(target=sleep, args=(60,), daemon=True)
    process.start()
print(next(line for line in open(f"/proc/{process.pid}/status") if line.startswith("SigBlk")).split()[1])
process.kill()
"""
    mask = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(mask, 16) >> (signal.SIGINT - 1) & 1


def test_shards_are_one_run(alone: Path, array: Path, tmp_path: Path) -> None:
    parts = [array / "shard-1-of-2", array / "shard-2-of-2"]
    first, second = map(answers, parts)
    assert {key[2] for key in first} == {0, 2, 4}
    assert {key[2] for key in second} == {1, 3}
    assert {**first, **second} == answers(alone)
    want = table(tmp_path, alone)
    assert table(tmp_path, array) == table(tmp_path, *parts) == table(tmp_path, *reversed(parts)) == want
    assert not (array / "samples.jsonl").exists()  # a report changes no samples


@pytest.mark.parametrize("shards", [("1/2", "2/2"), ("2/2",), ("1/3", "3/3")])
def test_the_run_goes_on_from_its_shards(tiny: Path, alone: Path, tmp_path: Path, shards: tuple[str, ...]) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    for shard in shards:
        assert bench(tiny, out, log, "--shard", shard) == 0, log.read_text()
    assert bench(tiny, out, log) == 0, log.read_text()
    assert answers(out) == answers(alone)
    assert table(tmp_path / "report", out) == table(tmp_path / "report", alone)
    assert bench(tiny, out, log) == 0, log.read_text()
    assert answers(out) == answers(alone)


def test_absent_shards_are_named(array: Path, tmp_path: Path) -> None:
    part = tmp_path / "run" / "shard-2-of-2"
    part.mkdir(parents=True)
    for name in ("config.json", "samples.jsonl"):
        (part / name).write_bytes((array / part.name / name).read_bytes())
    with pytest.warns(UserWarning, match="lacks 1 of 2 shards, the first of them 1/2"):
        read_runs([tmp_path / "run"])


def test_what_is_no_part_of_a_run_is_refused(array: Path, tmp_path: Path) -> None:
    for name, change in (("shard-1-of-2", {}), ("shard-2-of-2", {"seed": 7})):
        (tmp_path / name).mkdir()
        config = json.loads((array / name / "config.json").read_text())
        config["settings"] |= change
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "samples.jsonl").write_bytes((array / name / "samples.jsonl").read_bytes())
    with pytest.raises(RunError, match=r"no part of the same run.*seed"):
        read_runs([tmp_path])
    assert len(read_runs([tmp_path / "shard-1-of-2", tmp_path / "shard-2-of-2"])) == 2  # two runs to compare
    config = json.loads((array / "shard-1-of-2" / "config.json").read_text())
    (tmp_path / "shard-2-of-2" / "config.json").write_text(json.dumps({**config, "shard": "2/2"}))
    record = json.loads((array / "shard-1-of-2" / "samples.jsonl").read_text().splitlines()[0])
    (tmp_path / "shard-2-of-2" / "samples.jsonl").write_text(json.dumps({**record, "prediction": "other"}) + "\n")
    with pytest.raises(RunError, match=r"contradicts .*Remove one of the two"):
        read_runs([tmp_path])


@pytest.mark.parametrize("text", ["0/2", "3/2", "x", "", "1", "1/0", "-1/2", "1/2/3", "1.5/2", "٣/٤", "1/99999"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(RunError, match=r"^shard: .* is none: expected i/n [^.]*\.$"):
        Shard.parse(text)


def test_every_sample_is_of_one_shard() -> None:
    for count in (1, 2, 3, 7):
        shards = [Shard.parse(f"{n}/{count}") for n in range(1, count + 1)]
        assert all(sum(shard.has(place) for shard in shards) == 1 for place in range(20))


@pytest.mark.parametrize(
    ("number", "engine", "gpus", "said"),
    [
        (0, "huggingface", 0, "between 1 and"),
        (100_000, "huggingface", 0, "between 1 and"),
        (2, "vllm", 0, "one process a stack"),
        (3, "huggingface", 2, "more than the 2 GPUs"),
    ],
)
def test_workers_that_cannot_be_had_are_refused(
    monkeypatch: pytest.MonkeyPatch, number: int, engine: str, gpus: int, said: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(RunError, match=rf"^workers: .*{said}"):
        require_workers(number, Settings("m", ("niah_single_1",), (400,), 1, ("none",), engine=engine))


def test_an_empty_shard_and_wrong_values_are_refused_in_two_lines(tiny: Path, tmp_path: Path) -> None:
    for more, said in (
        (["--shard", "9/9"], "shard: 9/9 has nothing to answer"),
        (["--shard", "0/2"], "shard: '0/2' is none"),
        (["--workers", "2", "--engine", "vllm"], "workers: --engine vllm"),
        (["--workers", "0"], "--workers"),
    ):
        log = tmp_path / "log"
        assert bench(tiny, tmp_path / "run", log, *more) == 2
        assert said in log.read_text()
        assert "Traceback" not in log.read_text()
        assert not (tmp_path / "run").exists()
        log.unlink()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_a_killed_worker_had_not_sent_another_answers(
    tiny: Path, alone: Path, capsys: pytest.CaptureFixture[str], after: int
) -> None:
    settings = Settings(str(tiny), ("niah_single_1",), (400,), SAMPLES, STACKS, max_new_tokens=6)
    jobs = [Job("niah_single_1", 400, index, settings.stacks) for index in range(SAMPLES)]
    found: list[Record] = []
    with closing(workers.answers(settings, jobs, 2)) as said:
        victim = None
        for record in said:
            found += [record] if isinstance(record, Record) else []
            if (
                victim is None and len(found) == after
            ):  # no process has more than one sample until the next is asked for
                victim = min(multiprocessing.active_children(), key=lambda process: process.name)
                victim.kill()
    assert "ended by signal 9" in capsys.readouterr().err
    assert not multiprocessing.active_children()
    want = answers(alone)
    assert sorted(record.key for record in found) == sorted(want)
    assert all(record.prediction == want[record.key].prediction for record in found)


def test_a_killed_worker_leaves_the_run_as_it_would_have_been(tiny: Path, alone: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = start([*arguments(tiny, out, SAMPLES), "--workers", "2"], log)
    wait_for(process, out, 1)
    assert process.pid is not None
    for victim in workers_of(process.pid)[:1]:
        victim.kill()
    assert finish(process) == 0, log.read_text()
    assert answers(out) == answers(alone)
    assert table(tmp_path / "report", out) == table(tmp_path / "report", alone)


def test_a_run_whose_workers_are_all_killed_continues(tiny: Path, alone: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = start([*arguments(tiny, out, SAMPLES), "--workers", "2"], log)
    wait_for(process, out, 1)
    assert process.pid is not None
    for worker in workers_of(process.pid):
        worker.kill()
    if finish(process):  # not all answers were there
        assert "Traceback" not in log.read_text()
        assert "the same command continues" in log.read_text()
        assert 1 <= len(lines(out)) < 2 * SAMPLES
    assert bench(tiny, out, log) == 0, log.read_text()  # also by one process
    assert answers(out) == answers(alone)
    assert "processes at once" in (out / "report.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_run(tiny: Path, alone: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    process = start([*arguments(tiny, out, SAMPLES), "--workers", "2"], log)
    wait_for(process, out, 1)
    assert process.pid is not None
    team = workers_of(process.pid)
    for worker in team if number == signal.SIGINT else []:
        worker.send_signal(signal.SIGINT)  # Ctrl-C is for all processes of a terminal
    os.kill(process.pid, number)
    assert finish(process) == (130 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 60
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in team):
        assert time.monotonic() < deadline, "a worker goes on"
        time.sleep(0.05)
    assert "Traceback" not in log.read_text()
    assert bench(tiny, out, log, "--workers", "2") == 0, log.read_text()
    assert answers(out) == answers(alone)


def test_a_folder_of_a_shard_is_continued_as_that_shard(array: Path, tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert bench(tiny, array / "shard-1-of-2", log) == 2
    assert "shard 1/2" in log.read_text()


def test_settings_do_not_know_of_processes() -> None:
    settings = Settings("m", ("niah_single_1",), (400,), 1, ("none",))
    assert not {"shard", "workers"} & set(asdict(settings))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shards.txt").touch()
    with pytest.raises(RunError, match="holds no kvcomp run"):
        Results(tmp_path, {"settings": {}, "versions": {}, "machine": {}})


def test_a_model_on_several_devices_has_one_process() -> None:
    settings = Settings("m", ("niah_single_1",), (400,), 1, ("none",), loading=Loading(device_map="auto"))
    with pytest.raises(KvcompError, match=r"^device-map: each of --workers"):
        require_workers(2, settings)
    require_workers(1, settings)
