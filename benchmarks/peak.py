"""Peak memory of a long generation, one process per cache: `python -m kvcomp.benchmarks.peak --help`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib.resources import files
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from kvcomp.console import Plain, run, waiting
from kvcomp.errors import KvcompError
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import Model, given, loads_model
from kvcomp.ledger import MIB

DYNAMIC = "DynamicCache"


def measure(model: str, context: int, new_tokens: int, stack: str, loading: Loading = DEFAULT) -> dict[str, Any]:
    """Generate once in this process: cache bytes held at the end, and the process's peak before and after."""
    from transformers import DynamicCache

    from kvcomp import CompressedCache
    from kvcomp.integrations.huggingface.forward import generating_with
    from kvcomp.integrations.huggingface.models import load_model

    network, tokenizer = load_model(model, loading)
    text = next(f for f in files("kvcomp.benchmarks").joinpath("data").iterdir() if f.name.endswith(".txt")).read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :context].to(network.device)
    if ids.shape[1] < context:
        raise KvcompError(f"--context {context}: the packaged text has {ids.shape[1]} tokens only")
    cache: Any = DynamicCache(config=network.config) if stack == DYNAMIC else CompressedCache(stack, network)
    before = _peak(network.device)
    network.generate(
        ids,
        **generating_with(cache),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        prefill_chunk_size=None if stack == DYNAMIC else cache.stack.prefill_chunk,
    )
    if stack == DYNAMIC:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    else:
        held = cache.memory().held
    return {"held": held, "loaded": before, "peak": _peak(network.device)}


def _peak(device: torch.device) -> int:
    """Peak bytes so far: of tensors on a GPU, otherwise resident ones of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@loads_model
def main(
    stack: Annotated[list[str], typer.Option(help="A stack to compare with DynamicCache; repeat it.")],
    model: Model = "smollm2-135m",
    context: Annotated[int, typer.Option(min=2, help="Tokens of prompt.")] = 8000,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    child: Annotated[bool, typer.Option(hidden=True)] = False,
    loading: Loading = DEFAULT,
) -> None:
    """Generate from a long prompt with DynamicCache and with each stack, and print what the cache held and the peak of
    the process's resident memory, or of a GPU's. Every run is a process of its own: peaks do not hide each other."""
    if child:
        print(json.dumps(measure(model, context, new_tokens, stack[0], loading)))
        return
    console = Plain()
    table = Table(title=f"{model}, {context} + {new_tokens} tokens")
    for column in ("cache", "held, MiB", "ratio", "peak after loading, MiB", "peak, MiB", "above loading, MiB"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    dense = 0
    for name in (DYNAMIC, *stack):
        options = [
            "--model",
            model,
            "--context",
            str(context),
            "--new-tokens",
            str(new_tokens),
            "--child",
            *given(loading),
        ]
        with waiting(f"generating with {name}"):
            done = subprocess.run(
                [sys.executable, "-m", "kvcomp.benchmarks.peak", "--child", "--stack", name, *options],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
        if done.returncode:
            raise typer.Exit(done.returncode)
        got = json.loads(done.stdout.splitlines()[-1])
        dense = dense or got["held"]
        sizes = [f"{got[key] / MIB:.1f}" for key in ("held", "loaded", "peak")]
        table.add_row(
            name, sizes[0], f"{dense / got['held']:.2f}x", *sizes[1:], f"{(got['peak'] - got['loaded']) / MIB:.1f}"
        )
    console.print(table)


if __name__ == "__main__":
    run(main)
