"""All tasks by name, and the names that stand for many of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvcomp.benchmarks import fidelity, longbench, perplexity, ruler
from kvcomp.benchmarks.data import Data, DataError, origin
from kvcomp.benchmarks.perplexity import Perplexity
from kvcomp.benchmarks.samples import Prompts, Task, TaskError
from kvcomp.text import quote

GROUPS: dict[str, Mapping[str, Prompts]] = {
    "ruler": ruler.TASKS,
    "longbench": longbench.V1_TASKS,
    "longbench_e": longbench.E_TASKS,
    "perplexity": perplexity.TASKS,
    "fidelity": fidelity.TASKS,
}


def find_task(name: str, chat: bool = False) -> Task | Perplexity:
    """Return the task of that name, or raise TaskError with the names there are.

    chat: in the model's chat template, except where that makes another task (`takes_chat`).
    """
    if name in ruler.TASKS:
        return ruler.find_task(name, chat)
    if name in longbench.TASKS:
        return longbench.find_task(name, chat)
    if name in perplexity.TASKS:
        return perplexity.TASKS[name]
    if name in fidelity.TASKS:
        return fidelity.TASKS[name]
    groups = "; ".join(f"{group} stands for {', '.join(tasks)}" for group, tasks in GROUPS.items())
    rest = [task for task in longbench.TASKS if not any(task in tasks for tasks in GROUPS.values())]
    raise TaskError(f"tasks: no task {quote(name)}. {groups}; there is also {', '.join(rest)}.")


def takes_chat(name: str) -> bool:
    """Whether prompts of a task can be put into a chat template: not few-shot examples, code and texts to continue."""
    return name in ruler.TASKS or (name in longbench.TASKS and longbench.TASKS[name].dataset.chat)


def all_tasks() -> tuple[str, ...]:
    """Return the names of all tasks."""
    return (*ruler.TASKS, *longbench.TASKS, *perplexity.TASKS, *fidelity.TASKS)


def choose(names: Sequence[str], data: Data) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the tasks that `names` stand for, and a line for each that is left out because its data is missing.

    Only what a group stands for is left out: a task that is named, or a group with no data at all, raises
    DataError. An unknown name raises TaskError.
    """
    chosen: dict[str, None] = {}
    left_out: dict[str, None] = {}
    for name in names:
        missing = []
        for task in GROUPS.get(name, (name,)):
            try:
                find_task(task).count(1, data)
                chosen[task] = None
            except DataError as error:
                missing.append(error)
        if missing and (name not in GROUPS or len(missing) == len(GROUPS[name])):
            raise missing[0]
        left_out.update(dict.fromkeys(map(str, missing)))
    return tuple(chosen), tuple(left_out)


def expand(names: Sequence[str], data: Data) -> tuple[str, ...]:
    """Return the tasks that `names` stand for, each once; see `choose`."""
    return choose(names, data)[0]


def origins(names: Sequence[str], data: Data) -> dict[str, str]:
    """Say for every text that the tasks read which one it is."""
    return {source.name: origin(source, data) for name in names for source in find_task(name).sources}
