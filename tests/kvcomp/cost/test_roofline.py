"""The roofline: the published figures of Qwen3-8B on an H100, and what holds for any shape."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomp.architecture import LayerShape, Matrices, ModelShape
from kvcomp.cost.hardware import GPUS, Gpu, find_gpu
from kvcomp.cost.roofline import (
    attention_intensity,
    decode,
    decode_limit,
    prefill,
    step,
)
from kvcomp.errors import KvcompError

H100 = find_gpu("H100")
PLAIN = LayerShape(kv_heads=8, k_dim=128, v_dim=128, heads=32, prefill_width=256, decode_width=256)


def matrices(parameters: int) -> Matrices:
    return Matrices(parameters, 2 * parameters)


# the config's numbers, multiplied out by hand: q, k, v, o and a gated MLP per layer, and an untied output head
QWEN = ModelShape(
    "Qwen3-8B",
    36 * (PLAIN,),
    dense=matrices(36 * (2 * 4096 * 32 * 128 + 2 * 4096 * 8 * 128 + 3 * 4096 * 12288) + 151936 * 4096),
    lookup=matrices(151936 * 4096),
)


def test_published_ridge() -> None:
    assert (H100.tflops, H100.bandwidth) == (989, 3.35)
    assert f"{H100.ridge:.1f}" == "295.2"


def test_published_prefill_intensity() -> None:
    assert f"{prefill(QWEN, 2048).intensity:.1f}" == "2088.1"


@pytest.mark.parametrize(
    ("context", "batch", "published"), [(4096, 1, "1.12"), (4096, 8, "7.03"), (4096, 32, "16.30"), (40960, 32, "6.03")]
)
def test_published_decode_intensity(context: int, batch: int, published: str) -> None:
    assert f"{decode(QWEN, context, batch).intensity:.2f}" == published


def test_published_attention_intensity_and_limit() -> None:
    assert f"{attention_intensity(QWEN, 40960):.2f}" == "4.00"
    assert f"{decode_limit(QWEN, 40960):.2f}" == "6.51"


def test_published_decode_bound() -> None:
    work = decode(QWEN, 40960)
    assert f"{work.weights / 1e9:.1f}" == "15.1"
    assert f"{work.cache / 1e9:.1f}" == "6.0"
    assert f"{work.nbytes / 1e9:.1f}" == "21.2"
    assert f"{work.seconds(H100) * 1e3:.1f}" == "6.3"


def test_published_cache_of_a_million_tokens() -> None:
    assert QWEN.token_bytes == 147_456
    held = QWEN.cache_bytes(1_000_000)
    assert f"{held / 1e9:.0f}" == "147"
    assert f"{held / 8 / 1e9:.0f}" == "18"
    assert f"{held / 8 / 4 / 1e9:.1f}" == "4.6"
    assert f"{held / 8 / 4 / 10 / 1e9:.1f}" == "0.5"


def test_published_cache_of_deepseek_v3() -> None:
    latent = LayerShape(kv_heads=1, k_dim=512, v_dim=64)
    assert f"{ModelShape('', 61 * (latent,), Matrices()).token_bytes / 1e3:.0f}" == "70"


def test_published_intensities_hold_for_context_plus_one_or_not() -> None:
    """A step also reads its own token; counting only those before it changes no printed digit."""
    for context, batch, published in ((4096, 1, "1.12"), (4096, 8, "7.03"), (4096, 32, "16.30"), (40960, 32, "6.03")):
        assert f"{decode(QWEN, context - 1, batch).intensity:.2f}" == published


@given(tokens=st.integers(1, 300), window=st.none() | st.integers(1, 400))
def test_pairs_are_what_each_query_sees(tokens: int, window: int | None) -> None:
    layer = LayerShape(window=window)
    assert layer.pairs(tokens) == sum(layer.seen(i) for i in range(1, tokens + 1))
    assert layer.seen(tokens) == len(range(tokens)[-window:] if window else range(tokens))


@given(context=st.integers(1, 10_000), batch=st.integers(1, 512))
def test_decode_intensity_grows_with_the_batch_towards_its_limit(context: int, batch: int) -> None:
    here = decode(QWEN, context, batch).intensity
    assert here < decode(QWEN, context, batch + 1).intensity < decode_limit(QWEN, context)
    assert decode(QWEN, context, 10**9).intensity == pytest.approx(decode_limit(QWEN, context), rel=1e-2)


def test_windows_and_states_do_not_grow_with_the_context() -> None:
    sliding = LayerShape(2, 64, 64, 4, 128, 128, window=128)
    shape = ModelShape("", (sliding, LayerShape(state=1000), LayerShape(2, 64, 64, 4, 128, 128)), matrices(10))
    assert shape.token_bytes == 2 * 2 * 128
    assert shape.fixed_bytes(100) == 2 * 2 * 128 * 100 + 1000
    assert shape.fixed_bytes(128) == shape.fixed_bytes(10**6) == 2 * 2 * 128 * 128 + 1000
    assert shape.cache_bytes(10**6) == shape.token_bytes * 10**6 + shape.fixed_bytes(128)
    assert shape.attention_flops(1000) == 2 * 4 * 128 * (1000 + 128)


def test_experts_are_read_as_far_as_the_batch_touches_them() -> None:
    shape = ModelShape("", (PLAIN,), matrices(100), experts=matrices(1280), total_experts=128, active_experts=4)
    assert shape.active_parameters == pytest.approx(100 + 40)
    assert shape.weight_bytes(1) == pytest.approx(2 * 140)
    assert shape.weight_bytes(2) == pytest.approx(2 * (100 + 1280 * (1 - (31 / 32) ** 2)))
    assert shape.weight_bytes(10_000) == pytest.approx(2 * 1380)
    assert shape.weights.nbytes == 2 * 1380


def test_a_bound_is_the_slower_of_moving_and_computing() -> None:
    gpu = Gpu("", tflops=1, bandwidth=1)
    shape = ModelShape("", (PLAIN,), Matrices(10**6, 1e6))
    assert step(shape, 1, 1e6, 0).seconds(gpu) == pytest.approx(2e-6)  # 2 MB against 2 MFLOP
    assert step(shape, 1, 0, 1e9).seconds(gpu) == pytest.approx(1.002e-3)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_known_gpus_are_found_under_any_spelling(gpu: Gpu) -> None:
    for name in (gpu.name, gpu.name.lower(), gpu.name.replace(" ", "-").upper(), gpu.name.replace("-", "_")):
        assert find_gpu(name) is gpu
    assert gpu.source != "given"
    assert gpu.memory is not None
    assert 10 < gpu.ridge < 1000
    assert decode(QWEN, 4096).seconds(gpu) == pytest.approx(decode(QWEN, 4096).nbytes / gpu.bandwidth / 1e12)


def test_a_short_name_means_the_larger_memory() -> None:
    assert find_gpu("a100").memory == 80


@pytest.mark.parametrize(("name", "part"), [("h10", "'H100'"), ("abacus", "Known: H100"), ("", "--bandwidth")])
def test_an_unknown_gpu_names_the_known_ones(name: str, part: str) -> None:
    with pytest.raises(KvcompError, match="gpu") as caught:
        find_gpu(name)
    assert part in str(caught.value)


@pytest.mark.parametrize("field", ["tflops", "bandwidth", "memory"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_gpu_has_positive_numbers(field: str, value: float) -> None:
    with pytest.raises(KvcompError, match=field):
        Gpu("", **{"tflops": 1.0, "bandwidth": 1.0, field: value})
