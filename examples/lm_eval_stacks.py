"""lm-eval over stacks: the same task, answered from caches that went through each of them.

    pip install "kvcomp[bench]"
    python examples/lm_eval_stacks.py

Any task of lm-eval works. `kvcomp_niah_single_1`, RULER's needle in a haystack, needs no download.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

from kvcomp.benchmarks.lm_eval import tasks
from kvcomp.benchmarks.lm_eval.model import KvcompLM
from kvcomp.integrations.huggingface.models import load_model

STACKS = ("none", "kivi(bits=4)", "snapkv(keep=0.25, kernel=31) + kivi(bits=4)")


class MeasuredLM(KvcompLM):
    """Also notes what the caches held: of each answer, its `Memory`."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.caches = []

    def _start(self, *args: object) -> object:
        self.caches.append(super()._start(*args))
        return self.caches[-1]


def main(
    task: str = "kvcomp_niah_single_1",
    context: int = 1024,
    samples: int = 3,
    stacks: tuple[str, ...] = STACKS,
    model_name: str = "smollm2-135m",
) -> dict[str, dict[str, float]]:
    model, tokenizer = load_model(model_name)
    metadata = {"pretrained": model_name, "context": context, "samples": samples}
    figures = {}
    print(f"{task}, {context} tokens, {samples} samples\n\n{'':46}score   held, MiB   against DynamicCache")
    with tempfile.TemporaryDirectory() as folder:
        tasks.write(Path(folder))
        known = TaskManager(include_path=folder, metadata=metadata)
        for stack in stacks:
            lm = MeasuredLM(model, stack, tokenizer)
            found = lm_eval.simple_evaluate(
                lm, tasks=[task], limit=samples, task_manager=known, metadata=metadata, bootstrap_iters=0
            )
            score = found["results"][task]["score,none"]
            held = sum(cache.memory().held for cache in lm.caches) / len(lm.caches)
            dense = sum(cache.memory().dense for cache in lm.caches) / len(lm.caches)
            figures[stack] = {"score": score, "held": held, "dense": dense}
            print(f"{stack:46}{score:5.2f}{held / 2**20:12.2f}{dense / held:15.2f} times less")
    return figures


if __name__ == "__main__":
    main()
