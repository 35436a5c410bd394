"""kvcomp's tasks within lm-eval: the prompts and scores of `kvcomp bench`, for any model of lm-eval."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import yaml

pytest.importorskip("lm_eval", reason="pip install kvcomp[bench]")
pytest.importorskip("datasets", reason="pip install kvcomp[bench]")
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvcomp import Stack
from kvcomp.benchmarks import longbench, ruler
from kvcomp.benchmarks.answering import answer
from kvcomp.benchmarks.lm_eval import tasks as lm_eval_tasks
from kvcomp.benchmarks.ruler import generate
from kvcomp.integrations.huggingface.models import load_model

CONTEXT, SAMPLES = 500, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("tasks")
    lm_eval_tasks.write(written)
    return written


def test_every_task_is_written(tasks: Path) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = {f"kvcomp_{name}" for name in (*ruler.TASKS, *longbench.TASKS)}
    assert set(manager.all_subtasks) == names
    assert set(manager.all_tags) == {"kvcomp_ruler", "kvcomp_longbench", "kvcomp_longbench_e"}


def test_the_dense_row_is_lm_evals_own_model(folder: Path, tasks: Path) -> None:
    """On the same samples of niah_single_1, the row `none` of `kvcomp bench` is lm-eval's `hf` model: prompts, answers
    and scores are equal, character for character. Both decode greedily. lm-eval writes all new tokens unless the model
    ends the text; the bench also ends an answer whose score is settled at 1, so up to there, the earlier stop."""
    manager = TaskManager(
        include_path=str(tasks),
        include_defaults=False,
        metadata={"pretrained": str(folder), "context": CONTEXT, "samples": SAMPLES},
    )
    theirs = simple_evaluate(
        model=HFLM(str(folder), device="cpu", dtype="float32", batch_size=1),
        tasks=["kvcomp_niah_single_1"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    model, tokenizer = load_model(str(folder), device="cpu")
    samples = generate("niah_single_1", tokenizer, CONTEXT, SAMPLES, seed=0)
    logged = sorted(theirs["samples"]["kvcomp_niah_single_1"], key=lambda one: one["doc_id"])
    assert len(logged) == len(samples) == SAMPLES
    scores = []
    for sample, log in zip(samples, logged, strict=True):
        (ours,) = answer(model, tokenizer, sample, CONTEXT, [Stack.parse("none")], None)
        assert log["arguments"][0][0] == sample.prompt
        (prediction,) = log["resps"][0]
        assert ours.prediction
        if ours.score == 1:
            assert prediction.startswith(ours.prediction)
        else:
            assert prediction == ours.prediction
        assert log["score"] == ours.score
        scores.append(ours.score)
    assert theirs["results"]["kvcomp_niah_single_1"]["score,none"] == pytest.approx(sum(scores) / SAMPLES)


def test_answers_are_scored_as_by_the_bench() -> None:
    (sample,) = generate("niah_multivalue", _Words(), 2048, 1, seed=1)
    doc: dict[str, Any] = {**vars(sample), "references": list(sample.references), "classes": [], "tags": []}
    half = " and ".join(sample.references[:2])
    assert lm_eval_tasks.process_results(doc, [half]) == {"score": 0.5}
    assert lm_eval_tasks.process_results(doc, [" ".join(sample.references)]) == {"score": 1.0}


class _Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": text.split()})


def test_the_command_runs_them_on_a_stack(folder: Path, tmp_path: Path) -> None:
    """Also beside tasks of one's own, and without metadata about the model, which --model_args already has."""
    own = {"task": "mine", "dataset_path": "json", "output_type": "generate_until", "test_split": "test"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    command = [sys.executable, "-m", "kvcomp.benchmarks.lm_eval", "run", "--model", "kvcomp", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},stack=kivi(bits=4;group=16) + window(recent=16)"]
    command += [
        "--tasks",
        "kvcomp_niah_single_1,kvcomp_niah_multikey_2",
        "--include_path",
        str(tmp_path),
        "--limit",
        "1",
    ]
    command += ["--metadata", json.dumps({"context": 700})]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "kvcomp_niah_single_1" in run.stdout
    assert "score" in run.stdout
    missing = [*command[:-2], "--metadata", json.dumps({"context": 60})]
    run = subprocess.run(missing, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: context: 60 is less than")
