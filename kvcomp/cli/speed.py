"""`kvcomp speed`: how fast a decode step is, beside the uncompressed cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from kvcomp import __version__
from kvcomp.console import Plain, notes, progress, waiting
from kvcomp.errors import KvcompError
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import Model, loads_model
from kvcomp.text import size_text

from .config_file import Config
from .options import completed_shapes, whole_numbers
from .output import Document, Json

if TYPE_CHECKING:
    import torch

    from kvcomp.benchmarks.speed import Timing

DOCUMENT = Document(
    title="the model, dtype and machine in one line",
    copy_gbps="GB/s that a copy of a large tensor moves on this machine",
    kvcomp="version of kvcomp",
    torch="version of torch",
    transformers="version of transformers",
    not_timed="peers that are not timed, and why",
    timings="an object for each row: what (attention or model), label, context, batch, ms (median), low and high "
    "(quartiles), read (bytes of a step; 0 if not known), ratio (times as fast as the first row of the same context "
    "and batch), held (bytes), plan_read and plan_held (what kvcomp plan counts; 0 for whole steps), gbps",
)
EPILOG = f"""Examples:

  kvcomp speed --stack "kivi(bits=4)" --stack "kivi(bits=4) + quest(keep=0.1)" --context 512,8000

  kvcomp speed --attention --geometry qwen3-8b --batch 1,8 --context 4096,32768 --stack "int(bits=4)"

  kvcomp speed --attention --geometry deepseek-v3 --context 1000000 --dtype bfloat16 --stack "int(bits=4)" --steps 4

  kvcomp speed --stack "turboquant(bits=4)" --threads 1 --out speed

{DOCUMENT.help}"""

WHOLE = ("attention", "model")
OF_WEIGHTS = ("device_map", "attn_implementation", "quantization")


@loads_model
def speed(
    stack: Annotated[list[str], typer.Option(help="A stack to time; repeat it.")],
    model: Model = "smollm2-135m",
    attention: Annotated[
        bool, typer.Option("--attention", help="Only the attention of one layer, over random keys and values.")
    ] = False,
    geometry: Annotated[
        str | None,
        typer.Option(
            help="The model whose heads and channels the layer has, as in `kvcomp plan`; no weights needed.",
            autocompletion=completed_shapes,
        ),
    ] = None,
    context: Annotated[
        list[str] | None, typer.Option(help="Tokens held: repeat it or separate by commas.  \\[default: 4096]")
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="Sequences decoded together: repeat it or separate by commas.  \\[default: 1]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Timed steps of each stack; figures are medians.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.  \\[default: torch's]")] = None,
    loading: Loading = DEFAULT,
    out: Annotated[Path | None, typer.Option(help="A folder for speed.json and speed.svg.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Time decode steps of every stack and of an uncompressed cache, taking turns in one run.

    First the attention of one layer, which is checked against the reference before it is timed, then whole steps of
    the model. GB/s are the bytes of the cache that a step reads, divided by its time; "of a copy" is their share of
    what a copy of a large tensor moves on this machine. "faster" compares with torch's attention over an uncompressed
    cache. On NVIDIA GPUs FlashInfer and flash-attention are timed too, if they are installed.
    """
    import torch

    from kvcomp.benchmarks import speed as bench
    from kvcomp.integrations.huggingface.models import load_model
    from kvcomp.integrations.huggingface.placing import dtype_of, main_device
    from kvcomp.integrations.huggingface.shapes import model_shape

    contexts = whole_numbers("context", context or ["4096"], "tokens")
    batches = whole_numbers("batch", batch or ["1"], "sequences")
    if geometry is not None and not attention:
        raise KvcompError("geometry: give --attention too: whole steps need the weights of --model")
    if threads is not None:
        torch.set_num_threads(threads)
    if attention:
        loading.refuse(OF_WEIGHTS, "--attention loads no weights")
    device, held = main_device(loading), dtype_of(loading)
    shape = next((layer for layer in model_shape(geometry or model, loading=loading).layers if layer.full), None)
    if shape is None:
        raise KvcompError(f"geometry: {geometry or model} has no layer of full attention")
    heads = bench.Geometry(shape.heads, shape.kv_heads, shape.k_dim, shape.v_dim)
    if shape.latent:
        heads = bench.Geometry(shape.heads, 1, shape.k_dim + shape.v_dim, shape.k_dim, latent=True)
    _require_memory(max(contexts), max(batches), heads.channels * held.itemsize, device)
    rate = bench.bandwidth(device)
    found: list[Timing] = []
    absent: list[str] = []
    jobs = [(length, rows) for length in contexts for rows in batches]
    with progress() as bar:
        for length, rows in jobs:
            tick = _ticks(bar, f"attention over {length:,} x {rows}")
            found += bench.attention(heads, stack, length, rows, steps, held, device, 8, absent.append, tick)
    absent = list(dict.fromkeys(absent))
    for line in absent:
        notes().print(line)
    if not attention:
        with waiting(f"Loading {model}"):
            network, tokenizer = load_model(model, loading)
        with progress() as bar:
            for length, rows in jobs:
                tick = _ticks(bar, f"steps after {length:,} x {rows}")
                found += bench.model(network, tokenizer, stack, length, rows, steps, bench.peers(), tick)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    title = f"{geometry or model}, {str(held).removeprefix('torch.')}, {where}, a copy moves {rate:.1f} GB/s"
    rows_of = [{**asdict(timing), "gbps": timing.gbps} for timing in found]
    document = {"title": title, "copy_gbps": rate, **_versions(), "not_timed": absent, "timings": rows_of}
    if as_json:
        DOCUMENT.print(**document)
    for what in WHOLE if not as_json else ():
        mine = [timing for timing in found if timing.what == what]
        if mine:
            _print(mine, f"{'Attention of one layer' if what == 'attention' else 'Decode step'}: {title}", rate)
    if out is not None:
        _write(out, found, document)


def _ticks(bar: Progress, description: str) -> Callable[[int, int], None]:
    """What a measurement calls after each step with the steps done and their total."""
    task = bar.add_task(description, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total, visible=done < total)


def _require_memory(context: int, batch: int, token: int, device: torch.device) -> None:
    """Raise KvcompError where K and V of one layer, of `token` bytes a token, are more than the device's memory."""
    import torch

    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:  # Windows does not say
        return
    needed = context * batch * token
    if needed > memory:
        raise KvcompError(
            f"context: {context} tokens of {batch} sequences take {needed / 1e9:,.0f} GB of K and V in a layer, more "
            f"than the {memory / 1e9:,.0f} GB of this machine."
        )


def _print(timings: list[Timing], title: str, rate: float) -> None:
    table = Table(title=title)
    planned = any(timing.held for timing in timings)
    bytes_of = ("held", "plan", "read", "plan") if planned else ()
    for column in ("", "context", "batch", *bytes_of, "ms", "quartiles", "GB/s", "of a copy", "faster"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for timing in timings:
        known = timing.read > 0
        table.add_row(
            timing.label,
            f"{timing.context:,}",
            str(timing.batch),
            *(
                [size_text(n) for n in (timing.held, timing.plan_held, timing.read, timing.plan_read)]
                if planned
                else ()
            ),
            f"{timing.ms:.2f}",
            f"{timing.low:.2f}-{timing.high:.2f}",
            f"{timing.gbps:.1f}" if known else "",
            f"{100 * timing.gbps / rate:.0f}%" if known else "",
            f"{timing.ratio:.2f}x",
        )
    Plain(width=150 if planned else 130).print(table)


def _write(out: Path, timings: list[Timing], document: dict[str, Any]) -> None:
    from kvcomp.benchmarks.charts import Point, lines

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "speed.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        labels = list(dict.fromkeys((t.what, t.label, t.batch) for t in timings))
        points = [
            Point(labels.index((t.what, t.label, t.batch)) + 1, t.context, t.ratio, t.ratio, t.ratio) for t in timings
        ]
        (out / "speed.svg").write_text(
            lines(points, "tokens held", "times as fast as uncompressed", scale=None), "utf-8"
        )
    except OSError as error:
        raise KvcompError(f"out: {str(out)!r} cannot be written: {error.strerror}.") from error
    key = "\n".join(f"{i}: {what}, {label}, batch {rows}" for i, (what, label, rows) in enumerate(labels, 1))
    notes().print(f"{out}/speed.json, and {out}/speed.svg with the lines\n{key}")


def _versions() -> dict[str, str]:
    """Of kvcomp also where it is a source tree that was never installed."""
    return {"kvcomp": __version__} | {package: version(package) for package in ("torch", "transformers")}
