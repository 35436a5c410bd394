"""`kvcomp report`: one run anew, several side by side, and what is no run."""

from __future__ import annotations

import csv
import errno
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
from command import refused, run

from kvcomp.benchmarks.results import Record, Results

KIVI = "kivi(bits=2)"


def record(**values: Any) -> Record:
    default = {
        "task": "niah_single_1",
        "context": 512,
        "index": 0,
        "stack": "none",
        "hash": "none",
        "score": 1.0,
        "prediction": "x",
        "references": ["x"],
        "depth": 0.31,
        "tags": [],
        "origin": "",
        "prompt_tokens": 500,
        "new_tokens": 4,
        "effective_bits": 16.0,
        "held": 2**20,
        "held_dense": 2**20,
        "read": 2**20,
        "read_dense": 2**20,
        "ms_per_token": 5.0,
        "prefill_s": 0.5,
    }
    return Record(**{**default, **values})


def save(folder: Path, records: list[Record], **settings: Any) -> Path:
    config = {
        "command": f"kvcomp bench --out {folder.name}",
        "settings": {"model": "tiny", "tasks": ["niah_single_1"], "samples": 4, "seed": 0, "chat": False, **settings},
        "data": {},
        "versions": {"kvcomp": "0"},
        "machine": {"cpu": "a cpu", "cores": 2, "threads": 1, "gpu": None},
    }
    results = Results(folder, config)
    for one in records:
        results.append(one)
    return folder


def answers(scores: dict[str, list[float]], **values: Any) -> list[Record]:
    return [
        record(stack=stack, hash=stack, index=index, score=score, references=[f"{index}"], **values)
        for stack, given in scores.items()
        for index, score in enumerate(given)
    ]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "summary.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def headings(out: Path) -> list[str]:
    page = (out / "report.html").read_text(encoding="utf-8")
    return re.findall(r"<h[1-3]>(.*?)</h[1-3]>", page)


class Balance(HTMLParser):
    """Fails where an element is closed that is not the one open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_run_of_bench_is_rebuilt_as_it_was(tmp_path: Path) -> None:
    tiny, out = tiny_folder.save(tmp_path / "tiny"), tmp_path / "run"
    stacks = ("--stack", "none", "--stack", KIVI)
    tasks = ("--tasks", "niah_single_1,niah_multikey_1", "--context", "400,500", "--samples", 2, "--max-new-tokens", 2)
    first = run("bench", "--model", tiny, *tasks, *stacks, "--out", out)
    assert first.exit_code == 0, first.output
    before = contents(out)
    for name in ("report.html", "summary.csv"):
        (out / name).unlink()
    again = run("report", out)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert contents(out) == before
    elsewhere = run("report", out, "--out", tmp_path / "elsewhere")
    assert elsewhere.exit_code == 0, elsewhere.output
    assert (tmp_path / "elsewhere" / "report.html").read_bytes() == before["report.html"]
    assert headings(out) == [
        f"KV-cache compression on {tiny}",
        "400 tokens",
        "Accuracy by task, %",
        "500 tokens",
        "Accuracy by task, %",
        "Accuracy by length",
        "Accuracy by depth of the answer and length, %",
        "How to read the columns",
        "How it was made",
    ]
    balance = Balance()
    balance.feed(before["report.html"].decode())
    assert balance.open == []


def test_prefill_is_told_per_stack_and_a_peak_where_there_is_one(tmp_path: Path) -> None:
    old = save(tmp_path / "old", answers({"none": [1, 0]}))
    result = run("report", old)
    assert "peak" not in result.stdout + (old / "report.html").read_text(encoding="utf-8")
    assert "peak_mib" not in rows(old)[0]
    assert (rows(old)[0]["prefill_s"], rows(old)[0]["prefill_own_s"]) == ("0.5000", "")
    records = [
        *answers({"none": [1, 0]}, prefill_own_s=0.004, peak=5 * 2**20),
        *answers({"chunks": [1, 0]}, prefill_s=0.0, prefill_own_s=12.34),
    ]
    new = save(tmp_path / "new", records)
    result = run("report", new)
    assert re.search(r"none +0\.50 \+ 0\.004 +5\.0 *\n", result.stdout)
    assert re.search(r"chunks +12\.3 alone +– *\n", result.stdout)
    assert [row["peak_mib"] for row in rows(new)] == ["5.0000", ""]
    page = (new / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'data-label="(?:prefill s|peak MiB)">([^<]*)<', page) == [
        "0.50 + 0.004",
        "5.0",
        "12.3 alone",
        "–",
    ]
    assert "<dt>peak MiB</dt>" in page


def test_groups_have_a_mean_over_their_tasks(tmp_path: Path) -> None:
    records = [*answers({"none": [1, 1, 0]}), *answers({"none": [0], KIVI: [1]}, task="vt")]
    folder = save(tmp_path / "run", records)
    result = run("report", folder)
    assert "mean of 2 ruler tasks" in result.stdout
    first, second = rows(folder)
    assert (first["mean of 2 ruler tasks"], first["accuracy"]) == ("0.3333", "0.5000")
    assert second["mean of 2 ruler tasks"] == ""
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert re.search(r'<tr class="mean"><td>mean of 2 ruler tasks</td>\s*<td[^>]*>33</td>\s*<td>–</td>', page)


def test_runs_of_texts_alone_say_nothing_of_common_samples(tmp_path: Path) -> None:
    texts = answers({"none": [2.0]}, task="perplexity_text", metric="nll", depth=None)
    a, b = (save(tmp_path / name, texts) for name in "ab")
    c = save(tmp_path / "c", answers({"none": [1]}))
    for others in ((a, b), (a, c), (c, a)):
        result = run("report", *others, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
        assert "in common" not in result.stdout + (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_section_is_there_only_with_its_data(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", answers({"none": [1, 0]}, depth=None))
    assert run("report", folder).exit_code == 0
    assert headings(folder) == [
        "KV-cache compression on tiny",
        "512 tokens",
        "How to read the columns",
        "How it was made",
    ]


def test_the_map_counts_where_the_answers_lie(tmp_path: Path) -> None:
    records = [record(index=i, depth=d, score=s) for i, (d, s) in enumerate([(0.31, 1), (0.39, 0), (1.0, 1), (0, 0)])]
    folder = save(tmp_path / "run", records)
    assert run("report", folder).exit_code == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    table = page[page.index("<th>depth</th>") :]
    found = dict(re.findall(r"<tr><td>(\d+–\d+)</td>\s*<td[^>]*>([^<]*)</td>", table[: table.index("</table>")]))
    assert found == {f"{10 * i}–{10 * i + 10}": {0: "0", 3: "50", 9: "100"}.get(i, "–") for i in range(10)}


def test_the_same_samples_are_paired(tmp_path: Path) -> None:
    a = save(tmp_path / "a", answers({"none": [1, 1, 1, 0], KIVI: [1, 0, 0, 0]}))
    b = save(tmp_path / "b", answers({"none": [1, 1, 1, 0], KIVI: [1, 1, 0, 0]}), stacks=["x"])
    before = contents(a), contents(b)
    result = run("report", a, b, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (contents(a), contents(b)) == before
    first, second = [row for row in rows(tmp_path / "out") if row["stack"] == KIVI]
    assert (first["run"], first["first_change"]) == ("a", "")
    assert (second["run"], float(second["first_change"]), second["first_paired"]) == ("b", 0.25, "True")
    assert float(second["first_low"]) <= 0.25 <= float(second["first_high"])
    assert float(second["change"]) == -0.25
    assert "stacks differs: a: –; b: x" in result.stdout
    assert "b has 4 of its 4 prompts in common with a" in result.stdout
    assert "unpaired" not in result.stdout
    assert "What differs" in headings(tmp_path / "out")


def test_some_of_the_samples_are_paired_where_some_are_the_same(tmp_path: Path) -> None:
    a = save(tmp_path / "a", answers({KIVI: [1, 0]}))
    b = save(tmp_path / "b", answers({KIVI: [1, 1, 0, 0]}))
    assert run("report", a, b, "--out", tmp_path / "out").exit_code == 0
    row = rows(tmp_path / "out")[1]
    assert (row["samples"], row["first_samples"], float(row["first_change"])) == ("4", "2", 0.5)


@pytest.mark.parametrize("other", [{"seed": 1}, {"chat": True}])
def test_other_samples_are_not_paired_and_said_not_to_be(tmp_path: Path, other: dict[str, Any]) -> None:
    a = save(tmp_path / "a", answers({KIVI: [1, 1]}))
    b = save(tmp_path / "b", answers({KIVI: [1, 0]}), **other)
    result = run("report", a, b, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "b and a have no samples in common" in result.stdout
    assert "* unpaired" in result.stdout
    row = rows(tmp_path / "out")[1]
    assert (row["first_paired"], float(row["first_change"])) == ("False", -0.5)
    assert "unpaired" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_other_tasks_and_contexts_are_not_compared(tmp_path: Path) -> None:
    a = save(tmp_path / "a", answers({KIVI: [1, 1]}))
    b = save(tmp_path / "b", answers({KIVI: [1, 0]}, task="vt") + answers({KIVI: [1]}, context=1024))
    assert run("report", a, b, "--out", tmp_path / "out").exit_code == 0
    assert [row["first_change"] for row in rows(tmp_path / "out")] == ["", "", ""]


def test_the_dense_answers_of_another_run_stand_in(tmp_path: Path) -> None:
    a = save(tmp_path / "a", answers({"none": [1, 1, 1, 1]}))
    b = save(tmp_path / "b", answers({KIVI: [1, 1, 0, 0]}))
    c = save(tmp_path / "c", answers({KIVI: [1, 1, 0, 0]}), model="another")
    assert run("report", a, b, c, "--out", tmp_path / "out").exit_code == 0
    assert [row["change"] for row in rows(tmp_path / "out")] == ["", "-0.5000", ""]


def test_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    a, b = (save(tmp_path / name / "run", answers({"none": [1]})) for name in "ab")
    assert run("report", a, b, "--out", tmp_path / "out").exit_code == 0
    assert [row["run"] for row in rows(tmp_path / "out")] == ["run (1)", "run (2)"]


def test_a_line_cut_short_is_left_out_and_left_alone(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", answers({"none": [1, 0, 0]}))
    cut = (folder / "samples.jsonl").read_bytes()[:-9]
    (folder / "samples.jsonl").write_bytes(cut)
    result = run("report", folder)
    assert result.exit_code == 0, result.output
    assert "warning:" in result.stderr
    assert "cut short and is left out" in result.stderr
    assert (folder / "samples.jsonl").read_bytes() == cut
    assert rows(folder)[0]["samples"] == "2"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", answers({"none": [1, 0, 0]}))
    (tmp_path / "empty").mkdir()
    refused(run("report", tmp_path / "nowhere"), "nowhere", "not a folder")
    refused(run("report", tmp_path / "empty"), "empty", "config.json")
    refused(run("report", folder, folder, "--out", tmp_path / "out"), "twice")
    copy = shutil.copytree(folder, tmp_path / "copy")
    refused(run("report", folder, copy), "--out")
    refused(run("report", folder, copy, "--out", copy), "copy", "overwritten")
    refused(run("report", folder, "--out", copy), "copy", "overwritten")
    lines = (copy / "samples.jsonl").read_text().splitlines()
    (copy / "samples.jsonl").write_text("\n".join([lines[0], "{}", lines[2]]) + "\n")
    refused(run("report", folder, copy, "--out", tmp_path / "out"), "copy", "line 2", "damaged")
    (copy / "samples.jsonl").write_text("")
    refused(run("report", copy), "no finished sample")
    (copy / "config.json").write_text(json.dumps({"settings": 3}))
    refused(run("report", copy), "config.json", "not written by kvcomp bench")
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "run", answers({"none": [1, 0]}))
    assert run("report", folder).exit_code == 0
    before = contents(folder)

    def full(self: Path, *_: object, **__: object) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    refused(run("report", folder), "summary.csv", "No space left")
    assert contents(folder) == before
    (tmp_path / "file").write_bytes(b"")
    refused(run("report", folder, "--out", tmp_path / "file" / "out"), "out", "cannot be written")


def test_records_of_another_layout_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", answers({"none": [1, 0]}))
    values = asdict(replace(record(), index=9))
    del values["depth"]
    text = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(json.dumps(values) + "\n" + text)
    refused(run("report", folder), "line 1", "not a whole record")
