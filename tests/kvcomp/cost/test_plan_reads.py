"""Plans foretell what a decode step reads and what the layer holds, to the byte and by part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp import Stack, UnsupportedError, Window
from kvcomp.architecture import LayerKind, LayerShape, Matrices, ModelShape
from kvcomp.cache.layer import LayerStore
from kvcomp.cost.bill import Assumption, bill, bills
from kvcomp.cost.hardware import Gpu
from kvcomp.cost.roofline import decode
from kvcomp.errors import KvcompError
from kvcomp.ledger import add_parts, storage_bytes
from kvcomp.stages.plan import held_by_stream, held_parts, read_by_stream, read_parts

pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy")
STACKS = (
    "none",
    "window(sinks=4, recent=32)",
    "kivi(bits=2)",
    "kivi(bits=4, group=16) + window(sinks=3, recent=7)",
    "int(bits=4, basis=hadamard)",
    "quest(pages=4, dense_layers=0)",
    "kivi(bits=4) + quest(pages=3, dense_layers=0) + window(sinks=4)",
    "snapkv(keep=0.25) + kivi(bits=2)",
    "snapkv(budget=200, window=16) + quest(pages=2, dense_layers=0)",
    "streaming(recent=256) + int(bits=8)",
    "streaming(recent=100) + window(sinks=8, recent=150)",
)
ROWS, HEADS = 2, 3


def after_one_step(
    spec: str, tokens: int, k_dim: int, v_dim: int, dtype: torch.dtype, window: int | None = None
) -> tuple[LayerStore, dict]:
    """The store after a prefill and one decode step, and what it held between the two. window: of a sliding layer."""
    torch.manual_seed(tokens)
    k, v = torch.randn(ROWS, HEADS, tokens, k_dim).to(dtype), torch.randn(ROWS, HEADS, tokens, v_dim).to(dtype)
    q = torch.randn(ROWS, 2 * HEADS, tokens, k_dim).to(dtype)
    stack = Stack.parse(spec)
    plan = stack.plan(0, 1) if window is None else stack.sliding_plan(0, 1, window)
    assert plan is not None
    store = LayerStore(plan)
    store.start(k, v)
    store.write(k, v, None, q, k_dim**-0.5)
    held = store.held(set())
    store.append(k[:, :, :1], v[:, :, :1])
    store.attend(q[:, :, :1], k_dim**-0.5)
    return store, held


@pytest.mark.parametrize("spec", STACKS)
@pytest.mark.parametrize("tokens", [1, 33, 160, 777])
@pytest.mark.parametrize(("k_dim", "v_dim", "dtype"), [(32, 32, torch.bfloat16), (64, 16, torch.float32)])
def test_read_and_held_are_what_the_store_reports(
    spec: str, tokens: int, k_dim: int, v_dim: int, dtype: torch.dtype
) -> None:
    check_foretold(*after_one_step(spec, tokens, k_dim, v_dim, dtype), tokens)


@pytest.mark.parametrize("tokens", [1, 139, 140, 160, 203, 204, 777, 1024])
@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "kivi(bits=2, group=16) + window(recent=40)",
        "int(bits=4, basis=hadamard)",
        "snapkv(keep=0.25) + turboquant(bits=4) + quest(pages=4) + window(sinks=4, recent=32)",
    ],
)
def test_so_is_a_layer_with_a_sliding_window(spec: str, tokens: int) -> None:
    store, held = after_one_step(spec, tokens, 64, 64, torch.bfloat16, window=140)
    check_foretold(store, held, tokens)
    assert store.plan.attended(tokens) == min(tokens + 1, 140)
    pages, exact = store.plan.stored(tokens)
    assert min(tokens, 139) <= pages * store.plan.page_size + exact < 139 + store.plan.page_size


def check_foretold(store: LayerStore, held: dict, tokens: int) -> None:
    k_dim, v_dim, dtype = store.k_dim, store.v_dim, store.dtype
    streams = ROWS * HEADS
    given = (store.plan, k_dim, v_dim, tokens, dtype)
    assert {name: size * streams for name, size in read_parts(*given).items()} == add_parts([store.read])
    assert read_by_stream(*given) * streams == sum(store.read.values())
    shared = {"constants": held.pop("constants"), "history": held.pop("history")}
    held["constants"] = storage_bytes(store.codec.adapted())  # the rest of them is shared
    assert {name: size * streams for name, size in held_parts(*given).items()} == add_parts([held]), shared
    assert held_by_stream(*given) * streams == sum(held.values())


def test_a_selective_read_has_a_table_all_summaries_and_the_chosen_pages() -> None:
    plan = Stack.parse("quest(pages=4, dense_layers=0)").plan(0, 1)
    parts = read_parts(plan, 64, 64, 1000, torch.bfloat16)
    pages = 1000 // 16
    assert parts == {
        "pages": 4 * 16 * 128 * 2,
        "summaries": pages * 2 * 64 * 2,
        "window": (1000 - pages * 16 + 1) * 128 * 2,
        "table": pages * 4,
    }


@given(spec=st.sampled_from(STACKS), tokens=st.integers(1, 20_000))
@settings(deadline=None, max_examples=60)
def test_attended_tokens_are_those_read(spec: str, tokens: int) -> None:
    plan = Stack.parse(spec).plan(0, 1)
    pages, exact = plan.stored(tokens)
    assert 0 <= exact < plan.slots
    assert 1 <= plan.attended(tokens) <= tokens + 1
    if not plan.policies:
        assert pages * plan.page_size + exact == tokens
        if plan.selector is None:
            assert plan.attended(tokens) == tokens + 1
    if plan.quantizer.name == "none":
        parts = read_parts(plan, 32, 32, tokens, torch.bfloat16)
        tables = parts.get("table", 0) + parts.get("summaries", 0)
        assert sum(parts.values()) - tables == plan.attended(tokens) * 64 * 2


FULL = LayerShape(2, 64, 64, 8, 128, 128)
SLIDING = LayerShape(2, 64, 64, 8, 128, 128, window=128)
SHAPE = ModelShape("", (FULL,) * 4, Matrices(1000, 2000.0))
WINDOWED = ModelShape("", (replace(SLIDING, kind=LayerKind.SLIDING), FULL), Matrices(1000, 2000.0))
HYBRID = ModelShape("", (SLIDING, FULL, LayerShape(state=500), FULL), Matrices(1000, 2000.0))


@pytest.mark.parametrize("spec", STACKS)
def test_effective_bits_of_a_bill_are_those_of_the_stack(spec: str) -> None:
    stack = Stack.parse(spec)
    told = stack.effective_bits(head_dim=64, tokens=3000, layers=4)
    assert bill(SHAPE, stack, 3000, batch=3).effective_bits == pytest.approx(told)


def test_without_a_stack_a_bill_is_the_roofline() -> None:
    for shape in (SHAPE, HYBRID):
        dense = bill(shape, None, 3000, batch=5)
        assert dense.work == decode(shape, 3000, batch=5)
        assert (dense.held, dense.read) == dense.dense == (5 * shape.cache_bytes(3000), 5 * shape.cache_bytes(3001))
        assert dense.held_ratio == dense.read_ratio == 1
        assert dense.effective_bits == 16


def test_only_full_attention_layers_are_compressed() -> None:
    row = bill(HYBRID, Stack.parse("int(bits=4)"), 3000, batch=2)
    library = 2 * (128 * 2 * 128 * 2 + 500)
    assert row.held_parts["library"] == row.read_parts["library"] == library
    alone = bill(ModelShape("", (FULL, FULL), Matrices(1000, 2000.0)), Stack.parse("int(bits=4)"), 3000, batch=2)
    assert row.held - library == alone.held
    assert row.effective_bits == alone.effective_bits


@pytest.mark.parametrize("spec", ["int(bits=4)", "snapkv(keep=0.5) + int(bits=4)"])
def test_a_quantizer_packs_layers_with_a_sliding_window(spec: str) -> None:
    stack, context = Stack.parse(spec), 3000
    row, dense = bill(WINDOWED, stack, context, batch=2), bill(WINDOWED, stack + Window(sliding="dense"), context)
    plan = stack.sliding_plan(0, 2, 128)
    assert plan is not None
    own = held_by_stream(plan, 64, 64, context, torch.bfloat16)
    full = held_by_stream(stack.plan(1, 2, [1]), 64, 64, context, torch.bfloat16)
    assert row.held == 2 * 2 * (own + full)
    assert "library" not in row.held_parts
    assert row.effective_bits == pytest.approx(8 * (own + full) / (2 * 64 * (context + 128)))
    assert row.read < 2 * dense.read
    assert dense.held_parts["library"] == 128 * 2 * 128 * 2
    assert bill(WINDOWED, "snapkv(keep=0.5)", context).held_parts["library"] == 128 * 2 * 128 * 2  # no quantizer


def test_layer_exceptions_count_model_layers() -> None:
    """As in the cache: quest leaves the model's first two layers dense, whatever their kind."""
    row = bill(HYBRID, Stack.parse("quest(pages=4)"), 3000)
    assert row.held_parts["summaries"] == 3000 // 16 * 2 * 64 * 2 * 2  # the last layer's, two heads


def test_a_batch_multiplies_the_cache_but_not_the_weights() -> None:
    stack = Stack.parse("kivi(bits=2)")
    one, many = bill(SHAPE, stack, 3000), bill(SHAPE, stack, 3000, batch=7)
    assert many.held == 7 * one.held
    assert many.work.cache == many.read == 7 * one.read
    assert many.work.weights == one.work.weights
    assert many.work.flops == 7 * one.work.flops


def test_fewer_tokens_seen_cost_fewer_flops() -> None:
    dense, sparse = (bill(SHAPE, Stack.parse(spec), 3000) for spec in ("none", "quest(pages=4, dense_layers=0)"))
    assert dense.work.flops == decode(SHAPE, 3000).flops
    seen = 4 * 16 + 3000 % 16 + 1
    assert sparse.work.flops == 2 * 1000 + 4 * 2 * 8 * 128 * seen


def test_what_fits() -> None:
    row = bill(SHAPE, None, 1000)
    assert row.total == 2000 + SHAPE.cache_bytes(1000)
    assert row.fits(Gpu("", 1, 1, memory=row.total / 1e9)) is True
    assert row.fits(Gpu("", 1, 1, memory=row.total / 1e9 * 0.999)) is False
    assert row.fits(Gpu("", 1, 1)) is None


def test_assumptions_follow_each_cache_one_more_at_a_time() -> None:
    given = [Assumption.parse(text) for text in ("latent/8", "bits/4", "reads/10")]
    rows = bills(SHAPE, [Stack.parse("int(bits=4)")], 1000, 2, given)
    assert [(r.label, len(r.assumed)) for r in rows] == [
        (label, n) for label in ("dense", "int(bits=4)") for n in range(4)
    ]
    dense = rows[0]
    assert [dense.held / r.held for r in rows[:4]] == pytest.approx([1, 8, 32, 32])
    assert [dense.read / r.read for r in rows[:4]] == pytest.approx([1, 8, 32, 320])
    assert [r.read_ratio for r in rows[:4]] == pytest.approx([1, 8, 32, 320])
    for row in rows:
        assert row.work.cache == pytest.approx(row.read)
        assert row.work.weights == dense.work.weights


@pytest.mark.parametrize(
    "text", ["latent", "latent/", "/8", "latent/0", "latent/-2", "latent/x", "latent/inf", "a b/2"]
)
def test_an_assumption_is_a_name_and_a_factor(text: str) -> None:
    with pytest.raises(KvcompError, match="NAME/FACTOR"):
        Assumption.parse(text)


def test_latents_are_planned_as_one_stream() -> None:
    shape = ModelShape("mla", (LayerShape(1, 512, 64, 16, 320, 1088, kind=LayerKind.LATENT),), Matrices(1000, 2000.0))
    assert bill(shape, Stack.parse("int(bits=8)"), 1000).held < bill(shape, None, 1000).held
    for spec in ("snapkv(keep=0.5)", "quest(keep=0.5, dense_layers=0)"):
        assert bill(shape, Stack.parse(spec), 1000).read < bill(shape, Stack.parse("none"), 1000).read
    with pytest.raises(UnsupportedError, match="criticalkv"):
        bill(shape, Stack.parse("criticalkv"), 1000)
