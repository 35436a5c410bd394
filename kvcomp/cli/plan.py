"""`kvcomp plan`: the bill of materials and the roofline, printed."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from kvcomp.console import Plain, styled, waiting
from kvcomp.cost.hardware import GPUS, Gpu, find_gpu
from kvcomp.errors import KvcompError
from kvcomp.integrations.options import one_of

from .options import completed_shapes, whole_numbers
from .output import Document, Json

DOCUMENT = Document(
    model="name, layers, full_attention_layers, parameters, active_parameters, weight_bytes, weight_bytes_read (by a "
    "step), kv_bytes_per_token, dtype, positions",
    gpu="name, tflops, bandwidth_tb_s, memory_gb, ridge (FLOP per byte), source",
    prefill="an object for each context and batch: context, batch, flops, bytes, intensity, ms, attention_intensity, "
    "decode_intensity_limit",
    decode="an object for each context, batch and stack, the uncompressed cache first: context, batch, stack, hash, "
    "assumed, held, held_ratio, held_parts, effective_bits, read, read_ratio, read_parts, step_bytes, flops, "
    "intensity, ms_per_token, tokens_per_second, total_bytes, fits",
    notes="remarks",
)
EPILOG = f"""Examples:

  kvcomp plan --model qwen3-8b --gpu h100 --context 40960 --stack "kivi(bits=2)"

  kvcomp plan --model gpt-oss-120b --gpu "rtx 5090" --batch 1,8,32 --stack "int(bits=4) + quest(pages=64)"

  kvcomp plan --model ./my-model --tflops 500 --bandwidth 2 --memory 48 --json

  kvcomp plan --context 1000000 --assume latent/8 --assume bits/4 --assume reads/10

{DOCUMENT.help}"""


WIDTH = 120


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="qwen3-8b, llama-3.1-70b, gpt-oss-120b ..., a local folder, a .gguf file, or a hub id.",
            autocompletion=completed_shapes,
        ),
    ] = "qwen3-8b",
    gpu: Annotated[
        str | None,
        typer.Option(
            help=f"One of: {', '.join(g.name for g in GPUS)}.  \\[default: H100]",
            autocompletion=one_of(*(g.name for g in GPUS)),
        ),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of the prompt: repeat it or separate by commas.  \\[default: 4096]"),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(help="Sequences decoded together: repeat it or separate by commas.  \\[default: 1]"),
    ] = None,
    stack: Annotated[list[str] | None, typer.Option(help="A stack to compare with the dense cache; repeat it.")] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME/FACTOR, repeatable: a hypothetical saving that kvcomp does not provide, such as latent/8. "
            "It divides the bytes held and read; reads/FACTOR only the bytes read."
        ),
    ] = None,
    tflops: Annotated[float | None, typer.Option(help="Your own device: dense matrix peak, TFLOP/s.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Your own device: memory bandwidth, TB/s.")] = None,
    memory: Annotated[float | None, typer.Option(help="Memory in GB, also to correct a known device.")] = None,
    weight_bits: Annotated[
        float | None, typer.Option(help="Bits per weight, scales included.  \\[default: what the config says]")
    ] = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="Also print what the bytes are: pages, summaries, window ...")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict memory, bytes per step and the fastest possible decode from a model's config, without its weights.

    For each context and batch: the bytes that the KV cache holds and a decode step reads, uncompressed (dense) and with
    every --stack; whether weights and cache fit the GPU; and a lower bound of the time per token: the bytes of a step
    over the bandwidth, or its FLOPs over the peak. GB are 1e9 bytes. kvcomp.cost.roofline documents the counts.
    """
    device = _device(gpu, tflops, bandwidth, memory)
    contexts = whole_numbers("context", context or ["4096"], "tokens")
    batches = whole_numbers("batch", batch or ["1"], "sequences")
    if weight_bits is not None and not 0 < weight_bits <= 64:
        raise KvcompError(f"weight-bits: {weight_bits:g} is not between 0 and 64.")
    from kvcomp.cost.bill import Assumption, bills
    from kvcomp.stages.stack import Stack

    stacks = [Stack.parse(spec) for spec in stack or ()]
    assumptions = [Assumption.parse(text) for text in assume or ()]
    from kvcomp.integrations.huggingface.shapes import model_shape

    from . import bills_shown

    with waiting(f"Building {model} without weights"):
        shape = model_shape(model, weight_bits)
    groups = [bills(shape, stacks, c, b, assumptions) for c in contexts for b in batches]
    notes = bills_shown.remarks(shape, max(contexts), bool(assumptions), bool(stacks))
    if as_json:
        DOCUMENT.print(**bills_shown.document(shape, device, groups, notes))
        return
    console = Plain(width=max(Plain().width, WIDTH))  # a row stays a line, also in a file
    for line in bills_shown.heading(shape, device):
        console.print(line, soft_wrap=True)
    for table in (bills_shown.bill_table(groups, device), bills_shown.roofline_table(shape, device, groups)):
        console.print()
        console.print(table)
    console.print()
    if parts:
        for row in (row for group in groups for row in group):
            console.print(bills_shown.parts_line(row), soft_wrap=True)
    for note in notes:
        console.print(styled(note, "dim"))


def _device(gpu: str | None, tflops: float | None, bandwidth: float | None, memory: float | None) -> Gpu:
    if tflops is None and bandwidth is None:
        known = find_gpu(gpu or "H100")
        return known if memory is None else replace(known, memory=memory)
    if gpu is not None:
        raise KvcompError(f"gpu: give either --gpu {gpu} or your own --tflops and --bandwidth, not both.")
    if tflops is None or bandwidth is None:
        missing = "tflops" if tflops is None else "bandwidth"
        raise KvcompError(f"{missing}: your own device needs both --tflops and --bandwidth.")
    return Gpu("custom", tflops, bandwidth, memory)
