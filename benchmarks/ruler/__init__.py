"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv:2404.06654), generated to any length of the model's own tokens.

Templates, haystacks, kinds and numbers of needles, distractors, examples, metrics and the numbers of new tokens are
those of the authors' generator (github.com/NVIDIA/RULER, scripts/data/synthetic and scripts/synthetic.yaml). Prompts
differ from theirs in the random draws, and knowingly in this:

- Plain completion unless the chat template is asked for: the prompt is the task's template with its answer prefix, as
  the authors give it to base models. In chat, the template is a user's turn and the answer prefix begins the model's.
- Each prompt fills its own context to within 1/512 of it or one unit of haystack (a word, a line, a document). The
  authors search once, on other draws, and then shorten by steps of up to 500 words.
- Sentences of essays are split by a rule that needs no download, not by NLTK's model.
- Without the essays, a public-domain novel from the package is the haystack; `Sample.origin` says which it was.
- Keys, values and variables that mean different things are different; the authors let chance decide.
- `qa_1` and `qa_2` draw their questions in a seeded order, since neighbours in the files share their paragraph. The
  authors take the first ones. Where a context is too small for the ten documents of a HotpotQA question, those
  that hold the answer stay; the authors' generator does not end there.
- `cwe` ends short of a context that needs more words than the lists have, unless `english_words.json` is there.
- An answer ends when it scores 1, which more text cannot change. The authors and lm-eval write all new tokens.

lm-eval's port (`lm_eval/tasks/ruler`) differs further: it scores `qa_*` by the fraction of the reference answers found,
not by whether one is; it gives `cwe` without its example; `vt` ends without the space that the authors' prompt
ends with, and misspells "assigned"; `fwe` sizes its vocabulary by the whole context.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvcomp.benchmarks.data import Data
from kvcomp.benchmarks.ruler.counting import CommonWords, FrequentWords
from kvcomp.benchmarks.ruler.niah import Niah
from kvcomp.benchmarks.ruler.qa import HOTPOTQA, SQUAD, Qa
from kvcomp.benchmarks.ruler.task import RulerTask, string_match_all, string_match_part
from kvcomp.benchmarks.ruler.tracking import Tracking
from kvcomp.benchmarks.samples import Sample, TaskError

__all__ = [
    "TASKS",
    "RulerTask",
    "Sample",
    "TaskError",
    "find_task",
    "generate",
    "string_match_all",
    "string_match_part",
]

TASKS: dict[str, RulerTask] = {
    task.name: task
    for task in (
        Niah("niah_single_1", "noise"),
        Niah("niah_single_2", "essays"),
        Niah("niah_single_3", "essays", value="uuid"),
        Niah("niah_multikey_1", "essays", keys=4),
        Niah("niah_multikey_2", "needles"),
        Niah("niah_multikey_3", "needles", key="uuid", value="uuid"),
        Niah("niah_multivalue", "essays", values=4),
        Niah("niah_multiquery", "essays", keys=4, queries=4),
        Tracking("vt"),
        CommonWords("cwe"),
        FrequentWords("fwe"),
        Qa("qa_1", SQUAD),
        Qa("qa_2", HOTPOTQA),
    )
}


def generate(
    task: str, tokenizer: Any, context: int, samples: int, seed: int, data: Data = None, chat: bool = False
) -> list[Sample]:
    """Return the first `samples` prompts of the task; each fits `context` tokens together with its answer."""
    return find_task(task, chat).generate(tokenizer, context, samples, seed, data)


def find_task(name: str, chat: bool = False) -> RulerTask:
    """Return the task of that name, or raise TaskError with the names there are."""
    if name not in TASKS:
        raise TaskError(f"tasks: no task {name!r}. There are: {', '.join(TASKS)}; `ruler` stands for all of them.")
    return replace(TASKS[name], chat=chat)
