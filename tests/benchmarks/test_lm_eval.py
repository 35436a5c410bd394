"""lm-eval with a stack: the answers of lm-eval's own model where nothing is compressed, and a stock task end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_folder

pytest.importorskip("lm_eval", reason="pip install kvcomp[bench]")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from kvcomp import SpecError
from kvcomp.benchmarks.lm_eval.model import KvcompLM

TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_uncompressed_it_answers_as_lm_evals_own_model(folder: Path, batch_size: int) -> None:
    options = {"device": "cpu", "dtype": "float32", "batch_size": batch_size}
    theirs, ours = HFLM(str(folder), **options), KvcompLM(str(folder), "none", **options)
    until = {"until": ["\n"], "max_gen_toks": 12}
    questions = instances("generate_until", [(TEXT[i : 200 + 40 * i], until) for i in range(3)])
    assert ours.generate_until(questions) == theirs.generate_until(questions)
    scored = instances(
        "loglikelihood", [(TEXT[:300], " blue sky"), (TEXT[:50], " green"), (TEXT[:9], "grass is green.")]
    )
    pairs = zip(ours.loglikelihood(scored), theirs.loglikelihood(scored), strict=True)
    for (likelihood, greedy), (expected, also_greedy) in pairs:
        assert likelihood == pytest.approx(expected, abs=1e-3)
        assert greedy == also_greedy


def test_a_stack_changes_what_is_scored(folder: Path) -> None:
    dense, coarse = (
        KvcompLM(str(folder), s, device="cpu") for s in ("none", "kivi(bits=2;group=16) + window(recent=0)")
    )
    assert str(coarse.stack) == "kivi(bits=2, group=16) + window(sinks=0)"
    scored = instances("loglikelihood", [(TEXT, " blue sky over there")])
    assert dense.loglikelihood(scored)[0][0] != pytest.approx(coarse.loglikelihood(scored)[0][0], abs=1e-4)


def test_a_mistyped_stack_is_named(folder: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'kivi'"):
        KvcompLM(str(folder), "kivy")


def test_the_command_runs_a_task(folder: Path, tmp_path: Path) -> None:
    """lm-eval's own command line, with the model `kvcomp` and a task of its plain YAML form over local data."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": TEXT[:120], "answer": a}) for a in (" blue", " green")))
    (tmp_path / "task.yaml").write_text(
        "task: local_words\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: perplexity}, {metric: acc}]\n'
    )
    arguments = f"pretrained={folder},stack=kivi(bits=4;group=16) + window(recent=16)"
    command = [sys.executable, "-m", "kvcomp.benchmarks.lm_eval", "run", "--model", "kvcomp", "--device", "cpu"]
    command += ["--model_args", arguments, "--tasks", "local_words", "--include_path", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "local_words" in run.stdout
    assert "perplexity" in run.stdout
