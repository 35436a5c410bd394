"""`kvcomp calibrate`: a file with what a calibrated stage needs to know of a model."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kvcomp.console import Plain, notes
from kvcomp.errors import KvcompError
from kvcomp.files import reason, usable
from kvcomp.text import quote

from .plan import size

EXAMPLES = """Examples:

  kvcomp calibrate --method oscar --text book.txt --out oscar.safetensors

  kvcomp generate "The capital of France is" --stack "oscar(bits=2, calibration='oscar.safetensors')"

  kvcomp calibrate --model ./my-model --method svd --text code.py --text prose.txt --tokens 40960 --out my.svd"""


def calibrate(
    method: Annotated[str, typer.Option(help="The stage to calibrate: oscar, svd, think, klt or dsa.")],
    text: Annotated[
        list[Path], typer.Option(help="A text file for the model to read; repeat it. Each gives an equal share.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, as in kvcomp.safetensors. It must not exist.")],
    model: Annotated[
        str,
        typer.Option(help="The alias smollm2-135m, a .gguf file, a local folder, or a Hugging Face hub id."),
    ] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text to use.")] = 20480,
    context: Annotated[int, typer.Option(min=1, help="Tokens that the model sees together.")] = 2048,
) -> None:
    """Run a model over texts, and write what a calibrated quantizer or selector needs of its queries, keys and values.

    The file serves every bit width and rank of the method, for the model that it was made with and no other; name it in
    a stack, as in oscar(bits=2, calibration='FILE').
    """
    if os.path.exists(out):
        raise KvcompError(f"out: {quote(str(out))} exists: name another file, or remove it.")
    try:
        usable(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KvcompError(f"out: {quote(str(out))} cannot be written: {reason(error)}.") from error
    from kvcomp.integrations.huggingface import calibrate as calibration
    from kvcomp.integrations.huggingface.models import load_model

    calibration.method_of(method)
    for path in text:
        calibration.read_text(path)
    console = notes()
    console.print(f"Loading {model} ...", soft_wrap=True)
    network, tokenizer = load_model(model)
    start = time.perf_counter()
    columns = (
        TextColumn("{task.completed:,} of {task.total:,} {task.description}", markup=False),
        BarColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("tokens", total=tokens)

        def fitting(layers: Collection[Any]) -> Iterable[Any]:
            return progress.track(layers, description="layers")

        found = calibration.calibrate(
            network, tokenizer, method, text, tokens, context, model, lambda done: progress.advance(bar, done), fitting
        )
    found.save(out)
    seconds = time.perf_counter() - start
    console = Plain()
    console.print(
        f"{out}: {method} for {found.model.name}, {len(found.layers)} layers, "
        f"{found.tokens:,} tokens, {seconds:.1f} s, {size(out.stat().st_size)}",
        soft_wrap=True,
    )
    if found.tokens < tokens:
        console.print(f"The texts have no more than {found.tokens:,} of the {tokens:,} tokens asked for.")
