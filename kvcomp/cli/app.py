"""The `kvcomp` command. Torch and transformers are imported by the commands that need them."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvcomp.console import Group, Plain, note, notes, results, styled
from kvcomp.errors import KvcompError
from kvcomp.text import quote, size_text

from . import calibrate as cli_calibrate
from . import data as cli_data
from . import doctor as cli_doctor
from . import plan as cli_plan
from . import report as cli_report
from . import speed as cli_speed
from . import tune as cli_tune
from .options import whole_numbers

if TYPE_CHECKING:
    from kvcomp.stages import Stage


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Compress the KV cache of a language model: fewer tokens, in fewer bits, of which fewer are read.

A [bold]stack[/] says how, in one line: stages joined by "+", each with its arguments.

  none                              the uncompressed cache
  kivi(bits=2)                      2-bit keys and values
  snapkv(keep=0.25) + kivi(bits=4)  a quarter of the tokens, in 4 bits
  kivi(bits=4) + quest(pages=16)    4 bits, and a step reads 16 pages

Start with [bold]kvcomp stacks[/], which lists the stages.""",
)

EXAMPLES_GENERATE = """Examples:

  kvcomp generate "The capital of France is" --stack "kivi(bits=4)"

  kvcomp generate --file report.txt --stack "snapkv(keep=0.25) + kivi(bits=2)" --max-new-tokens 200

  cat notes.txt | kvcomp generate - --model ./my-model"""
EXAMPLES_BENCH = """Examples:

  kvcomp bench --stack none --stack "kivi(bits=2)" --samples 5

  kvcomp bench --model ./my-model --context 4096,8192 --stack none --stack "int(bits=4)"

The same command again continues where it was interrupted."""

Model = Annotated[
    str,
    typer.Option(help="The alias smollm2-135m, a .gguf file, a local folder, or a Hugging Face hub id."),
]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"kvcomp {version('kvcomp')}")
        raise typer.Exit


@app.callback()
def main(
    show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note("warning", "yellow", str(message))


@app.command()
def stacks(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """List every stage that a stack can be made of: its arguments, their defaults, and its paper."""
    from kvcomp.stages.registry import stages

    known = {name: _describe(stage) for name, stage in stages().items()}
    if as_json:
        typer.echo(json.dumps(known, indent=2))
        return
    console = Plain()
    for family in dict.fromkeys(stage["family"] for stage in known.values()):
        grid = Table(box=None, padding=(0, 2, 0, 0), show_header=False, highlight=False)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column()
        for name, stage in known.items():
            if stage["family"] == family:
                grid.add_row(styled(name, "bold cyan"), "", stage["summary"])
                for argument in stage["arguments"]:
                    grid.add_row("", f"{argument['name']}={argument['default']}", argument["help"])
                if stage["paper"]:
                    grid.add_row("", styled("paper", "dim"), styled(stage["paper"], "dim"))
        console.print()
        console.print(styled(family, "bold"))
        console.print(grid)


def _describe(stage: type[Stage]) -> dict[str, Any]:
    return {
        "family": stage.family,
        "summary": (stage.__doc__ or "").strip().split("\n")[0],
        "paper": stage.paper,
        "arguments": [
            {
                "name": field.name,
                "default": None if field.default is MISSING else field.default,
                "help": field.metadata.get("help", ""),
            }
            for field in fields(stage)
        ],
    }


@app.command(epilog=EXAMPLES_GENERATE)
def generate(
    prompt: Annotated[str | None, typer.Argument(help='The text to continue, or "-" to read it from stdin.')] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    model: Model = "smollm2-135m",
    stack: Annotated[str, typer.Option(help="How to compress the cache.")] = "kivi(bits=4)",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31, help="Stop after this many tokens.")] = 64,
) -> None:
    """Continue a text from a compressed cache, and say what the cache held and read beside a dense one."""
    text = _read_prompt(prompt, file)
    from kvcomp import CompressedCache, Stack

    parsed = Stack.parse(stack)
    from transformers import TextStreamer

    from kvcomp.integrations.configs import decoder_config, max_positions
    from kvcomp.integrations.huggingface import prefill
    from kvcomp.integrations.huggingface.forward import generating_with
    from kvcomp.integrations.huggingface.models import load_model

    network, tokenizer = load_model(model)
    inputs = tokenizer(text, return_tensors="pt").to(network.device)
    length = inputs.input_ids.shape[1]
    limit = max_positions(decoder_config(network.config))
    if limit is not None and length + max_new_tokens > limit:
        raise KvcompError(
            f"prompt: {length} tokens and {max_new_tokens} new ones are more than the {limit} of {model}. "
            "Shorten the prompt or lower --max-new-tokens."
        )
    cache = CompressedCache(parsed, network)
    if any(policy.reconstructs is not None for policy in parsed.policies):
        prefill(network, inputs.input_ids[:, :-1], [cache], tokenizer=tokenizer)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    network.generate(
        **inputs,
        **generating_with(cache),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
        prefill_chunk_size=parsed.prefill_chunk,
    )
    memory, traffic = cache.memory(), cache.traffic()
    table = Table(title=f"{parsed}, {length} prompt tokens", title_justify="left")
    for column in ("", "this stack", "dense", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("held", size_text(memory.held), size_text(memory.dense), f"{memory.ratio:.2f}x")
    if traffic.read:
        table.add_row(
            "read by the last step", size_text(traffic.read), size_text(traffic.dense), f"{traffic.ratio:.2f}x"
        )
    table.add_row("effective bits", f"{memory.effective_bits:.2f}", "", "")
    Plain().print(table)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise KvcompError('prompt: give either a text (or "-" for stdin) or --file.')
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise KvcompError(f"file: {quote(str(file))}: {reason}.") from error
    else:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
    if not text.strip():
        raise KvcompError("prompt: it is empty; give a text to continue.")
    return text


@app.command(epilog=EXAMPLES_BENCH)
def bench(
    stack: Annotated[list[str], typer.Option(help="A stack to measure; repeat it. Include none to compare with.")],
    model: Model = "smollm2-135m",
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated tasks, or ruler, longbench, longbench_e, perplexity, fidelity: all of one kind."
        ),
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
        bool, typer.Option("--chat", help="LongBench in the model's chat template, save few-shot and code.")
    ] = False,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of prompt that enter at once; the next see what was kept.  \\[default: all]"),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="What answers: huggingface, or vllm with kvcomp's plugin, one request at a time.")
    ] = "huggingface",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.  \\[default: float32 on a CPU, bfloat16 on a GPU]"),
    ] = None,
) -> None:
    """Measure stacks against each other: bytes held, bytes read, accuracy and time, on the same prompts.

    Each prompt is prefilled once, without compression, for all stacks, save those that take it in chunks; then each
    answers from its own cache.
    Writes samples.jsonl, summary.csv (for texts perplexity.csv and fidelity.csv), report.html and pictures to --out.
    """
    names = tuple(part.strip() for part in tasks.split(",") if part.strip())
    contexts = whole_numbers("context", context or ["2048"], "tokens")
    from kvcomp.benchmarks.bench import run
    from kvcomp.benchmarks.report import tables
    from kvcomp.benchmarks.settings import Settings
    from kvcomp.benchmarks.tasks import choose

    for reason in choose(names, data)[1]:
        note("left out", "yellow", reason)
    rest = (seed, max_new_tokens, data, chat, prefill_chunk, engine, dtype)
    settings = Settings(model, names, contexts, samples, tuple(stack), *rest)
    command = shlex.join(["kvcomp", *sys.argv[1:]])
    comparison = run(settings, out, notes(), command)
    console = results(100)
    for table in tables(comparison):
        console.print(table)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


app.command(epilog=cli_tune.EXAMPLES)(cli_tune.tune)
app.command(epilog=cli_report.EXAMPLES)(cli_report.report)
app.command(epilog=cli_plan.EXAMPLES)(cli_plan.plan)
app.command(epilog=cli_speed.EXAMPLES)(cli_speed.speed)
app.command(epilog=cli_doctor.EXAMPLES)(cli_doctor.doctor)
app.command(epilog=cli_calibrate.EXAMPLES)(cli_calibrate.calibrate)
app.add_typer(cli_data.app, name="data")
