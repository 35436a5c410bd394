"""The Triton kernels over latents, whose values share the bytes of their keys, against the specification."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch

from kvcomp import Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.kernels.dispatch import reference_only, using
from kvcomp.kernels.triton_backend import Triton
from kvcomp.stages import Choice, LatentStage

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from kvcomp.kernels.triton import plan  # noqa: E402

SHAPES = [(64, 32, 5, 150), (96, 16, 20, 75)]  # channels of latents and rotary keys, query heads, tokens
ODD = {  # of DeepSeek's and MiniCPM3's layers, and such as no model has
    "none": [(512, 64, 1, 70), (512, 64, 128, 40), (256, 32, 16, 70), (33, 7, 5, 70), (72, 40, 33, 70)],
    "int(bits=4)": [(512, 64, 16, 70), (256, 32, 1, 70), (256, 32, 128, 40), (40, 24, 16, 70), (136, 8, 1, 70)],
}
SPECS = [
    "none",
    "int(bits=4)",
    "int(bits=3)",
    "kivi(bits=4, group=16)",
    "turboquant(bits=4)",
    "klt(bits=4)",
    "fp8",
    "nvfp4",
]


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        *((spec, shape) for spec in SPECS for shape in SHAPES),
        *((spec, shape) for spec, shapes in ODD.items() for shape in shapes),
        ("none", (288, 32, 20, 70)),
        ("int(bits=4)", (288, 32, 70, 70)),
    ],
)
def test_attention_over_latents(spec: str, shape: tuple[int, int, int, int]) -> None:
    rank, rotary, heads, tokens = shape
    store = LayerStore(replace(Stack.parse(f"{spec} + window(sinks=2, recent=8)").plan(2, 4), latent=True))
    generator = torch.Generator().manual_seed(rank)
    latents = torch.randn(2, 1, tokens, rank + rotary, generator=generator).to(DEVICE)
    queries = torch.randn(2, heads, 1, rank + rotary, generator=generator).to(DEVICE)
    store.start(latents, latents[..., :rank])
    store.write(latents, latents[..., :rank], None, queries.expand(-1, -1, tokens, -1), 0.2)
    with using(Triton(anywhere=True)):
        found = store.attend(queries, 0.2)
    with reference_only():
        expected = store.attend(queries, 0.2)
    assert float((found.out - expected.out).norm() / expected.out.norm()) < 1e-5
    torch.testing.assert_close(found.lse, expected.lse, atol=1e-4, rtol=0)


@dataclass(frozen=True)
class Some(LatentStage):
    """Pages keep `number` coordinates of latents."""

    number: int = 48

    def kept(self, channels: int) -> int:
        return min(self.number, channels)


@pytest.mark.parametrize("kept", [48, 96])
@pytest.mark.parametrize("spec", ["none", "int(bits=4)", "turboquant(bits=4)", "klt(bits=4)"])
def test_latents_without_a_rotary_key(spec: str, kept: int) -> None:
    """Written and read, of which pages keep some or all channels."""
    plan, parts = Stack.parse(f"{spec} + window(sinks=2, recent=8)").plan(2, 4), []
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 1, 100, 96, generator=generator).to(DEVICE)
    queries = torch.randn(2, 5, 1, 96, generator=generator).to(DEVICE)
    for how in (using(Triton(anywhere=True)), reference_only()):
        store = LayerStore(replace(plan, latent=True, joint=Some(number=kept)))
        with how:
            store.start(latents, latents)
            store.write(latents, latents, None, queries.expand(-1, -1, 100, -1), 0.2)
            parts.append(store.attend(queries, 0.2))
    found, expected = parts
    assert float((found.out - expected.out).norm() / expected.out.norm()) < 1e-5
    torch.testing.assert_close(found.lse, expected.lse, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("spec", "heads", "latent"),
    [
        ("none", 5, True),
        ("int(bits=4)", 5, False),
        ("int(bits=4)", 70, True),
        ("kivi(bits=4, group=16)", 5, True),
    ],
)
def test_tokens_that_an_indexer_chose(spec: str, heads: int, latent: bool) -> None:
    store = LayerStore(replace(Stack.parse(f"{spec} + window(sinks=2, recent=8)").plan(2, 4), latent=latent))
    generator = torch.Generator().manual_seed(heads)
    keys = torch.randn(2, 1, 150, 96, generator=generator).to(DEVICE)
    values = keys[..., :64] if latent else torch.randn(2, 1, 150, 64, generator=generator).to(DEVICE)
    queries = torch.randn(2, heads, 1, 96, generator=generator).to(DEVICE)
    store.start(keys, values)
    store.write(keys, values, None)
    places = torch.stack([torch.randperm(150, generator=generator)[:37].sort().values for _ in range(2)])
    choice = Choice(places.to(DEVICE), torch.tensor([37, 21], device=DEVICE))
    with using(Triton(anywhere=True)):
        found = store.attend(queries, 0.2, choice=choice)
    with reference_only():
        expected = store.attend(queries, 0.2, choice=choice)
    assert float((found.out - expected.out).norm() / expected.out.norm()) < 1e-5
    torch.testing.assert_close(found.lse, expected.lse, atol=1e-4, rtol=0)


def test_programs_of_wide_keys_have_few_rows() -> None:
    assert plan.blocked(128) == plan.MOST_ROWS
    assert plan.blocked(128, k_dim=576) == plan.FEWEST_ROWS
    assert plan.split_pages(1, 128, 1000, 64, 132, 576) >= plan.split_pages(1, 128, 1000, 64, 132)
