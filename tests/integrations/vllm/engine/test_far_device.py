"""Steps that vLLM's builders plan on a device that is not looked at, as a GPU must not be, and what graphs can hold."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from far_device import FAR, FarDevice
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from kvcomp.cache.blocks.decode import Decoder, DecodeStep, most_channels
from kvcomp.cache.blocks.setup import Setup
from kvcomp.cache.blocks.step import Step
from kvcomp.errors import KvcompError
from kvcomp.integrations.vllm import backend, impl, reserve, window
from kvcomp.integrations.vllm.backend import StepBuilder
from kvcomp.integrations.vllm.batch import Batch
from kvcomp.integrations.vllm.impl import PageAttention
from kvcomp.stages.stack import Stack

HEADS, GROUP, DIM, LAYER = 2, 3, 64, SimpleNamespace(layer_name="model.layers.2.self_attn.attn")
COLUMNS, REQUESTS = 20, 6  # blocks of a request


class Engine:
    """What a builder sees of an engine of one layer: its config, its attention, and requests' blocks."""

    def __init__(self, stack: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        self.setup = setup = Setup(Stack.parse(stack), layers=4, dim=DIM, dtype=torch.float32, drafts=0)
        self.device = device
        self.config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={}),
            cache_config=SimpleNamespace(block_size=setup.page_size),
            model_config=SimpleNamespace(model="a model whose weights are elsewhere", hf_text_config=None),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
        for module in (impl, backend):
            monkeypatch.setattr(module, "accepted", lambda _: setup)
        for module in (impl, window):
            monkeypatch.setattr(module, "get_current_vllm_config", lambda: self.config)
        self.attention = PageAttention(HEADS * GROUP, DIM, DIM**-0.5, HEADS)
        self.attention.bind(LAYER.layer_name, device)
        self.table = 1 + torch.randperm(REQUESTS * COLUMNS).view(REQUESTS, COLUMNS).int()


def configured(engine: Engine, device_type: str) -> Any:
    """What a builder asks of vLLM's config."""
    model = SimpleNamespace(
        max_model_len=500, get_num_kv_heads=lambda _: HEADS, get_num_attention_heads=lambda _: HEADS * GROUP
    )
    layers = {LAYER.layer_name: SimpleNamespace(impl=engine.attention)}
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device_type),
        model_config=model,
        cache_config=SimpleNamespace(num_gpu_blocks=None),  # not known yet
        parallel_config=None,
        scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


def batch_of(engine: Engine, lengths: list[int], new: list[int], on_host: bool = True) -> CommonAttentionMetadata:
    starts, held = torch.tensor([0, *new]).cumsum(0).int(), torch.tensor(lengths).int()
    return CommonAttentionMetadata(
        query_start_loc=starts.to(engine.device),
        query_start_loc_cpu=starts,
        seq_lens=held.to(engine.device),
        num_reqs=len(new),
        num_actual_tokens=sum(new),
        max_query_len=max(new),
        max_seq_len=max(lengths),
        block_table_tensor=engine.table[: len(new)].to(engine.device),
        slot_mapping=torch.zeros(sum(new), dtype=torch.int64, device=engine.device),
        seq_lens_cpu_upper_bound=held if on_host else None,
    )


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Engine, StepBuilder]]:
    """builder(stack, device type, why not): a layer and its builder, where kernels have that reason."""

    def made(stack: str, device_type: str, why: str | None) -> tuple[Engine, StepBuilder]:
        engine = Engine(stack, FAR, monkeypatch)
        monkeypatch.setattr(backend, "obstacle", lambda *_: why)
        sizes = REQUESTS, COLUMNS, engine.setup.page_size, HEADS
        monkeypatch.setattr(Decoder, "on", lambda *given: Decoder(*sizes, torch.zeros(1, device=FAR), given[-1]))
        kind = type("Builder", (StepBuilder,), {"built_for": engine.setup})
        spec = SimpleNamespace(num_kv_heads=HEADS)
        return engine, kind(spec, [LAYER.layer_name], configured(engine, device_type), FAR)

    return made


@pytest.mark.parametrize(
    ("stack", "device_type", "why", "support"),
    [
        ("int(bits=4)", "cuda", None, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ("int(bits=4)", "cpu", None, AttentionCGSupport.NEVER),
        ("int(bits=4)", "cuda", "no kernel", AttentionCGSupport.NEVER),
        ("kivi(bits=2)", "cuda", None, AttentionCGSupport.NEVER),
        ("int8 + window(recent=8)", "cuda", None, AttentionCGSupport.NEVER),
        ("int8 + quest(pages=2)", "cuda", None, AttentionCGSupport.NEVER),
    ],
)
def test_what_is_declared_is_built(
    builder: Any, stack: str, device_type: str, why: str | None, support: AttentionCGSupport
) -> None:
    """Decode steps where graphs may hold them, and for batches of single tokens alone; nothing waits for the device."""
    engine, built = builder(stack, device_type, why)
    assert built.get_cudagraph_support(built.vllm_config, built.kv_cache_spec) is support
    graphs = support is not AttentionCGSupport.NEVER
    with FarDevice():
        singles, mixed = (built.build(0, batch_of(engine, [3, 70, 64], new)) for new in ([1, 1, 1], [1, 20, 1]))
        singles, mixed = (x.step(None) if isinstance(x, Batch) else x for x in (singles, mixed))  # as a layer does
    assert isinstance(singles, DecodeStep if graphs else Step)
    assert isinstance(mixed, Step)
    if graphs:
        captured = built.build_for_cudagraph_capture(batch_of(engine, [1, 1, 0, 0], [1, 1, 1, 1]))
        assert captured.counts.shape == (4 * HEADS,)
        with pytest.raises(KvcompError, match="a graph would hold lengths"):
            built.build_for_cudagraph_capture(batch_of(engine, [3, 70], [1, 20]))


@pytest.mark.parametrize("stack", ["int(bits=4)", "turboquant(bits=4)", "int(bits=4, basis=hadamard)"])
def test_what_steps_keep_is_there_while_vllm_measures(
    builder: Any, stack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes as the builder then holds, and not for the layers together with it."""
    monkeypatch.setattr(reserve, "_held", {})
    made = Decoder.on
    engine, built = builder(stack, "cuda", None)
    monkeypatch.setattr(reserve, "_held", {})
    engine.config.scheduler_config = built.vllm_config.scheduler_config
    engine.config.model_config.max_model_len = built.vllm_config.model_config.max_model_len
    for _ in range(2):  # layers
        q = torch.empty(5, HEADS * GROUP, DIM, device=FAR)
        assert engine.attention.forward(LAYER, q, q, q, q, None, q.flatten(1)).shape == (5, HEADS * GROUP * DIM)
    (held,) = reserve._held.values()
    monkeypatch.setattr(Decoder, "on", made)
    monkeypatch.undo()
    sizes = engine.setup.page_size, HEADS, GROUP, most_channels([engine.attention.any_pages.codec], DIM)
    decoder = Decoder.on(FAR, REQUESTS, 500, *sizes, torch.zeros(0))
    assert held.numel() == decoder.workspace.nbytes + decoder.ids.nbytes > 0
    reserve._held[FAR] = held
    reserve.release(FAR)
    assert not reserve._held


@pytest.mark.parametrize(("stack", "device"), [("kivi(bits=2)", FAR), ("int(bits=4)", torch.device("cpu"))])
def test_nothing_is_kept_where_no_graph_holds_steps(
    stack: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserve, "_held", {})
    engine = Engine(stack, device, monkeypatch)
    q = torch.empty(5, HEADS * GROUP, DIM, device=device)
    engine.attention.forward(LAYER, q, q, q, q, None, q.flatten(1))
    assert not reserve._held


def test_lengths_that_the_host_does_not_know(builder: Any) -> None:
    engine, built = builder("kivi(bits=2)", "cuda", None)
    with FarDevice(), pytest.raises(RuntimeError, match="waits for the device"):
        built.build(0, batch_of(engine, [3, 70], [1, 1], on_host=False))
