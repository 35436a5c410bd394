"""Tables, lines and JSON of `kvcomp plan`."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from kvcomp.architecture import LayerKind, ModelShape
from kvcomp.console import styled
from kvcomp.cost.bill import Bill
from kvcomp.cost.hardware import Gpu
from kvcomp.cost.roofline import attention_intensity, decode_limit, prefill

from .output import size

NEVER_DENSE = (LayerKind.SLIDING, LayerKind.SHARED)  # of layers that do not attend to all tokens


def remarks(shape: ModelShape, longest: int, assumed: bool, compressed: bool) -> list[str]:
    """What to know about these figures."""
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
    if compressed and LayerKind.SLIDING in shape.kinds:
        notes.append("Layers with a sliding window are packed by quantizers; policies and selectors leave them alone.")
    if compressed and any(not layer.full and layer.kind not in NEVER_DENSE for layer in shape.layers):
        notes.append("Recurrent states and windows of another kind stay uncompressed; they are in every row.")
    return notes


def heading(shape: ModelShape, gpu: Gpu) -> list[Text]:
    """The model, its cache and the device, a line each."""
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


def bill_table(groups: list[list[Bill]], gpu: Gpu) -> Table:
    """What is held and read, and how fast a step can be, for each context, batch and stack."""
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


def roofline_table(shape: ModelShape, gpu: Gpu, groups: list[list[Bill]]) -> Table:
    """FLOP per byte of prefill and decode, for each context and batch."""
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


def parts_line(row: Bill) -> Text:
    """What the bytes of a row are."""
    label = " ".join([row.label, *map(str, row.assumed)])
    said = (", ".join(f"{name} {size(n)}" for name, n in side.items()) for side in (row.held_parts, row.read_parts))
    held, read = said
    return Text.assemble(styled(f"{row.context:,} x {row.batch}", "bold"), f" {label}: holds {held}; reads {read}")


def document(shape: ModelShape, gpu: Gpu, groups: list[list[Bill]], notes: list[str]) -> dict[str, Any]:
    """All of it for programs, with the keys of `kvcomp plan --json`."""
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
