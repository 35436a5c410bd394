"""`kvcomp plan`: the bill of materials and the roofline, printed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kvcomp.architecture import LayerKind, ModelShape
from kvcomp.console import Plain, styled, waiting
from kvcomp.cost.hardware import GPUS, Gpu, find_gpu
from kvcomp.cost.roofline import attention_intensity, decode_limit, prefill
from kvcomp.errors import KvcompError

from .options import completed_shapes, one_of, whole_numbers
from .output import Document, Json

if TYPE_CHECKING:
    from kvcomp.cost.bill import Bill

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

    with waiting(f"Building {model} without weights"):
        shape = model_shape(model, weight_bits)
    groups = [bills(shape, stacks, c, b, assumptions) for c in contexts for b in batches]
    notes = _notes(shape, max(contexts), bool(assumptions), bool(stacks))
    if as_json:
        DOCUMENT.print(**_document(shape, device, groups, notes))
        return
    console = Plain(width=max(Plain().width, WIDTH))  # a row stays a line, also in a file
    for line in _heading(shape, device):
        console.print(line, soft_wrap=True)
    for table in (_bill_table(groups, device), _roofline_table(shape, device, groups)):
        console.print()
        console.print(table)
    console.print()
    if parts:
        for row in (row for group in groups for row in group):
            console.print(_parts_line(row), soft_wrap=True)
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


def _notes(shape: ModelShape, longest: int, assumed: bool, compressed: bool) -> list[str]:
    notes = []
    if assumed:
        notes.append("assumed: divided by a factor that you gave; nothing here provides or measures it.")
    if shape.positions is not None and longest > shape.positions:
        notes.append(
            f"{longest:,} tokens are more than the {shape.positions:,} positions that {shape.name} is made for."
        )
    if LayerKind.LATENT in shape.kinds:
        notes.append(
            "A latent cache, read as it is (absorbed attention); DynamicCache's is expanded to heads in every step."
        )
    if shape.total_experts:
        notes.append(
            f"{shape.active_experts} of {shape.total_experts} experts per token, chosen uniformly: "
            "a larger batch reads more of them."
        )
    if compressed and not all(layer.full for layer in shape.layers):
        notes.append("Sliding windows and recurrent states stay uncompressed; they are in every row.")
    return notes


def _heading(shape: ModelShape, gpu: Gpu) -> list[Text]:
    full = sum(layer.full for layer in shape.layers)
    rest = len(shape.layers) - full
    cache = f"{size(shape.token_bytes)} of K and V per token ({shape.token_bytes:,} B, {shape.dtype})"
    if rest:
        held = size(shape.fixed_bytes(shape.positions or 1 << 30))
        cache += f" in {full} full-attention layers; the other {rest} hold at most {held} per sequence"
    memory = "" if gpu.memory is None else f", {gpu.memory:g} GB"
    weights = f"weights {size(shape.weights.nbytes)}, of which a token's step reads {size(shape.weight_bytes(1))}"
    parameters = f"{shape.weights.parameters / 1e9:.3g} B parameters in {len(shape.layers)} layers"
    peaks = f"{gpu.tflops:g} TFLOP/s, {gpu.bandwidth:g} TB/s{memory}: ridge {gpu.ridge:.1f} FLOP/byte"
    lines = ((shape.name, f"{parameters}: {weights}"), ("KV cache", cache), (gpu.name, peaks))
    return [Text.assemble(styled(name, "bold"), "  ", said) for name, said in lines]


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), highlight=False)
    table.add_column(first, min_width=25, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _bill_table(groups: list[list[Bill]], gpu: Gpu) -> Table:
    fits = () if gpu.memory is None else (f"fits {gpu.memory:g} GB",)
    table = _table("decode", "KV held", "", "bits", "KV read", "", "+ weights", "ms/token", "tokens/s", "FLOP/B", *fits)
    for group in groups:
        table.add_row()
        table.add_row(styled(f"{group[0].context:,} tokens x {group[0].batch}", "bold"))
        for row in group:
            table.add_row(
                f"  + {row.assumed[-1]} assumed" if row.assumed else row.label,
                size(row.held),
                f"{row.held_ratio:.2f}x",
                "" if row.assumed else f"{row.effective_bits:.2f}",
                size(row.read),
                f"{row.read_ratio:.2f}x",
                size(row.work.nbytes),
                f"{row.work.seconds(gpu) * 1e3:.2f}",
                f"{row.tokens_per_second(gpu):,.0f}",
                "" if row.assumed else f"{row.work.intensity:.2f}",
                *(Text.assemble("yes" if row.fits(gpu) else ("no", "red"), f", {size(row.total)}") for _ in fits),
            )
    return table


def _roofline_table(shape: ModelShape, gpu: Gpu, groups: list[list[Bill]]) -> Table:
    table = _table("FLOP per byte", "prefill", "takes at least", "decode", "attention alone", "batch without end")
    table.add_row()
    for dense, *_ in groups:
        first = prefill(shape, dense.context, dense.batch)
        table.add_row(
            f"{dense.context:,} tokens x {dense.batch}, dense",
            f"{first.intensity:.1f}",
            f"{first.seconds(gpu):,.3g} s",
            f"{dense.work.intensity:.2f}",
            f"{attention_intensity(shape, dense.context):.2f}",
            f"{decode_limit(shape, dense.context):.2f}",
        )
    return table


def _parts_line(row: Bill) -> Text:
    label = " ".join([row.label, *map(str, row.assumed)])
    said = (", ".join(f"{name} {size(n)}" for name, n in side.items()) for side in (row.held_parts, row.read_parts))
    held, read = said
    return Text.assemble(styled(f"{row.context:,} x {row.batch}", "bold"), f" {label}: holds {held}; reads {read}")


def _document(shape: ModelShape, gpu: Gpu, groups: list[list[Bill]], notes: list[str]) -> dict[str, Any]:
    firsts = [group[0] for group in groups]
    return {
        "model": {
            "name": shape.name,
            "layers": len(shape.layers),
            "full_attention_layers": sum(layer.full for layer in shape.layers),
            "parameters": shape.weights.parameters,
            "active_parameters": round(shape.active_parameters),
            "weight_bytes": shape.weights.nbytes,
            "weight_bytes_read": shape.weight_bytes(1),
            "kv_bytes_per_token": shape.token_bytes,
            "dtype": shape.dtype,
            "positions": shape.positions,
        },
        "gpu": {
            "name": gpu.name,
            "tflops": gpu.tflops,
            "bandwidth_tb_s": gpu.bandwidth,
            "memory_gb": gpu.memory,
            "ridge": gpu.ridge,
            "source": gpu.source,
        },
        "prefill": [
            {
                "context": row.context,
                "batch": row.batch,
                "flops": work.flops,
                "bytes": work.nbytes,
                "intensity": work.intensity,
                "ms": work.seconds(gpu) * 1e3,
                "attention_intensity": attention_intensity(shape, row.context),
                "decode_intensity_limit": decode_limit(shape, row.context),
            }
            for row in firsts
            for work in [prefill(shape, row.context, row.batch)]
        ],
        "decode": [_record(row, gpu) for group in groups for row in group],
        "notes": notes,
    }


def _record(row: Bill, gpu: Gpu) -> dict[str, Any]:
    return {
        "context": row.context,
        "batch": row.batch,
        "stack": row.label,
        "hash": None if row.stack is None else row.stack.hash,
        "assumed": [str(assumption) for assumption in row.assumed],
        "held": row.held,
        "held_ratio": row.held_ratio,
        "held_parts": row.held_parts,
        "effective_bits": None if row.assumed else row.effective_bits,
        "read": row.read,
        "read_ratio": row.read_ratio,
        "read_parts": row.read_parts,
        "step_bytes": row.work.nbytes,
        "flops": None if row.assumed else row.work.flops,
        "intensity": None if row.assumed else row.work.intensity,
        "ms_per_token": row.work.seconds(gpu) * 1e3,
        "tokens_per_second": row.tokens_per_second(gpu),
        "total_bytes": row.total,
        "fits": row.fits(gpu),
    }


def size(nbytes: float) -> str:
    """Bytes with three digits and a decimal unit: 147456 -> "147 KB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if float(f"{nbytes:.3g}") < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
