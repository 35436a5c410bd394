"""What layers ask of a forward's mask: answered by one look at the device, however many layers there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.errors import UnsupportedError
from kvcomp.integrations.huggingface.layer import CompressedLayer
from kvcomp.integrations.huggingface.masks import on_host, read_mask
from kvcomp.integrations.huggingface.rows import follow_mask, follow_window

PAST = 40
LOOKS = {"cpu", "item", "tolist", "__bool__", "__int__", "numpy"}


class Watched(Tensor):
    """Stands for a mask on a GPU, and counts how often numbers of it, or made of it, come to the host."""

    looks = 0
    is_cpu = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LOOKS:
            Watched.looks += 1
            with torch._C.DisableTorchFunctionSubclass():
                return func(args[0].as_subclass(Tensor), *args[1:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def padded(n: int, kind: str) -> Tensor:
    """A mask of two rows, the second of which starts with 8 columns of padding, in a form that layers are given."""
    shown = torch.arange(PAST + n) >= torch.tensor([[0], [8]])
    if kind == "columns":
        return shown
    seen = shown[:, None, None] & torch.ones(n, PAST + n, dtype=torch.bool).tril(PAST)
    return seen if kind == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)


@pytest.fixture
def store() -> LayerStore:
    made = LayerStore(Stack.parse("int(bits=4) + window(recent=8)").plan(0, 1))
    k, v = torch.randn(2, 2, 1, PAST, 16).unbind()
    made.start(k, v)
    made.write(k, v, torch.arange(PAST) >= torch.tensor([[0], [8]]), torch.randn(2, 1, PAST, 16))
    made.end_prompt()
    return made


@pytest.mark.parametrize("kind", ["columns", "bool", "float"])
@pytest.mark.parametrize("n", [1, 3])
def test_one_look_serves_all_layers(n: int, kind: str, store: LayerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "looks", 0)
    mask = padded(n, kind).as_subclass(Watched)
    layer = CompressedLayer.__new__(CompressedLayer)
    for _ in range(5):  # layers
        seen = read_mask(mask, PAST, n)
        assert layer.shows_all(seen)
        assert seen.facts is not None
        assert (seen.facts.counts == torch.tensor([[PAST], [PAST - 8]])).all()
        follow_mask(store, seen, compare=False)
    assert Watched.looks == 1
    for _ in range(5):  # that have a sliding window compare columns of padded rows
        follow_window(store, seen, PAST)
    assert Watched.looks == 2


@pytest.mark.parametrize(
    "follow", [lambda *given: follow_mask(*given, False), lambda *given: follow_window(*given, PAST)]
)
def test_other_masks_are_refused(follow: Callable[..., None], store: LayerStore) -> None:
    mask = padded(1, "columns")
    mask[1] = True
    with pytest.raises(UnsupportedError, match="hides or shows other cached tokens"):
        follow(store, read_mask(mask, PAST, 1))


def test_biases_are_refused() -> None:
    for heads in (1, 2):
        mask = padded(3, "float").expand(-1, heads, -1, -1).clone()
        mask[0, -1, 0, 0] = -0.5
        with pytest.raises(UnsupportedError, match="adds a position bias"):
            read_mask(mask, PAST, 3)
    with pytest.raises(UnsupportedError, match="differs between heads"):
        read_mask(padded(3, "bool").expand(-1, 2, -1, -1), PAST, 3)


def test_what_is_on_the_host_is_not_copied() -> None:
    x = torch.ones(3)
    assert on_host(x) is x
