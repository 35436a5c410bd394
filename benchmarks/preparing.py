"""What is found out before anything is measured: which model answers, and which tasks fit which contexts."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

from kvcomp.benchmarks.chat import in_chat
from kvcomp.benchmarks.records import fingerprint_of
from kvcomp.benchmarks.results import Results, RunError
from kvcomp.benchmarks.samples import TaskError
from kvcomp.benchmarks.tasks import find_task
from kvcomp.errors import KvcompWarning
from kvcomp.fingerprint import Fingerprint
from kvcomp.integrations.configs import decoder_config, max_positions
from kvcomp.integrations.huggingface.models import load_config, load_tokenizer
from kvcomp.integrations.loading import Loading
from kvcomp.text import quote

Place = tuple[str, int]  # a task at a context


def require_positions(model: str, contexts: Iterable[int], loading: Loading) -> None:
    """Raise RunError where a context is longer than the model's; its weights are not loaded."""
    limit = max_positions(decoder_config(load_config(model, loading)))
    if limit is not None and max(contexts) > limit:
        raise RunError(f"context: {max(contexts)} is more than the {limit} tokens of {model}.")


def misfits(settings: Any, places: Collection[Place]) -> list[dict[str, Any]]:
    """The tasks that do not fit their context, as `left_out` of a configuration has them; settings: `Settings`.

    Raises:
        TaskError: one of them was asked for by its own name, a context is left without any task, or a chat template is
            missing.
    """
    tokenizer = load_tokenizer(settings.model, settings.loading)
    if settings.chat:
        in_chat(tokenizer, "")  # a template that is missing concerns every task
    found: dict[Place, TaskError] = {}
    for name, context in places:
        try:
            find_task(name, settings.chat).check(tokenizer, context, settings.samples, settings.seed, settings.data)
        except TaskError as error:
            if name in settings.named:
                raise
            found[name, context] = error
    for context in dict.fromkeys(context for _, context in places):
        errors = [found.get(place) for place in places if place[1] == context]
        if errors[0] is not None and all(errors):
            raise errors[0]
    return [{"task": name, "context": context, "reason": str(error)} for (name, context), error in found.items()]


def settle_model(results: Results, model: Fingerprint) -> None:
    """Note the model in a run's configuration; one that has answers of another is refused.

    A run of an older version does not say whose answers it holds: they are taken for this model's, with a warning.

    Raises:
        RunError: the run holds answers of another model.
    """
    there, folder = fingerprint_of(results.config), quote(str(results.folder))
    if there is None:
        if results.records:
            warnings.warn(
                f"{folder} does not say which weights its {len(results.records)} answers came from; they are taken for "
                f"those of {model.name}.",
                KvcompWarning,
                stacklevel=2,
            )
        results.note(model={"name": model.name, "config": model.config, "weights": model.weights})
        return
    if not there.same(model):
        what = "another model" if there.config != model.config else "the same architecture with other weights"
        raise RunError(
            f"out: {folder} holds answers of {quote(there.name)}, and --model is now {what}. Nothing was overwritten; "
            "choose another --out."
        )
