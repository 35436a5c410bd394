"""How near the next-token distributions of a compressed cache are to the dense ones: `python -m
kvcomp.benchmarks.fidelity --help`.

A model reads the beginning of a text once, and every stack fills its cache from that. The tokens that follow are fed to
each cache, and to an uncompressed one, whose predictions p are compared with those of the stack, q, token by token:

    KL = sum p log(p / q)     1 - TVD = 1 - 1/2 sum |p - q| = sum min(p, q)     top-1: argmax p = argmax q

Every token is a measurement of what the cache changed, where an answer is right or wrong: hundreds of tokens separate
stacks that tens of answers do not.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvcomp.benchmarks.intervals import accuracy_interval
from kvcomp.console import track
from kvcomp.errors import KvcompError
from kvcomp.integrations.huggingface import CompressedCache, prefill
from kvcomp.stages.stack import Stack

DENSE = "none"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Fidelity:
    """One stack's predictions against the dense ones: a number for each scored token."""

    stack: str
    kl: list[float] = field(default_factory=list)  # nats
    overlap: list[float] = field(default_factory=list)  # 1 - TVD, 0 to 1
    top1: list[float] = field(default_factory=list)  # 1 or 0
    bits: list[float] = field(default_factory=list)  # held per element of K and V once the prompt is in; one a text

    def add(self, dense: Tensor, logits: Tensor) -> None:
        """Score logits [n, V] against those of the dense cache [n, V]."""
        for p, q in zip(dense.float().log_softmax(-1), logits.float().log_softmax(-1), strict=True):
            self.kl.append(max(float((p.exp() * (p - q)).sum()), 0.0))
            self.overlap.append(float(torch.minimum(p, q).exp().sum()))
            self.top1.append(float(p.argmax() == q.argmax()))


def measure(
    model: Any, tokens: Tensor, stacks: Sequence[str], scored: int, chunk: int | None = None
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """For each stack: it, the dense logits [scored, V], its own, and the bits that it holds.

    tokens int64 [1, n]: all but the last `scored` are the prompt. The others are fed `chunk` at a time, all at once
    where that is None; stacks that evict or select get them one by one, as their decode steps do.
    """
    prompt, rest = tokens[:, :-scored], tokens[:, -scored:]
    caches = [CompressedCache(spec, model) for spec in (DENSE, *stacks)]
    prefill(model, prompt, caches)
    dense = torch.zeros(0, dtype=torch.float32, device="cpu")
    for i, cache in enumerate(caches):
        bits = cache.memory().effective_bits
        step = 1 if cache.stack.policies or cache.stack.selector else chunk or scored
        parts = [model(input_ids=x, past_key_values=cache, use_cache=True).logits[0] for x in rest.split(step, 1)]
        logits = torch.cat(parts)
        if i == 0:
            dense = logits
        else:
            yield stacks[i - 1], dense, logits, bits
        caches[i] = None  # type: ignore[call-overload]


def main(
    stack: Annotated[list[str], typer.Option(help="A stack to compare with the dense cache; repeat it.")],
    text: Annotated[list[Path], typer.Option(help="A text file for the model to read; repeat it.")],
    model: Annotated[str, typer.Option(help="As for `kvcomp generate`.")] = "smollm2-135m",
    context: Annotated[int, typer.Option(min=2, help="Tokens of each text that fill the caches.")] = 1900,
    scored: Annotated[int, typer.Option(min=1, help="Tokens of each text after them whose predictions count.")] = 48,
    start: Annotated[int, typer.Option(min=0, help="The first token of each text that is used.")] = 0,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Scored tokens fed together.  [default: all; 1 where a stack selects]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: bfloat16, float16 or float32.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write all figures to this CSV file, a line per token.")] = None,
) -> None:
    """Compare next-token distributions from compressed caches with those of the dense one."""
    from kvcomp.integrations.huggingface.models import load_model

    if dtype not in DTYPES:
        raise KvcompError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    for spec in stack:
        Stack.parse(spec)
    network, tokenizer = load_model(model, dtype=DTYPES[dtype])
    found = {spec: Fidelity(spec) for spec in stack}
    with torch.inference_mode():
        for path in track(text, "texts"):
            ids = _tokens(tokenizer, path, start, context + scored).to(network.device)
            for spec, dense, logits, bits in measure(network, ids, list(found), scored, chunk):
                found[spec].add(dense, logits)
                found[spec].bits.append(bits)
    table(list(found.values()), f"{model}, {dtype}: {context} tokens of {len(text)} texts, {scored} scored in each")
    if out is not None:
        write_csv(list(found.values()), out)


def _tokens(tokenizer: Any, path: Path, start: int, length: int) -> Tensor:
    """int64 [1, length]: tokens of a text from number `start` on."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise KvcompError(f"text: {str(path)!r} cannot be read as UTF-8 text: {error}") from error
    ids = tokenizer(content, verbose=False).input_ids[start : start + length]
    if len(ids) < length:
        raise KvcompError(f"text: {str(path)!r} has {start + len(ids)} tokens, less than {start} + {length}")
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def table(rows: Sequence[Fidelity], title: str) -> None:
    """Print a line per stack: means over all scored tokens, 1 - TVD with its 95% interval."""
    shown = Table(title=title)
    for column in ("stack", "bits", "KL, nats", "1 - TVD, %", "95 % interval", "top-1, %"):
        shown.add_column(column, justify="left" if column == "stack" else "right", overflow="fold")
    for row in rows:
        overlap, top1 = (100 * statistics.fmean(x) for x in (row.overlap, row.top1))
        low, high = accuracy_interval(row.overlap)
        figures = f"{statistics.fmean(row.bits):.2f}", f"{statistics.fmean(row.kl):.4f}", f"{overlap:.2f}"
        shown.add_row(row.stack, *figures, f"{100 * low:.1f} to {100 * high:.1f}", f"{top1:.1f}")
    Console(width=140).print(shown)


def write_csv(rows: Sequence[Fidelity], path: Path) -> None:
    """Write stack, number of the token, KL, 1 - TVD and top-1."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["stack", "token", "kl", "overlap", "top1"])
        for row in rows:
            for i, figures in enumerate(zip(row.kl, row.overlap, row.top1, strict=True)):
                writer.writerow([row.stack, i, *(f"{figure:.6f}" for figure in figures)])


if __name__ == "__main__":
    typer.run(main)
