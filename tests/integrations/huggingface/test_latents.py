"""Models that cache latents (MLA): steps attend to them as they are, or expand them where that cannot be followed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as models
import torch
from generation import assert_same, greedy, left_padded, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcomp import CompressedCache, KvcompError, UnsupportedError, prefill
from kvcomp.integrations.huggingface import build
from kvcomp.integrations.huggingface.latent import MANY
from kvcomp.integrations.huggingface.layer import CompressedLayer

EXACT = "none + window(sinks=2, recent=8)"
pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy")


def steps(
    model: PreTrainedModel, cache: Any, padded: bool = True, between: Callable[[], None] = lambda: None
) -> Tensor:
    """Logits of a prompt, steps and a chunk, each after what came before."""
    ids, at, found = tokens(2, 200), 0, []
    _, mask = left_padded([100, 120])
    with torch.no_grad():
        for n in (120, 1, 1, 9, 1, 40, 1):
            whole = torch.cat([mask, mask.new_ones(2, at + n - 120)], 1) if padded else None
            found.append(model(ids[:, at : at + n], past_key_values=cache, attention_mask=whole).logits[:, -1])
            at += n
            between()
    return torch.stack(found)


def dense(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def expands(cache: CompressedCache) -> bool:
    """Whether the last step decoded all latents."""
    return "dense copy" in cache.traffic().parts


# -- as they are ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_read_latents_as_they_are(implementation: str, padded: bool) -> None:
    model = models.make("deepseek", implementation)
    for given in (model, model.config):
        cache = CompressedCache(EXACT, given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = steps(model, cache, padded)
        torch.testing.assert_close(ours, steps(model, dense(model), padded), atol=1e-4, rtol=0)
        assert not expands(cache)
        held = cache.memory()
        assert held.dense == (173 * 2 - 20 * padded) * 4 * (32 + 16) * 4
        assert {type(layer).__name__ for layer in cache.layers} == {"LatentLayer"}


@pytest.mark.parametrize(
    "spec",
    [
        *("int(bits=8)", "fp8", "turboquant(bits=4)", "klt(bits=6)", "kivi(bits=4, group=16)"),
        *("snapkv(keep=0.9, window=16)", "tova(keep=0.9)", "h2o(keep=0.9)", "streaming(recent=150)"),
        "keydiff(keep=0.9)",
        *("quest(keep=0.9, dense_layers=0)", "moba(keep=0.9, dense_layers=0)", "sketch(keep=0.9, dense_layers=0)"),
        "snapkv(keep=0.9, window=16) + int(bits=8) + sketch(keep=0.9, dense_layers=0)",
    ],
)
def test_stacks_that_lose_little(spec: str) -> None:
    """Of a model whose heads attend to all tokens alike: what is lost is seen in the logits, and is little."""
    model = models.make("deepseek", first_k_dense_replace=4)
    cache = CompressedCache(spec, model)
    ours, theirs = steps(model, cache), steps(model, dense(model))
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=0)
    both = torch.corrcoef(torch.stack([ours[1:].flatten(), theirs[1:].flatten()]))
    assert float(both[0, 1]) > 0.9
    assert not expands(cache)


@pytest.mark.parametrize("spec", ["quest(keep=1.0, dense_layers=0)", "sketch(keep=1.0, dense_layers=0)"])
def test_selectors_that_read_all_lose_nothing(spec: str) -> None:
    model = models.make("deepseek")
    ours = steps(model, CompressedCache(f"none + {spec}", model))
    torch.testing.assert_close(ours, steps(model, dense(model)), atol=1e-4, rtol=0)


def test_kvzip_repeats_prompts_over_latents() -> None:
    class Letters:
        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoded", (), {"input_ids": torch.tensor([[3 + ord(c) % 200 for c in text]])})

    model = models.make("deepseek")
    cache = CompressedCache("kvzip(keep=0.5) + int(bits=8)", model)
    prefill(model, tokens(1, 150), [cache], tokenizer=Letters())
    with torch.no_grad():
        model(tokens(1, 1), past_key_values=cache)
    assert sum(int(layer.store.kept[0]) for layer in cache.layers) < 4 * 110
    assert not expands(cache)


def test_what_latents_cannot_do_is_said() -> None:
    model = models.make("deepseek")
    with pytest.raises(UnsupportedError, match=r"latents \(MLA\), of which criticalkv"):
        CompressedCache("criticalkv", model)
    cache = CompressedCache("none", model)
    with torch.no_grad():
        model(tokens(1, 200), past_key_values=cache)
    with pytest.raises(UnsupportedError, match="latents"):
        cache.compact((0, 128), tokens(1, 200), None)


def test_many_queries_behind_a_cache_are_answered_in_full() -> None:
    model = models.make("deepseek")
    cache = CompressedCache(EXACT, model)
    ids = tokens(1, 100 + 2 * MANY)
    with torch.no_grad():
        for n in (100, MANY, MANY - 1):
            at = cache.get_seq_length()
            ours = model(ids[:, at : at + n], past_key_values=cache).logits
            torch.testing.assert_close(ours, model(ids[:, : at + n]).logits[:, at:], atol=1e-4, rtol=0)
            if at:
                assert expands(cache) is (n >= MANY)


# -- what is not followed ---------------------------------------------------------------------------------------------


def _projections(model: PreTrainedModel) -> list[tuple[Any, torch.nn.Linear]]:
    return [(layer.self_attn, layer.self_attn.kv_b_proj) for layer in model.model.layers]


def bias(model: PreTrainedModel) -> None:
    for _, projection in _projections(model):
        projection.bias = torch.nn.Parameter(torch.randn(projection.out_features) * 0.1)


def hook_out_of_place(model: PreTrainedModel) -> None:
    for _, projection in _projections(model):
        projection.register_forward_hook(lambda module, args, out: out * 1.5)


def hook_in_place(model: PreTrainedModel) -> None:
    for _, projection in _projections(model):
        projection.register_forward_hook(lambda module, args, out: out.mul_(1.5))


def hook_that_returns_nothing(model: PreTrainedModel) -> None:
    def double(module: Any, args: Any, out: Any) -> None:
        out.mul_(2)

    for _, projection in _projections(model):
        projection.register_forward_hook(double)


def hook_before(model: PreTrainedModel) -> None:
    for _, projection in _projections(model):
        projection.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def norm_after_expansion(model: PreTrainedModel) -> None:
    for attention, _ in _projections(model):
        plain = attention.expand_kv

        def normed(kv_nope: Any, k_rot: Any, plain: Any = plain) -> tuple[Any, Any]:
            keys, values = plain(kv_nope, k_rot)
            return torch.nn.functional.rms_norm(keys, (keys.shape[-1],)), values

        attention.expand_kv = normed


def values_scaled(model: PreTrainedModel) -> None:
    for attention, _ in _projections(model):
        plain = attention.expand_kv

        def scaled(kv_nope: Any, k_rot: Any, plain: Any = plain) -> tuple[Any, Any]:
            keys, values = plain(kv_nope, k_rot)
            values *= 1.5
            return keys, values

        attention.expand_kv = scaled


def keys_changed_after_they_were_made(model: PreTrainedModel) -> None:
    for attention, _ in _projections(model):
        plain = attention.expand_kv

        def changed(kv_nope: Any, k_rot: Any, plain: Any = plain) -> tuple[Any, Any]:
            keys, values = plain(kv_nope, k_rot)
            keys[..., :3] = 0.0
            return keys, values

        attention.expand_kv = changed


class Int8Linear(torch.nn.Module):
    """A projection whose weight is no matrix of numbers."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True).detach() / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.float() * 1) * self.scale[:, 0]


def quantized_weights(model: PreTrainedModel) -> None:
    for attention, projection in _projections(model):
        attention.kv_b_proj = Int8Linear(projection)


class Wrapped(Tensor):
    """Weights that compute by themselves, as those of torchao."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, *rest = args
            return func(x, weight.as_subclass(Tensor) * 1.5, *rest)
        return super().__torch_function__(func, types, args, kwargs or {})


def wrapped_weights(model: PreTrainedModel) -> None:
    for _, projection in _projections(model):
        projection.weight = torch.nn.Parameter(projection.weight.detach().as_subclass(Wrapped), False)


class Adapted(torch.nn.Module):
    """A projection with a low-rank adapter, as PEFT wraps it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.on = base, True
        self.a, self.b = (torch.nn.Parameter(torch.randn(n, 4) * 0.1, False) for n in base.weight.shape)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Any) -> Any:
        result = self.base_layer(x)
        return result + torch.nn.functional.linear(x @ self.b, self.a) if self.on else result


def adapters(model: PreTrainedModel) -> None:
    for attention, projection in _projections(model):
        attention.kv_b_proj = Adapted(projection)


CHANGES = [
    *(bias, hook_out_of_place, hook_in_place, hook_that_returns_nothing, hook_before, norm_after_expansion),
    *(values_scaled, keys_changed_after_they_were_made, quantized_weights, wrapped_weights, adapters),
]


@pytest.mark.filterwarnings("ignore:.*dense tensors")
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_followed_is_expanded(change: Callable[[PreTrainedModel], None]) -> None:
    torch.manual_seed(1)
    model = models.make("deepseek")
    before = steps(model, dense(model))
    change(model)
    cache = CompressedCache(EXACT, model)
    ours, theirs = steps(model, cache), steps(model, dense(model))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert float((theirs - before).abs().max()) > 1e-2
    assert expands(cache) or change is quantized_weights


@pytest.mark.parametrize("change", [bias, hook_in_place])
def test_what_is_not_followed_cannot_be_evicted_from(change: Callable[[PreTrainedModel], None]) -> None:
    model = models.make("deepseek")
    change(model)
    with torch.no_grad(), pytest.raises(UnsupportedError):
        steps(model, CompressedCache("snapkv(keep=0.5)", model))


def test_weights_may_change_between_steps() -> None:
    """In place, or for others: nothing of them is remembered."""
    found = []
    for kind in (CompressedCache, DynamicCache):
        model, count = models.make("deepseek"), iter(range(100))

        def between(model: PreTrainedModel = model, count: Any = count) -> None:
            for _, projection in _projections(model):
                if next(count) % 8 < 4:
                    projection.weight.data.mul_(1.1)
                else:
                    projection.weight = torch.nn.Parameter(projection.weight.detach() * 0.9)

        cache = CompressedCache(EXACT, model) if kind is CompressedCache else dense(model)
        found.append(steps(model, cache, between=between))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*dense tensors")
def test_adapters_may_come_and_go() -> None:
    """Padding that came unseen, while all was expanded, stays hidden once latents are read as they are."""
    found = []
    for kind in (CompressedCache, DynamicCache):
        torch.manual_seed(1)
        model = models.make("deepseek")
        adapters(model)

        def between(model: PreTrainedModel = model) -> None:
            for _, projection in _projections(model):
                projection.on = not projection.on

        cache = CompressedCache(EXACT, model) if kind is CompressedCache else dense(model)
        found.append(steps(model, cache, between=between))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*dense tensors", "ignore:.*decoded")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spec", [EXACT, "int8", "turboquant(bits=4)", "klt(bits=4)"])
def test_files_of_before_go_on(spec: str, padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved when latents were layers like others: with centres in their pages, and padding among their tokens."""
    model = models.make("deepseek")
    ids, mask = left_padded([100, 150])
    mask = mask if padded else torch.ones_like(mask)
    with monkeypatch.context() as then, torch.no_grad():
        then.setattr(build, "LatentLayer", CompressedLayer)
        old = CompressedCache(spec, model)
        assert {type(layer) for layer in old.layers} == {CompressedLayer}
        model(ids, attention_mask=mask, past_key_values=old)
        old.save(tmp_path / "old.kv")
        expected = greedy(model, torch.cat([ids, tokens(2, 1)], 1), old, attention_mask=_longer(mask))
    ours = CompressedCache.load(tmp_path / "old.kv", model)
    found = greedy(model, torch.cat([ids, tokens(2, 1)], 1), ours, attention_mask=_longer(mask))
    assert_same(found, expected)
    assert expands(ours) is padded
    ours.save(tmp_path / "new.kv")
    again = CompressedCache.load(tmp_path / "new.kv", model)
    assert again.memory().held == pytest.approx(ours.memory().held, rel=0.2)


def _longer(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(2, 1)], 1)


@pytest.mark.filterwarnings("ignore:.*decoded")
def test_a_cache_of_heads_is_no_cache_of_latents() -> None:
    """Of a model that expands latents before it caches them, such as remote code: keys and values of heads."""
    model = models.make("deepseek")
    cache = CompressedCache(EXACT, model)
    keys, values = torch.randn(1, 4, 150, 32), torch.randn(1, 4, 150, 16)
    handles = cache.update(keys, values, 0)
    assert handles[0].shape == keys.shape
    assert handles[1].shape == values.shape
    layer = cache.layers[0]
    assert not layer.plan.latent
    layer.commit()
    assert torch.equal(layer.keys.dense(), keys)
    assert torch.equal(layer.values.dense(), values)


def test_rows_that_do_not_fit_are_refused_as_elsewhere() -> None:
    model = models.make("deepseek")
    cache = CompressedCache(EXACT, model)
    with torch.no_grad():
        model(tokens(2, 50), past_key_values=cache)
        with pytest.raises(KvcompError, match="2 rows"):
            model(tokens(1, 1), past_key_values=cache)
