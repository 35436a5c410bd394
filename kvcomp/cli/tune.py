"""`kvcomp tune`: the stack to use for a model, by measurements on a text."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from kvcomp.console import notes, results, styled

EXAMPLES = """Examples:

  kvcomp tune --tvd 1%

  kvcomp tune --model ./my-model --text mails.txt --held 6x

  kvcomp tune --stack "klt(bits=4)" --stack "snapkv(keep=0.5) + klt(bits=4)" --samples 12 --out out/mine

The same command again continues where it was interrupted."""


def tune(
    model: Annotated[
        str, typer.Option(help="The alias smollm2-135m, a .gguf file, a local folder, or a Hugging Face hub id.")
    ] = "smollm2-135m",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file like those that you serve; repeat it.  \\[default: a novel and Python code]"),
    ] = None,
    held: Annotated[str | None, typer.Option(help="Goal: so many times smaller than dense, like 8x.")] = None,
    tvd: Annotated[
        str | None, typer.Option(help="Goal: total-variation distance to dense at most, like 1%.  \\[default: 1%]")
    ] = None,
    stack: Annotated[
        list[str] | None, typer.Option(help="A stack to try; repeat it.  \\[default: twelve quantizers]")
    ] = None,
    context: Annotated[int, typer.Option(min=128, help="Tokens of each window of the text.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Windows of each text; 64 predictions of each are compared.")] = 4,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.  \\[default: float32 on a CPU, bfloat16 on a GPU]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results, as of bench.")] = Path("out/tune"),
) -> None:
    """Find the stack to use: measure a grid of them on your text, print the Pareto front and the one line to write.

    Fidelity is how much of the next token's distribution the compressed cache has in common with the dense one
    (1 - TVD), on predictions through the cache. Leaves with code 1 where no stack of the grid meets the goal.
    """
    from kvcomp.benchmarks import divergence, tune
    from kvcomp.benchmarks.bench import run
    from kvcomp.benchmarks.settings import Settings

    goal = tune.goal(held, tvd)
    tasks = ("fidelity_text",) if text else ("fidelity_text", "fidelity_code")
    stacks = tuple(dict.fromkeys([tune.DENSE, *(stack or tune.GRID)]))
    with TemporaryDirectory() as folder:
        tune.write_texts(text or (), Path(folder))
        data = folder if text else None
        settings = Settings(model, tasks, (context,), samples, stacks, seed, data=data, dtype=dtype)
        comparison = run(settings, out, notes(), shlex.join(["kvcomp", *sys.argv[1:]]))
    rows = [row for row in divergence.pooled(comparison.fidelity) if row.stack in settings.stacks]
    tried = [row for row in rows if row.stack != tune.DENSE]
    best = goal.choose(tried)
    kept, console = tune.front(tried), results(110)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.title = f"{model}, {context} tokens: what holds less at the same fidelity ({rows[0].tokens} predictions each)"
    for column in ("", "stack", "held ×", "bits", "1 - TVD, %", "95 % interval", "KL", "top-1, %", "ms/token"):
        table.add_column(column, justify="left" if column in ("", "stack") else "right", no_wrap=column != "stack")
    for row in sorted(rows, key=lambda row: row.held_ratio):
        mark = "*" if row is best else "front" if row in kept else ""
        table.add_row(
            styled(mark, "bold green" if row is best else "green"),
            row.stack,
            f"{row.held_ratio:.2f}",
            f"{row.effective_bits:.2f}",
            f"{100 * row.overlap:.2f}",
            f"{100 * row.overlap_low:.1f} to {100 * row.overlap_high:.1f}",
            f"{row.kl:.4f}",
            f"{100 * row.top1:.1f}",
            f"{row.ms_per_token:.1f}",
        )
    console.print(table)
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
    if best is None:
        near = goal.nearest(tried)
        what = f"{near.held_ratio:.2f}x smaller, 1 - TVD {100 * near.overlap:.2f} %"
        console.print(f"No stack of the grid meets the goal; the nearest is {near.stack}: {what}.", soft_wrap=True)
        raise typer.Exit(1)
    console.print(f'cache = CompressedCache("{best.stack}", model)', soft_wrap=True)
