"""LongBench: 21 datasets of real long texts (Bai et al. 2024, arXiv:2308.14508), LongBench-E, and LongBench v2.

Prompts, metrics and the cut in the middle are the authors' (arXiv:2412.15204 for v2). Three things differ,
knowingly: prompts are plain completions unless the chat template is asked for; decoding is greedy in v2 too;
and an answer ends as soon as more text cannot change its score. Reports give the mean over datasets; the authors'
own tables average within six kinds of tasks first.
"""

from kvcomp.benchmarks.longbench.tasks import (
    E_TASKS,
    TASKS,
    V1_TASKS,
    V2_TASKS,
    LongBench,
    cut_middle,
    find_task,
    samples,
    score,
)

__all__ = [
    "E_TASKS",
    "TASKS",
    "V1_TASKS",
    "V2_TASKS",
    "LongBench",
    "cut_middle",
    "find_task",
    "samples",
    "score",
]
