"""`kvcomp bench`: stacks measured against each other on the same prompts."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvcomp.console import note, notes
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import Model, loads_model, one_of

from . import report
from .config_file import Config
from .options import whole_numbers
from .output import Json

EPILOG = f"""Examples:

  kvcomp bench --stack none --stack "kivi(bits=2)" --samples 5

  kvcomp bench --model ./my-model --context 4096,8192 --stack none --stack "int(bits=4)"

The same command continues a run that was interrupted. --out has its options, too, in config.yaml:

  kvcomp bench --config out/bench/config.yaml --out out/again

Each of 8 jobs answers a part, and a report of --out merges them:

  kvcomp bench --stack none --stack int8 --out out/array --shard 3/8

{report.DOCUMENT.help}"""


@loads_model
def bench(
    stack: Annotated[list[str], typer.Option(help="A stack to measure; repeat it. Include none to compare with.")],
    model: Model = "smollm2-135m",
    tasks: Annotated[
        str,
        typer.Option(help="Comma-separated tasks; ruler, longbench, longbench_e, perplexity and fidelity are groups."),
    ] = "ruler",
    context: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of prompt and answer: repeat it or separate by commas.  \\[default: 2048]"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts per task and context.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder of the results; the same command continues there.")] = Path(
        "out/bench"
    ),
    seed: Annotated[int, typer.Option(help="Chooses the prompts.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cap on the answer.  \\[default: the task's own]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder with the texts of tasks, or hub.  \\[default: what comes with kvcomp]"),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Use the model's chat template, except for LongBench's few-shot and code, and texts."
        ),
    ] = False,
    context_first: Annotated[
        bool,
        typer.Option(
            "--context-first",
            help="Compress the context before the question is known, which is read afterwards, as kvpress does. "
            "Otherwise policies see the whole prompt.",
        ),
    ] = False,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Feed the prompt in chunks of this many tokens, compressing each.  \\[default: all]",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="What generates: huggingface, or vllm with kvcomp's plugin, one request at a time.",
            autocompletion=one_of("huggingface", "vllm"),
        ),
    ] = "huggingface",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that answer at once, each with the model: one a GPU, or on CPU cores.")
    ] = 1,
    batch: Annotated[
        int, typer.Option(min=1, help="Samples of a task that are decoded together, their caches all in memory.")
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            show_default=False,
            help="Answer only every N-th sample, from the I-th, into a folder in --out. Without --shard, the same "
            "command takes the answers of all shards there.",
        ),
    ] = None,
    loading: Loading = DEFAULT,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Measure stacks against each other: bytes held, bytes read, accuracy and time, on the same prompts.

    Each prompt is prefilled once, without compression, for all stacks, except those that take it in chunks; then each
    stack answers from its own cache.
    Writes samples.jsonl, summary.csv (perplexity.csv and fidelity.csv for texts), report.html and pictures to --out.
    """
    names = tuple(part.strip() for part in tasks.split(",") if part.strip())
    contexts = whole_numbers("context", context or ["2048"], "tokens")
    from kvcomp.benchmarks.bench import run
    from kvcomp.benchmarks.settings import Settings
    from kvcomp.benchmarks.shards import Shard
    from kvcomp.benchmarks.tasks import choose

    for reason in choose(names, data)[1]:
        note("left out", "yellow", reason)
    rest = (seed, max_new_tokens, data, chat, prefill_chunk, engine, loading, context_first)
    settings = Settings(model, names, contexts, samples, tuple(stack), *rest)
    command = shlex.join(["kvcomp", *sys.argv[1:]])
    part = None if shard is None else Shard.parse(shard)
    comparison = run(settings, out, notes(), command, shard=part, workers=workers, batch=batch)
    out = out / part.folder if part else out
    if as_json:
        report.print_json(comparison, out)
    else:
        report.print_tables(comparison, out, 100)
