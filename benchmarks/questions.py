"""One context, many questions: `python -m kvcomp.benchmarks.questions --help`.

The context is prefilled before any question is known, compressed once, and every question is asked of a fork. A policy
that chooses by the prompt's last queries then does not know what it will be asked for.
"""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import torch
import typer
from rich.table import Table
from torch import Tensor

from kvcomp.benchmarks.intervals import accuracy_interval, paired_interval
from kvcomp.benchmarks.ruler.niah import NEEDLE, ONE, Niah
from kvcomp.console import Plain, run, track
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import Model, loads_model
from kvcomp.ledger import MIB

KIND: Final = "number"
ASKED = re.compile(
    re.escape(NEEDLE.format(values=f"{KIND}s", key="@", value="#")).replace("@", "(.+?)").replace("\\#", "(.+?)")
)
ANSWER = 16  # new tokens: a number has seven digits, each of them a token in some models


@dataclass
class Tally:
    """What was measured of one stack, an entry per context: share of right answers, bytes, seconds of prefill."""

    right: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    dense_s: list[float] = field(default_factory=list)
    own_s: list[float] = field(default_factory=list)


def split(prompt: str) -> tuple[str, list[tuple[str, str]]]:
    """A needle prompt as its context, and a question and its answer for every needle in it."""
    context, ask = prompt[: prompt.rindex("\n") + 1], ONE.split("{context}\n")[1]
    return context, [(ask.format(value=KIND, query=key), value) for key, value in ASKED.findall(context)]


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, prompt: str, stacks: list[str], tallies: list[Tally]) -> None:
    """Prefill the context once for all stacks, ask all its questions of each, and add what came out."""
    from kvcomp import CompressedCache
    from kvcomp.integrations.huggingface import prefill

    text, questions = split(prompt)
    context = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    caches = [CompressedCache(stack, model) for stack in stacks]
    filled = prefill(model, context, caches, tokenizer=tokenizer)
    for cache, done, tally in zip(caches, filled, tallies, strict=True):
        memory, right = cache.memory(), 0
        for question, answer in questions:
            asked = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
            right += answer in tokenizer.decode(_continue(model, cache.fork(), torch.cat([context, asked], 1)))
        tally.right.append(right / len(questions))
        tally.held.append(memory.held)
        tally.bits.append(memory.effective_bits)
        tally.dense_s.append(done.dense_s)
        tally.own_s.append(done.own_s)


def _continue(model: Any, cache: Any, ids: Tensor) -> Tensor:
    from kvcomp.integrations.huggingface.forward import generating_with

    out: Tensor = model.generate(ids, **generating_with(cache), max_new_tokens=ANSWER, do_sample=False)
    return out[0, ids.shape[1] :]


@loads_model
def main(
    stack: Annotated[
        list[str], typer.Option(help="A stack to measure; repeat it. The first is what others differ from.")
    ],
    model: Model = "smollm2-135m",
    context: Annotated[int, typer.Option(min=512, help="Tokens of context.")] = 2048,
    questions: Annotated[int, typer.Option(min=1, max=40, help="Needles, each of which is asked for.")] = 10,
    samples: Annotated[int, typer.Option(min=1, help="Contexts.")] = 8,
    data: Annotated[str | None, typer.Option(help="As for `kvcomp bench`.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the contexts.")] = 0,
    loading: Loading = DEFAULT,
) -> None:
    """Ask many questions about one context that was compressed before it was known what would be asked.

    Intervals are over contexts: the questions about one context are not independent."""
    from kvcomp.integrations.huggingface.models import load_model

    network, tokenizer = load_model(model, loading)
    task = Niah("questions", haystack="essays", value=KIND, keys=questions)
    tallies = [Tally() for _ in stack]
    prompts = task.generate(tokenizer, context, samples, seed, data)
    for sample in track(prompts, "contexts"):
        measure(network, tokenizer, sample.prompt, stack, tallies)
    table = Table(title=f"{model}, {context} tokens, {samples} contexts of {questions} questions")
    columns = ("stack", "bits", "held, MiB", "right, %", "against the first", "prefill, of dense")
    for column in columns:
        table.add_column(column, justify="left" if column == "stack" else "right", overflow="fold")
    for name, tally in zip(stack, tallies, strict=True):
        low, high = accuracy_interval(tally.right)
        differences = [a - b for a, b in zip(tally.right, tallies[0].right, strict=True)]
        lower, upper = paired_interval(differences)
        share = statistics.median((d + o) / d for d, o in zip(tally.dense_s, tally.own_s, strict=True) if d)
        table.add_row(
            name,
            f"{statistics.fmean(tally.bits):.2f}",
            f"{statistics.fmean(tally.held) / MIB:.1f}",
            f"{100 * statistics.fmean(tally.right):.0f} [{100 * low:.0f}, {100 * high:.0f}]",
            f"{100 * statistics.fmean(differences):+.0f} [{100 * lower:+.0f}, {100 * upper:+.0f}]"
            if name != stack[0]
            else "",
            f"{share:.2f}x",
        )
    Plain(width=120).print(table)


if __name__ == "__main__":
    run(main)
