"""What a layer is, and what stacks may do with each kind."""

from __future__ import annotations

import pytest

from kvcomp.architecture import LayerKind, obstacle, without
from kvcomp.stages.stack import Stack

PACKED = [kind for kind in LayerKind if kind.traits.packed]


@pytest.mark.parametrize("kind", LayerKind)
def test_only_what_a_stack_packs_can_do_more(kind: LayerKind) -> None:
    traits = kind.traits
    assert traits.packed or not (traits.scored or traits.fixed or traits.calibrated or traits.engine)
    assert traits.does


def test_kinds_are_told_apart() -> None:
    assert len(set(LayerKind)) == len({kind.traits.does for kind in LayerKind}) == len(LayerKind.__members__)


@pytest.mark.parametrize("kind", PACKED)
def test_a_quantizer_alone_serves_whatever_is_packed(kind: LayerKind) -> None:
    assert obstacle([LayerKind.SLIDING, kind], Stack.parse("kivi(bits=4)")) is None


@pytest.mark.parametrize("spec", ["snapkv", "quest", "streaming + kivi(bits=4)"])
def test_what_cannot_be_scored_is_named_with_a_way_out(spec: str) -> None:
    stack = Stack.parse(spec)
    named = (*stack.policies, stack.selector)
    assert obstacle([LayerKind.FULL, LayerKind.SLIDING], stack) is None
    assert obstacle([LayerKind.LATENT], stack) is None
    assert obstacle([LayerKind.FULL, LayerKind.INDEXED], stack) is None  # these take the quantizer alone
    why = obstacle([LayerKind.SLIDING, LayerKind.INDEXED], stack)
    assert why is not None
    assert LayerKind.INDEXED.traits.does in why
    assert "use a stack of a quantizer alone" in why
    assert all(stage.name in why for stage in named if stage is not None)


@pytest.mark.parametrize("spec", ["criticalkv(keep=0.5)", "expected_attention(keep=0.5) + int8"])
def test_policies_that_ask_for_weights_do_not_know_those_of_latents(spec: str) -> None:
    stack = Stack.parse(spec)
    assert obstacle([LayerKind.FULL], stack) is None
    why = obstacle([LayerKind.LATENT, LayerKind.RECURRENT], stack)
    assert why is not None
    assert stack.policies[0].name in why
    assert "snapkv" in why


def test_what_is_not_packed_is_not_asked() -> None:
    assert without([LayerKind.SLIDING, LayerKind.RECURRENT, LayerKind.FULL], "scored") is None
    assert without([LayerKind.SLIDING, LayerKind.LATENT], "fixed") is LayerKind.LATENT
