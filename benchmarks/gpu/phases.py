"""What one GPU says in minutes, a phase at a time: `run.sh` beside this calls it. Every result is a line of JSON in
$OUT, written when it is there, so that nothing is lost if a later one fails. No network, no weights: everything is
random, and what is timed is checked against the reference, which a line reports.

python benchmarks/gpu/phases.py copy|host|attention|prefill|decode|summary [--tiny] [--fake]: tiny sizes, also where
there is no GPU; fake: there, triton compiles for one and launches nothing, so that no result means anything
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvcomp.attention import Part, attend_causal, merge
from kvcomp.benchmarks.gpu import fake_driver
from kvcomp.benchmarks.gpu.timing import DEVICE, GPU, OUT, eager_ms, emit, graph_ms, kept, wait
from kvcomp.benchmarks.peers import PEERS, Geometry, ready
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels import dispatch
from kvcomp.kernels.triton_backend import Triton
from kvcomp.stages.stack import Stack

STACKS = (
    *("none", "int8", "fp8", "int(bits=4)", "int(bits=2)", "kivi(bits=4)", "kivi(bits=2)"),
    *("turboquant(bits=4)", "turboquant(bits=2)", "nvfp4", "mxfp4", "klt(bits=2)"),
)
ALL_PAGES = "window(sinks=0, recent=0)"  # what kernels read is then what is timed
COLD = 300 << 20  # bytes of copies of a cache that are read in turn: the L2 cache has 50 MiB
LIMIT = 1e-2  # of the error that 16-bit products may have, relative to the reference


def copy(tiny: bool) -> None:
    """The ceiling: bytes a second of a copy (read and written) and of a sum (read)."""
    source = torch.zeros((1 << 20) if tiny else (1 << 30), device=DEVICE, dtype=torch.float32)
    target = torch.empty_like(source)
    for name, call, times in (("copy", lambda: target.copy_(source), 2), ("sum", source.sum, 1)):
        ms = graph_ms([call] * 4)
        emit("copy", what=name, ms=ms, gbps=times * source.nbytes / ms / 1e6)


def host(_: bool) -> None:
    """CPU time of one call, under a driver that launches nothing: where there is a GPU, in a process of its own."""
    command = [sys.executable, "-m", "kvcomp.benchmarks.gpu.fake_driver"]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        emit("host", **json.loads(line))


def filled(spec: str, k: Tensor, v: Tensor, q: Tensor, scale: float) -> LayerStore:
    store = LayerStore(Stack.parse(spec).plan(4, 36))
    store.start(k, v)
    seen = q.expand(-1, -1, k.shape[2], -1) if store.plan.needs_queries else None
    store.write(k, v, None, seen, scale)
    store.end_prompt()
    return store


def reading(store: LayerStore, q: Tensor, scale: float) -> Callable[[], Any]:
    """Attention over all pages of a store, as a graph records it."""
    storage = store.storage
    ids, counts = storage.table.held()
    codec, layout, pool = storage.records.codec, storage.records.layout, storage.pool.data
    return lambda: dispatch.attend_pages(q, pool, ids, counts, layout, codec, scale)


def attention(tiny: bool) -> None:
    """One layer of Qwen3-8B, a token of each row: L2-cold, by graphs, beside the best dense kernels."""
    heads, group, dim = (2, 4, 128) if tiny else (8, 4, 128)
    dtype, scale = torch.bfloat16, dim**-0.5
    sizes = [(256, 1)] if tiny else [(n << 10, b) for n in (4, 32, 128, 512, 1024) for b in (1, 8) if n * b <= 1024]
    for n, batch in sizes:
        torch.manual_seed(0)
        k, v = (torch.randn(batch, heads, n, dim, dtype=dtype, device=DEVICE) for _ in range(2))
        query = torch.randn(batch, heads * group, 1, dim, dtype=dtype, device=DEVICE)
        rows = query.view(batch * heads, group, dim)
        dense = k.nbytes + v.nbytes
        copies = 1 if tiny else max(1, -(-COLD // dense))
        held = [(k, v), *((k.clone(), v.clone()) for _ in range(copies - 1))]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if GPU else (SDPBackend.MATH,):
            case: dict[str, Any] = {"stack": f"sdpa {backend.name.lower()}", "tokens": n, "batch": batch}
            with kept("attention", **case), sdpa_kernel(backend):
                ms = graph_ms([partial(F.scaled_dot_product_attention, query, *x, enable_gqa=True) for x in held])
                emit("attention", **case, ms=ms, bytes=dense, gbps=dense / ms / 1e6)
        for peer in PEERS:
            case = {"stack": peer.label, "tokens": n, "batch": batch}
            with kept("attention", **case):
                geometry = Geometry(heads * group, heads, dim, dim)
                right = F.scaled_dot_product_attention(query, k, v, enable_gqa=True)
                call = peer.obstacle(geometry, dtype, DEVICE) or ready(peer, query, k, v, right)
                if isinstance(call, str):
                    emit("attention", **case, absent=call)
                else:
                    ms, read = graph_ms([call]), k.numel() * 2 * peer.bytes_per_number
                    emit("attention", **case, ms=ms, bytes=read, gbps=read / ms / 1e6)
        del held
        for spec in STACKS[3:6] if tiny else STACKS:
            case = {"stack": spec, "tokens": n, "batch": batch}
            with kept("attention", **case):
                start = wait()
                store = filled(f"{spec} + {ALL_PAGES}", k, v, query, scale)
                write_ms = 1e3 * (wait() - start)
                call = reading(store, rows, scale)
                error = None
                if n * batch <= 32 << 10:
                    with dispatch.reference_only():
                        right = call().out
                    error = float((call().out - right).norm() / right.norm())
                layout = store.storage.records.layout
                read = layout.body_bytes * batch * heads * int(store.storage.table.longest)
                copies = 1 if tiny else max(1, -(-COLD // read))
                others = [filled(f"{spec} + {ALL_PAGES}", k, v, query, scale) for _ in range(copies - 1)]
                calls = [call, *(reading(other, rows, scale) for other in others)]
                ms = graph_ms(calls)
                emit(
                    *("attention",),
                    **case,
                    ms=ms,
                    bytes=read,
                    gbps=read / ms / 1e6,
                    eager_ms=eager_ms(call),
                    write_ms=write_ms,
                    error=error,
                    within=error is None or error < LIMIT,
                    of_dense_bytes=read / dense,
                )
                del store, others, calls, call


def prefill(tiny: bool) -> None:
    """Writing a prompt, scoring it, and a chunk after a past."""
    heads, group, dim = (2, 4, 64) if tiny else (8, 4, 128)
    n, m = (512, 64) if tiny else (128 << 10, 8 << 10)
    dtype, scale = torch.bfloat16, dim**-0.5
    k, v = (torch.randn(1, heads, n, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    policies = ["snapkv(keep=0.25)", "h2o(keep=0.25)", "expected_attention(keep=0.25)"]
    for spec in [*(STACKS[3:5] if tiny else STACKS), *policies[: 1 if tiny else 3]]:
        with kept("prefill", what="write", stack=spec, tokens=n):
            q = torch.randn(1, heads * group, n, dim, dtype=dtype, device=DEVICE)
            if GPU:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            store = LayerStore(Stack.parse(spec).plan(4, 36))
            start = wait()
            store.start(k, v)
            store.write(k, v, None, q if store.plan.needs_queries else None, scale)
            store.end_prompt()
            ms = 1e3 * (wait() - start)
            peak = torch.cuda.max_memory_allocated() - before if GPU else None
            emit("prefill", what="write", stack=spec, tokens=n, ms=ms, peak_bytes=peak)
            if spec in policies:
                continue
            query = torch.randn(heads, group, m, dim, dtype=dtype, device=DEVICE)
            own_k, own_v = (torch.randn(heads, m, dim, dtype=dtype, device=DEVICE) for _ in range(2))
            call = partial(after, reading(store, query.flatten(1, 2), scale), query, own_k, own_v, scale)
            emit("prefill", what=f"chunk of {m}", stack=spec, tokens=n, ms=eager_ms(call, 3))


def after(past: Callable[[], Part], query: Tensor, k: Tensor, v: Tensor, scale: float) -> Part:
    """A chunk of a prompt: attention over what came before, and over its own tokens."""
    return merge([past(), attend_causal(query, k, v, scale)])


def decode(tiny: bool) -> None:
    """Tokens of Qwen3-8B with random weights after a cache that is filled without a prompt: eager, compiled."""
    from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

    from kvcomp import CompressedCache

    sizes = [300] if tiny else [32 << 10, 128 << 10, 1 << 20]
    shape: dict[str, Any] = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        if tiny
        else {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    )
    shape |= {"max_position_embeddings": 1 << 21, "attn_implementation": "sdpa", "dtype": torch.bfloat16}
    config = Qwen3Config(**shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        network = Qwen3ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    heads, dim = shape["num_key_value_heads"], shape["head_dim"]
    group = shape["num_attention_heads"] // heads
    token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    for n in sizes:
        parts = [
            [torch.randn(1, heads, min(1 << 16, n - at), dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
            for at in range(0, n, 1 << 16)
        ]
        stacks = [None, "kivi(bits=4)", "int(bits=4)", "turboquant(bits=4)"] if n < 1 << 20 else STACKS[3:6]
        for spec in stacks:
            for mode in ("eager",) if spec is None else ("eager", "compiled"):
                case = {"stack": spec or "DynamicCache", "tokens": n, "mode": mode}
                with kept("decode", **case), torch.no_grad():
                    if GPU:
                        torch.cuda.reset_peak_memory_stats()
                    cache: Any = DynamicCache(config=config)
                    if spec is not None:
                        cache = CompressedCache(spec, network, preallocate=n + 64 if mode == "compiled" else None)
                    for i, layer in enumerate(cache.layers):
                        for k, v in parts:
                            if spec is None:
                                cache.update(k, v, i)
                                continue
                            if not layer.is_initialized:
                                layer.lazy_initialization(k, v)
                            asked = torch.randn(1, heads * group, k.shape[2], dim, dtype=k.dtype, device=DEVICE)
                            layer.store.write(k, v, None, asked if layer.plan.needs_queries else None, dim**-0.5)
                        if mode == "compiled":
                            layer.preallocated.take(layer.store)
                    run = network
                    if mode == "compiled":
                        run = torch.compile(network, backend="cudagraphs" if GPU else "eager", fullgraph=True)

                    place = torch.full((1, 1), n, dtype=torch.int64, device=DEVICE)

                    def step(run: Any = run, cache: Any = cache, place: Tensor = place) -> Tensor:
                        found = run(token, past_key_values=cache, position_ids=place, logits_to_keep=1)
                        place.add_(1)
                        logits: Tensor = found.logits
                        return logits

                    finite = bool(step().isfinite().all())
                    ms = eager_ms(step, 3 if tiny else 11)
                    held = torch.cuda.memory_allocated() if GPU else None
                    emit("decode", **case, ms=ms, finite=finite, allocated=held)


def summary(_: bool) -> None:
    """A table of every line that is there."""
    lines = [json.loads(x) for file in sorted(OUT.glob("*.jsonl")) for x in file.read_text().splitlines()]
    ceiling = max((x["gbps"] for x in lines if x["phase"] == "copy"), default=None)
    text = [f"Device: {torch.cuda.get_device_name() if GPU else 'CPU (rehearsal)'}, torch {torch.__version__}", ""]
    text += [f"Copy: {ceiling:.0f} GB/s" if ceiling else "Copy: not measured", ""]
    for phase in dict.fromkeys(x["phase"] for x in lines):
        rows = [x for x in lines if x["phase"] == phase]
        names = list(dict.fromkeys(name for x in rows for name in x if name != "phase"))
        if phase == "attention" and ceiling:
            names.append("of copy")
            for x in rows:
                x["of copy"] = x["gbps"] / ceiling if "gbps" in x else None
        text += [f"## {phase}", "", " | ".join(names), " | ".join("---" for _ in names)]
        for x in rows:
            cells = (x.get(name, "") for name in names)
            text.append(" | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
        text.append("")
    (OUT / "summary.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


PHASES = {f.__name__: f for f in (copy, host, attention, prefill, decode, summary)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--fake", action="store_true")
    options = parser.parse_args()
    rehearsed: AbstractContextManager[None] = nullcontext()
    if options.fake:
        fake_driver.install()
        rehearsed = dispatch.using(Triton(anywhere=True))
    with kept(options.phase, what="phase"), rehearsed:
        PHASES[options.phase](options.tiny)
    if fake_driver.launched:
        emit("launched", phase_of=options.phase, **fake_driver.launched)


if __name__ == "__main__":
    main()
