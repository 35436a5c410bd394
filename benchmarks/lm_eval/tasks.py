"""RULER and LongBench, as kvcomp writes and scores them, as tasks of lm-eval: `kvcomp_niah_single_1`, `kvcomp_qasper`.

`python -m kvcomp.benchmarks.lm_eval` knows them all, for any model of lm-eval:

    python -m kvcomp.benchmarks.lm_eval run --model hf --model_args pretrained=DIR \\
        --tasks kvcomp_niah_single_1,kvcomp_qasper --metadata '{"context": 4096, "data": "hub"}' --limit 5

The tags `kvcomp_ruler`, `kvcomp_longbench` and `kvcomp_longbench_e` stand for all of theirs. For lm-eval's own command,
`python -m kvcomp.benchmarks.lm_eval.tasks DIR` writes the task files, and `--include_path DIR` reads them.

Prompts are those of `kvcomp bench` for the same tokenizer, context, seed and data. lm-eval writes all new tokens, where
the bench ends an answer whose score is settled. A tokenizer that begins a text with a token of its own needs
`add_bos_token=True` in `--model_args` for the same tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcomp.benchmarks import longbench, ruler
from kvcomp.benchmarks.samples import Sample
from kvcomp.errors import KvcompError

if TYPE_CHECKING:
    import datasets

PREFIX = "kvcomp_"
GROUPS: dict[str, Mapping[str, Any]] = {
    "ruler": ruler.TASKS,
    "longbench": longbench.V1_TASKS,
    "longbench_e": longbench.E_TASKS,
}


def _find(name: str, chat: bool = False) -> Any:
    return (ruler if name in ruler.TASKS else longbench).find_task(name, chat)


def make_dataset(
    task: str,
    pretrained: Any = None,
    tokenizer: Any = None,
    context: int = 2048,
    samples: int = 100,
    seed: int = 0,
    data: str | None = None,
    chat: bool = False,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """Return the samples of a task as lm-eval's split "test"; the arguments come from `--metadata` and `--model_args`.

    pretrained, tokenizer: the model whose tokens fill the context, as for `kvcomp bench`; the tokenizer wins.
    context, samples, seed, data, chat: as for `kvcomp bench`.
    """
    import datasets

    from kvcomp.integrations.huggingface.models import load_tokenizer

    name = tokenizer or pretrained
    if not isinstance(name, str):
        raise KvcompError(f"{PREFIX}{task}: needs a tokenizer: pretrained=... in --model_args or --metadata.")
    made = _find(task, chat).generate(load_tokenizer(name), context, samples, seed, data)
    return {"test": datasets.Dataset.from_list([asdict(sample) for sample in made])}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the score of the answer, from 0 to 1."""
    tuples = {name: tuple(doc[name] or ()) for name in ("references", "classes", "tags")}
    sample = Sample(**{**doc, **tuples})
    return {"score": _find(sample.task).score(results[0], sample)}


def write(folder: Path) -> None:
    """Write a task file for each of the tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*ruler.TASKS, *longbench.TASKS):
        tags = [PREFIX + group for group, tasks in GROUPS.items() if name in tasks]
        lines = {
            "task": PREFIX + name,
            "tag": tags,
            "dataset_kwargs": {"task": name},
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "prompt",
            "doc_to_target": "references",
            "target_delimiter": "",
            "generation_kwargs": {"do_sample": False, "max_gen_toks": _find(name).max_new_tokens, "until": []},
            "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
        text = [f"{key}: {json.dumps(value)}" for key, value in lines.items()]  # JSON is YAML
        for key, function in (("custom_dataset", make_dataset), ("process_results", process_results)):
            text.append(f"{key}: !function kvcomp.benchmarks.lm_eval.tasks.{function.__name__}")
        (folder / f"{PREFIX}{name}.yaml").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m kvcomp.benchmarks.lm_eval.tasks DIR")
    write(Path(sys.argv[1]))
