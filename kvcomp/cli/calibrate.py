"""`kvcomp calibrate`: a file with what a calibrated stage needs to know of a model."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from kvcomp.console import Plain, progress, waiting
from kvcomp.errors import KvcompError
from kvcomp.files import reason, usable
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import Model, loads_model, one_of
from kvcomp.text import quote

from .config_file import Config
from .output import Document, Json, size

METHODS = ("dsa", "klt", "kvzap", "latent", "oscar", "sketch", "svd", "think")
DOCUMENT = Document(
    file="the file that was written",
    method="the calibrated stage",
    model="name of the model, the only one that the file is for",
    layers="layers that the file describes",
    tokens="tokens of text that were used",
    tokens_asked="tokens that were asked for; the texts may have fewer",
    seconds="time without loading the model",
    bytes="size of the file",
)
EPILOG = f"""Examples:

  kvcomp calibrate --method oscar --text book.txt --out oscar.safetensors

  kvcomp generate "The capital of France is" --stack "oscar(bits=2, calibration='oscar.safetensors')"

  kvcomp calibrate --model ./my-model --method svd --text code.py --text prose.txt --tokens 40960 --out my.svd

{DOCUMENT.help}"""


@loads_model
def calibrate(
    method: Annotated[
        str,
        typer.Option(help=f"The stage to calibrate: {', '.join(METHODS)}.", autocompletion=one_of(*METHODS)),
    ],
    text: Annotated[
        list[Path], typer.Option(help="A text file for the model to read; repeat it. Each gives an equal share.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write, as in kvcomp.safetensors. It must not exist.")],
    model: Model = "smollm2-135m",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text to use.")] = 20480,
    context: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 2048,
    loading: Loading = DEFAULT,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Run a model over texts, and write the statistics of queries, keys and values that a calibrated stage needs.

    The file serves every bit width and rank of the method, and only the model that it was made with; name it in a
    stack, as in oscar(bits=2, calibration='FILE').
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
    with waiting(f"Loading {model}"):
        network, tokenizer = load_model(model, loading)
    start = time.perf_counter()
    columns = (
        TextColumn("{task.completed:,} of {task.total:,} {task.description}", markup=False),
        BarColumn(),
        TimeRemainingColumn(),
    )
    with progress(*columns) as shown:
        bar = shown.add_task("tokens", total=tokens)

        def fitting(layers: Collection[Any]) -> Iterable[Any]:
            return shown.track(layers, description="layers")

        found = calibration.calibrate(
            network, tokenizer, method, text, tokens, context, model, lambda done: shown.advance(bar, done), fitting
        )
    found.save(out)
    seconds = time.perf_counter() - start
    if as_json:
        DOCUMENT.print(
            file=str(out),
            method=method,
            model=found.model.name,
            layers=len(found.layers),
            tokens=found.tokens,
            tokens_asked=tokens,
            seconds=seconds,
            bytes=out.stat().st_size,
        )
        return
    console = Plain()
    console.print(
        f"{out}: {method} for {found.model.name}, {len(found.layers)} layers, "
        f"{found.tokens:,} tokens, {seconds:.1f} s, {size(out.stat().st_size)}",
        soft_wrap=True,
    )
    if found.tokens < tokens:
        console.print(f"The texts have no more than {found.tokens:,} of the {tokens:,} tokens asked for.")
