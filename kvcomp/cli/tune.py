"""`kvcomp tune`: the stack to use for a model, by measurements on a text."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from kvcomp.console import notes, results, styled
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import Model, loads_model

from .config_file import Config
from .output import Document, Json

if TYPE_CHECKING:
    from kvcomp.benchmarks.divergence import FidelityRow

DOCUMENT = Document(
    best="the stack to use; null if none meets the goal",
    front="stacks than which no other is both smaller and nearer to the uncompressed cache, the largest first",
    rows="an object for each stack: the columns of fidelity.csv, over all texts",
    report="path of report.html",
)
EPILOG = f"""Examples:

  kvcomp tune --tvd 1%

  kvcomp tune --model ./my-model --text mails.txt --held 6x

  kvcomp tune --stack "klt(bits=4)" --stack "snapkv(keep=0.5) + klt(bits=4)" --samples 12 --out out/mine

The same command continues a run that was interrupted.

{DOCUMENT.help}"""


@loads_model
def tune(
    model: Model = "smollm2-135m",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file like those that you serve; repeat it.  \\[default: a novel and Python code]"),
    ] = None,
    held: Annotated[str | None, typer.Option(help="Goal: this many times smaller than uncompressed, like 8x.")] = None,
    tvd: Annotated[
        str | None,
        typer.Option(help="Goal: at most this total-variation distance to uncompressed, like 1%.  \\[default: 1%]"),
    ] = None,
    stack: Annotated[
        list[str] | None, typer.Option(help="A stack to try; repeat it.  \\[default: twelve quantizers]")
    ] = None,
    context: Annotated[int, typer.Option(min=128, help="Tokens of each window of the text.")] = 2048,
    samples: Annotated[int, typer.Option(min=1, help="Windows of each text; 64 predictions of each are compared.")] = 4,
    loading: Loading = DEFAULT,
    seed: Annotated[int, typer.Option(help="Chooses the windows.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results, as of bench.")] = Path("out/tune"),
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Find the stack to use: measure a grid of them on your text, print the Pareto front and the one line to write.

    Fidelity is how much of the next token's distribution a compressed cache has in common with the uncompressed one
    (1 - TVD), over predictions through the cache. Exits with code 1 if no stack of the grid meets the goal.
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
        settings = Settings(model, tasks, (context,), samples, stacks, seed, data=data, loading=loading)
        comparison = run(settings, out, notes(), shlex.join(["kvcomp", *sys.argv[1:]]))
    rows = divergence.pooled(comparison.fidelity)
    tried = [row for row in rows if row.stack != tune.DENSE]
    best, front = goal.choose(tried), tune.front(tried)
    if as_json:
        shown = [asdict(row) for row in rows]
        names = [row.stack for row in front]
        DOCUMENT.print(best=best and best.stack, front=names, rows=shown, report=str(out / "report.html"))
    else:
        console = results(110)
        console.print(_table(f"{model}, {context} tokens", rows, front, best))
        console.print(f"Report: {out / 'report.html'}", soft_wrap=True)
        if best is None:
            near = goal.nearest(tried)
            what = f"{near.held_ratio:.2f}x smaller, 1 - TVD {100 * near.overlap:.2f} %"
            console.print(f"No stack of the grid meets the goal; the nearest is {near.stack}: {what}.", soft_wrap=True)
        else:
            console.print(f'cache = CompressedCache("{best.stack}", model)', soft_wrap=True)
    if best is None:
        raise typer.Exit(1)


def _table(what: str, rows: list[FidelityRow], front: list[FidelityRow], best: FidelityRow | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.title = f"{what}, {rows[0].tokens} predictions a stack; front: nothing smaller is as near to uncompressed"
    for column in ("", "stack", "held ×", "bits", "1 - TVD, %", "95 % interval", "KL", "top-1, %", "ms/token"):
        table.add_column(column, justify="left" if column in ("", "stack") else "right", no_wrap=column != "stack")
    for row in sorted(rows, key=lambda row: row.held_ratio):
        mark = "use" if row is best else "front" if row in front else ""
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
    return table
