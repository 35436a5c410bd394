"""How much of the attention is on what a selector reads: `python -m kvcomp.benchmarks.recall --help`.

A model reads a text densely. Its keys and values fill the store of each stack, and the queries of the last tokens, one
by one as in decoding, attend to what the stack lets them read. The mass of a query is exp(lse - lse of all): the share
of its dense attention that lies on what was read. The error is that of the attention output, relative to its norm.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from einops import rearrange
from rich.table import Table
from torch import Tensor

from kvcomp.attention import attend
from kvcomp.benchmarks.charts import Point, lines
from kvcomp.benchmarks.tabular import csv_text
from kvcomp.cache.layer import LayerStore, Shared
from kvcomp.console import Plain, run, track
from kvcomp.errors import KvcompError
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import Model, loads_model
from kvcomp.stages import Index
from kvcomp.stages.plan import LayerPlan, read_by_stream
from kvcomp.stages.stack import Stack

TOKENS = "{tokens}"  # in a stack: as many as the share of the bytes allows
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Layer:
    """What one layer saw of one text: all queries [1, Hq, n, D], keys and values [1, H, n, D]. A `Seen`."""

    def add(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        self.queries, self.keys, self.values = queries, keys, values

    def result(self, output: Tensor | None) -> Layer:
        return self

    def to(self, dtype: torch.dtype) -> Layer:
        """K and V as a cache of that dtype holds them."""
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)
        return self

    @property
    def scale(self) -> float:
        found: float = self.keys.shape[3] ** -0.5
        return found

    def under(self, plan: LayerPlan) -> Layer:
        """What the store of a plan is given: latents, and queries of these, where the plan makes any."""
        if plan.joint is None:
            return self
        dims = self.keys.shape[1], self.keys.shape[3], self.values.shape[3]
        maps, made = plan.joint.maps(plan.layer, *dims, self.keys.device), Layer()
        latents = maps.latents(self.keys, self.values)
        made.add(maps.absorbed(self.queries), latents, latents)
        return made


@dataclass(frozen=True)
class Measured:
    """Of one stack over one text: shares of the dense bytes and of the attention mass, and the output's error."""

    series: str
    stack: str
    context: int
    read: float
    mass: float
    error: float


def at_share(template: str, share: float, layers: Sequence[Layer]) -> str | None:
    """The stack with as many `{tokens}` as let a decode step read that share of the dense bytes; None: none do."""
    if TOKENS not in template:
        return template
    k, v = layers[0].keys, layers[0].values
    dense = len(layers) * k.shape[2] * (k.shape[3] + v.shape[3]) * k.dtype.itemsize

    def reads(tokens: int) -> float:
        stack = Stack.parse(template.replace(TOKENS, str(tokens)))
        plans = [stack.plan(i, len(layers)) for i in range(len(layers))]
        total = 0
        for plan in plans:
            heads, k_dim, v_dim = plan.streams(k.shape[1], k.shape[3], v.shape[3])
            total += heads * read_by_stream(plan, k_dim, v_dim, k.shape[2], k.dtype)
        return total / k.shape[1] / dense

    low, high = 1, k.shape[2]
    if reads(low) > share:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reads(middle) <= share else (low, middle)
    return template.replace(TOKENS, str(low))


def measure(series: str, spec: str, layers: Sequence[Layer], context: int, queries: int) -> Measured:
    """One stack over the layers of a text: the last `queries` tokens decode, those before them are the prompt."""
    stack, choices, found = Stack.parse(spec), dict[int, Shared](), list[tuple[Tensor, Tensor]]()
    read = dense = 0
    stores = [LayerStore(stack.plan(i, len(layers)), choices) for i in range(len(layers))]
    scales = [layer.scale for layer in layers]
    layers = [layer.under(store.plan) for store, layer in zip(stores, layers, strict=True)]
    for store, layer in zip(stores, layers, strict=True):
        prompt = layer.keys.shape[2] - queries
        store.start(layer.keys, layer.values)
        keys, values, asked = (x[:, :, :prompt] for x in (layer.keys, layer.values, layer.queries))
        store.write(keys, values, None, asked)
    for step in range(prompt, prompt + queries):
        for store, layer, scale in zip(stores, layers, scales, strict=True):
            now = slice(step, step + 1)
            q = layer.queries[:, :, now]
            store.append(layer.keys[:, :, now], layer.values[:, :, now])
            part = store.attend(q, scale)
            read, dense = read + sum(store.read.values()), dense + store.dense_read
            grouped = rearrange(q, "b (h g) n d -> (b h) (g n) d", h=store.heads)
            seen = slice(0, step + 1)
            all_of_it = attend(grouped, layer.keys[0, :, seen], layer.values[0, :, seen], scale)
            error = (part.out.view_as(all_of_it.out) - all_of_it.out).norm(dim=-1) / all_of_it.out.norm(dim=-1)
            found.append(((_lse(store, q, scale, part.lse) - all_of_it.lse.view(-1)).exp(), error))
            store.settle()
    mass, error = (torch.stack([x.flatten() for x in pair]).mean() for pair in zip(*found, strict=True))
    return Measured(series, str(stack), context, read / dense, float(mass), float(error))


def _lse(store: LayerStore, queries: Tensor, scale: float, lse: Tensor) -> Tensor:
    """[Hq]: of what was read alone, without what stands for the rest of it."""
    records = store.records
    if records.index is not None and type(records.index).rest is not Index.rest:
        index, records.index = records.index, Index(records.index.selector)
        lse = store.attend(queries, scale).lse
        records.index = index
    return lse.flatten()


def texts(model: Any, tokenizer: Any, paths: Sequence[Path], contexts: Sequence[int], at: int) -> Iterator[list[Layer]]:
    """The layers of a model that reads `context` tokens of each file, from its token `at` on."""
    from kvcomp.integrations.huggingface.calibrate import gather, read_text

    for context in contexts:
        for path in paths:
            ids = tokenizer(read_text(path), add_special_tokens=False).input_ids[at : at + context]
            if len(ids) < context:
                raise KvcompError(f"text: {str(path)!r} has {at + len(ids)} tokens, less than {at} + {context}")
            yield list(gather(model, [ids], seen=Layer).values())


@loads_model
def main(
    stack: Annotated[
        list[str],
        typer.Option(help="A stack with a selector; repeat it. {tokens} in it is what --share lets it read."),
    ],
    text: Annotated[list[Path], typer.Option(help="A text file for the model to read; repeat it.")],
    model: Model = "smollm2-135m",
    context: Annotated[list[int] | None, typer.Option(help="Tokens of text; repeat it.  [default: 4096]")] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Share of the dense bytes to read; repeat it.  [default: 0.1]")
    ] = None,
    queries: Annotated[int, typer.Option(min=1, help="Tokens at the end of each text that decode.")] = 32,
    start: Annotated[int, typer.Option(min=0, help="The first token of each text that is used.")] = 4000,
    cache_dtype: Annotated[str, typer.Option(help="Of the cache: bfloat16 or float32.")] = "bfloat16",
    out: Annotated[
        Path | None, typer.Option(help="Write OUT.csv, and a picture OUT_CONTEXT.svg of each context.")
    ] = None,
    loading: Loading = DEFAULT,
) -> None:
    """Measure how much of the dense attention lies on what selectors read, at a given share of the bytes."""
    from kvcomp.integrations.huggingface.models import load_model

    if cache_dtype not in DTYPES:
        raise KvcompError(f"cache-dtype: {cache_dtype!r} is neither {' nor '.join(DTYPES)}")
    contexts, shares = context or [4096], share or [0.1]
    for spec in stack:
        if Stack.parse(spec.replace(TOKENS, "64")).selector is None:
            raise KvcompError(f"stack: {spec!r} has no selector: it reads everything")
    network, tokenizer = load_model(model, loading)
    found: list[Measured] = []
    steps = texts(network, tokenizer, text, contexts, start)
    with torch.inference_mode():
        for layers in track(steps, "texts", total=len(contexts) * len(text)):
            length = layers[0].keys.shape[2]
            layers = [layer.to(DTYPES[cache_dtype]) for layer in layers]
            for series in stack:
                specs = dict.fromkeys(at_share(series, wanted, layers) for wanted in shares)
                found += [measure(series, spec, layers, length, queries) for spec in specs if spec is not None]
    for length in contexts:
        rows = [row for row in found if row.context == length]
        _print(rows, f"{model}, {length} tokens of {len(text)} texts, {cache_dtype} cache, {queries} queries each")
        if out is not None:
            picture = out.with_name(f"{out.name}_{length}.svg")
            picture.write_text(lines(_points(rows, stack), "share of the bytes read", "attention mass, %"), "utf-8")
    if out is not None:
        table = [(row.stack, row.context, row.read, row.mass, row.error) for row in found]
        head = ("stack", "context", "read", "mass", "error")
        out.with_suffix(".csv").write_text(csv_text([head, *table], digits=5), "utf-8", newline="")


def _print(rows: Sequence[Measured], title: str) -> None:
    table = Table(title=title)
    for column in ("stack", "read, %", "mass, %", "of each text", "output error, %"):
        table.add_column(column, justify="left" if column == "stack" else "right", overflow="fold")
    for spec in dict.fromkeys(row.stack for row in rows):
        mine = [row for row in rows if row.stack == spec]
        figures = [(row.read, row.mass, row.error) for row in mine]
        read, mass, error = (100 * statistics.fmean(figure) for figure in zip(*figures, strict=True))
        each = " ".join(f"{100 * row.mass:.1f}" for row in mine)
        table.add_row(spec, f"{read:.1f}", f"{mass:.1f}", each, f"{error:.1f}")
    Plain(width=140).print(table)


def _points(rows: Sequence[Measured], series: Sequence[str]) -> list[Point]:
    points = []
    for spec in dict.fromkeys(row.stack for row in rows):
        mine = [row for row in rows if row.stack == spec]
        masses = [row.mass for row in mine]
        x, y = statistics.fmean(row.read for row in mine), statistics.fmean(masses)
        points.append(Point(series.index(mine[0].series) + 1, x, y, min(masses), max(masses)))
    return points


if __name__ == "__main__":
    run(main)
