"""Steps on a device that is not looked at, as a GPU must not be: planning, attention, and what graphs can hold."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from far_device import FAR, FarDevice
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from kvcomp.attention import Part
from kvcomp.errors import KvcompError
from kvcomp.integrations.vllm import backend, impl, window
from kvcomp.integrations.vllm.backend import StepBuilder
from kvcomp.integrations.vllm.decode import Decoder, DecodeStep
from kvcomp.integrations.vllm.impl import PageAttention
from kvcomp.integrations.vllm.key_centres import turned
from kvcomp.integrations.vllm.setup import Setup
from kvcomp.integrations.vllm.step import Step
from kvcomp.kernels import dispatch
from kvcomp.stack import Stack

HEADS, GROUP, DIM, LAYER = 2, 3, 64, SimpleNamespace(layer_name="model.layers.2.self_attn.attn")
HOST = torch.device("cpu")
COLUMNS, REQUESTS = 20, 6  # blocks of a request


class Engine:
    """What an engine holds of one layer: its attention, a pool for pages and one for windows, and requests' blocks."""

    def __init__(self, stack: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        self.setup = setup = Setup(Stack.parse(stack), layers=4, dim=DIM, dtype=torch.float32, drafts=0)
        self.device = device
        self.config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={}),
            cache_config=SimpleNamespace(block_size=setup.page_size),
            model_config=SimpleNamespace(model="a model whose weights are elsewhere", hf_text_config=None),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
        monkeypatch.setattr(Setup, "of", lambda _: setup)
        for module in (impl, window):
            monkeypatch.setattr(module, "get_current_vllm_config", lambda: self.config)
        self.attention = PageAttention(HEADS * GROUP, DIM, DIM**-0.5, HEADS)
        self.pool = self.filled(1 + REQUESTS * COLUMNS)
        self.table = 1 + torch.randperm(REQUESTS * COLUMNS).view(REQUESTS, COLUMNS).int()
        context = {}
        if (own := self.attention.window) is not None:
            blocks = own.get_kv_cache_spec(self.config).blocks
            own.kv_cache = self.filled(1 + REQUESTS * blocks).zero_()
            held = 1 + torch.arange(REQUESTS * blocks).view(REQUESTS, blocks)
            context = {own.name: SimpleNamespace(blocks=held.to(device))}
        monkeypatch.setattr(impl, "get_forward_context", lambda: SimpleNamespace(attn_metadata=context))

    def filled(self, blocks: int) -> Tensor:
        cell = self.setup.record_bytes(HEADS) // self.setup.page_size
        shape = blocks, HEADS, self.setup.page_size, cell
        return torch.full(shape, 0xFF, dtype=torch.uint8, device=self.device)

    def slots(self, starts: list[int], lengths: list[int]) -> Tensor:
        """Places of the new tokens in the pool."""
        size, found = self.setup.page_size, []
        for r, (length, n) in enumerate(zip(lengths, torch.tensor(starts).diff().tolist(), strict=True)):
            place = torch.arange(length - n, length)
            found.append(self.table[r, place // size].long() * size + place % size)
        return torch.cat(found)

    def planned(self, starts: list[int], lengths: list[int]) -> Step:
        table, slots = (x.to(self.device) for x in (self.table, self.slots(starts, lengths)))
        return Step.of(self.setup, HEADS, starts, lengths, [1] * len(lengths), table, slots)

    def forward(self, step: Step | DecodeStep, *new: Tensor) -> Tensor:
        out = torch.full_like(new[0], 7).flatten(1)
        self.attention.forward(LAYER, *new, self.pool, step, out)
        return out

    def random(self, tokens: int) -> list[Tensor]:
        return [torch.randn(tokens, n, DIM).to(self.device) for n in (HEADS * GROUP, HEADS, HEADS)]


@pytest.mark.parametrize(
    "stack",
    [
        "int(bits=4)",
        "int(bits=3, group=4)",
        "turboquant(bits=4)",
        "kivi(bits=2)",
        "nvfp4",
        "int8 + window(sinks=4, recent=70)",
        "streaming(sinks=4, recent=64) + int8",
        "int(bits=4, basis=hadamard) + quest(pages=2)",
    ],
)
def test_a_step_does_not_wait(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, parts of prompts, single tokens, several pages' ends in a step: few copies of what is planned."""
    engine = Engine(stack, FAR, monkeypatch)
    engine.attention.bind(LAYER.layer_name, FAR)  # what is made once may be copied
    past = [0, 0, 0]
    for new in ([150, 70, 1], [40, 1, 1], [1, 1, 1], [62, 30, 5], [1, 1, 1]):
        starts = [0, *torch.tensor(new).cumsum(0).tolist()]
        past = [a + b for a, b in zip(past, new, strict=True)]
        tokens = engine.random(sum(new))
        with FarDevice() as seen:
            step = engine.planned(starts, past)
            assert seen.moved <= 2 + len(step.groups) + 3  # table and slots, groups, writes, votes, pages that begin
            before = seen.moved
            out = engine.forward(step, *tokens)
            assert seen.moved == before
        assert out.shape == (sum(new), HEADS * GROUP * DIM)


def test_what_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at a count, and a tensor that was left on the host."""
    engine = Engine("kivi(bits=2)", FAR, monkeypatch)
    step, new = engine.planned([0, 1], [130]), engine.random(1)
    with FarDevice():
        with pytest.raises(RuntimeError, match="item"):
            int(step.groups[0].counts.max())
        object.__setattr__(step.groups[0], "tokens", torch.zeros(1, 1, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="host and of the device"):
            engine.forward(step, *new)


def by_reference(*args: Any, tokens: Any, in_tokens: bool, workspace: Tensor) -> Part:
    """`dispatch.by_triton`, as its specification."""
    queries, pool, ids, counts, layout, codec, _, scale, softcap, lse_of_pages = args
    args = queries, pool, ids, counts, layout, codec, scale, softcap, lse_of_pages, tokens, in_tokens
    return dispatch.attend_pages(*args)


@pytest.mark.parametrize("stack", ["none", "int(bits=4)", "int(bits=2, basis=hadamard)", "turboquant(bits=3)", "mxfp4"])
@pytest.mark.parametrize("biased", [False, True])
def test_a_decode_step_is_a_step(stack: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned on the device, with padding behind the requests, or on the host: the same attention, the same pool."""
    if biased:
        of_keys = turned(30 * torch.randn(HEADS, DIM), torch.linspace(1, 0.001, DIM // 2), 1.0)
        monkeypatch.setattr(impl, "turned_biases", lambda *_: of_keys)
    engine = Engine(stack, HOST, monkeypatch)
    monkeypatch.setattr(dispatch, "by_triton", by_reference)
    lengths = [1, 63, 64, 65, 200]
    pages, past = engine.attention.bind(LAYER.layer_name, HOST).at(engine.pool), [n - 1 for n in lengths]
    first = engine.planned([0, *torch.tensor(past).cumsum(0).tolist()], past)
    pages.write_tokens(*engine.random(sum(past))[1:], pages.cells(first.slot_mapping, first.begun))
    starts = list(range(len(lengths) + 1))
    new, before = engine.random(REQUESTS), engine.pool.clone()
    expected = engine.forward(engine.planned(starts, lengths), *(x[: len(lengths)] for x in new))
    written = engine.pool.clone()
    engine.pool.copy_(before)
    decoder = Decoder(REQUESTS, COLUMNS - 1, engine.setup.page_size, HEADS, torch.zeros(1), pages.frequencies)
    slots = torch.cat([engine.slots(starts, lengths), torch.tensor([-1])])
    with dispatch.reference_only():
        found = engine.forward(decoder.plan(engine.table, torch.tensor([*lengths, 0]), slots), *new)
    torch.testing.assert_close(found[:-1], expected, rtol=1e-4, atol=1e-4)
    assert (found[-1] == 0).all()
    assert torch.equal(engine.pool[1:], written[1:])  # padding has gone to block 0, which is nobody's


def configured(engine: Engine, device_type: str) -> Any:
    """What a builder asks of vLLM's config."""
    model = SimpleNamespace(
        max_model_len=500, get_num_kv_heads=lambda _: HEADS, get_num_attention_heads=lambda _: HEADS * GROUP
    )
    layers = {LAYER.layer_name: SimpleNamespace(impl=engine.attention)}
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device_type),
        model_config=model,
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
    """builder(stack, device type, why not): a layer and its builder, where kernels have that obstacle."""

    def made(stack: str, device_type: str, why: str | None) -> tuple[Engine, StepBuilder]:
        engine = Engine(stack, FAR, monkeypatch)
        monkeypatch.setattr(backend, "obstacle", lambda *_: why)
        sizes = REQUESTS, COLUMNS, engine.setup.page_size, HEADS
        monkeypatch.setattr(Decoder, "on", lambda *all: Decoder(*sizes, torch.zeros(1, device=FAR), all[-1]))
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
        singles = built.build(0, batch_of(engine, [3, 70, 64], [1, 1, 1]))
        mixed = built.build(0, batch_of(engine, [3, 70, 64], [1, 20, 1]))
    assert isinstance(singles, DecodeStep if graphs else Step)
    assert isinstance(mixed, Step)
    if graphs:
        captured = built.build_for_cudagraph_capture(batch_of(engine, [1, 1, 0, 0], [1, 1, 1, 1]))
        assert captured.counts.shape == (4 * HEADS,)
        with pytest.raises(KvcompError, match="a graph would hold lengths"):
            built.build_for_cudagraph_capture(batch_of(engine, [3, 70], [1, 20]))


def test_lengths_that_the_host_does_not_know(builder: Any) -> None:
    engine, built = builder("kivi(bits=2)", "cuda", None)
    with FarDevice(), pytest.raises(RuntimeError, match="waits for the device"):
        built.build(0, batch_of(engine, [3, 70], [1, 1], on_host=False))
