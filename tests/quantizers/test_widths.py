"""K and V of different widths: the page's bytes, and one way to write equal stacks."""

from __future__ import annotations

import pytest
import torch

from kvcomp import Stack
from kvcomp.stages import PageShape

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("spec", "written"),
    [
        ("kivi(k=4, v=2)", "kivi(k=4, v=2)"),
        ("kivi(bits=2, k=4)", "kivi(k=4, v=2)"),
        ("kivi(k=4)", "kivi(k=4, v=2)"),
        ("kivi(k=4, v=4)", "kivi(bits=4)"),
        ("kivi(bits=4.0)", "kivi(bits=4)"),
        ("kivi(bits=4, k=2, v=2)", "kivi(bits=2)"),
        ("int(v=3, group=16)", "int(k=4, v=3, group=16)"),
        ("turboquant(k=3)", "turboquant(k=3, v=4)"),
    ],
)
def test_equal_stacks_are_written_alike(spec: str, written: str) -> None:
    stack = Stack.parse(spec)
    assert str(stack) == written
    assert stack == Stack.parse(written)
    assert stack.hash == Stack.parse(written).hash


@pytest.mark.parametrize("name", ["kivi", "int", "turboquant"])
@pytest.mark.parametrize(("k", "v"), [(4, 2), (2, 4)])
def test_each_side_takes_its_own_bytes(name: str, k: int, v: int) -> None:
    def bytes_of(spec: str) -> int:
        plan = Stack.parse(spec).plan(0, 1)
        return plan.build(PageShape(plan.page_size, 64, 64, 1, torch.float32, CPU, 0))[1].bytes_per_page

    apart, narrow, wide = (bytes_of(f"{name}({bits})") for bits in (f"k={k}, v={v}", "bits=2", "bits=4"))
    assert 2 * apart == narrow + wide


@pytest.mark.parametrize("name", ["kivi", "int", "turboquant"])
def test_the_wider_side_is_the_better_one(name: str) -> None:
    x = torch.randn(1, 1, 256, 64, generator=torch.Generator().manual_seed(0))
    k, v = Stack.parse(f"{name}(k=4, v=2) + window(recent=0)").roundtrip(x, x)
    assert (k - x).norm() * 3 < (v - x).norm()
