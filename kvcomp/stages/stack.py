"""A stack: independent stages composed in one line, `name(arg=value, ...) + name(...)`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import Tensor

from kvcomp.errors import KvcompWarning, SpecError
from kvcomp.text import quote

from .joint import LatentStage
from .plan import LayerPlan, held_by_stream
from .policy import Policy
from .quantizer import Quantizer
from .registry import find
from .selector import Selector
from .spec import parse, text_of
from .stage import Stage
from .window import DENSE, Window

FREE_PAGE = 64  # page size where no stage cares
PAGE_UNIT = 16
MOST_PAGE = 1 << 16
MOST_STAGES = 32

StackLike: TypeAlias = Union[str, "Stack", Stage]  # what every function that asks for a stack takes


@dataclass(frozen=True)
class Stack:
    """At most one latent stage, one quantizer, one selector and one window, and any number of eviction policies applied
    in order.

    Add stages, `SnapKV(keep=0.25) + KIVI(bits=4)`, or parse a spec, `Stack.parse("snapkv(keep=0.25) + kivi(bits=4)")`:
    the two are equal. `str(stack)` is the spec, which parses back to an equal stack.

    Args:
        stages: one stage or more, in the order in which they act.

    Raises:
        SpecError: no stages or more than 32, something that is no stage, or stages that cannot work together.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        given: Any = self.stages
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise SpecError(f"Stack({_said(given)}): expected stages; Stack.parse takes a spec or one stage")
        object.__setattr__(self, "stages", tuple(given))
        for stage in list[Any](self.stages):
            if not isinstance(stage, Stage):
                raise SpecError(f"Stack({_said(stage)}): {_advice(stage)}")
        if not self.stages:
            raise SpecError("a stack needs at least one stage: Stack.parse('none') is the dense one")
        if len(self.stages) > MOST_STAGES:
            raise SpecError(f"a stack takes at most {MOST_STAGES} stages, got {len(self.stages)}: leave some out")
        for kind in (LatentStage, Quantizer, Selector, Window):
            same = [s for s in self.stages if isinstance(s, kind)]
            if len(same) > 1:
                names = " and ".join(text_of(s, full=False) for s in same)
                raise SpecError(f"a stack takes at most one {same[0].family}, got {names}: remove one")
        if self.page_size > MOST_PAGE:
            wide = max(self.stages, key=lambda s: s.page_multiple)
            raise SpecError(
                f"{text_of(wide, full=False)} asks for pages of {self.page_size} tokens, which no prompt fills: "
                f"expected at most {MOST_PAGE}, so choose a smaller group"
            )
        chosen = next((s for s in self.stages if isinstance(s, Window)), None)
        for stage in self.stages:
            if chosen is not None and chosen.sets and chosen.sinks < stage.required_sinks:
                raise SpecError(
                    f"window(sinks={chosen.sinks}) contradicts {stage.name}, which keeps {stage.required_sinks} sinks: "
                    f"use window(sinks={stage.required_sinks}, recent={chosen.recent})"
                )
        if self.policies and self.selector:
            for what, argument in self.selector.same_pages.items():
                for policy in self.policies:
                    if what not in policy.same_tokens:
                        raise SpecError(
                            f"{self.selector.name}({argument}) lets {what} read the same pages, but {policy.name} "
                            f"keeps other tokens in each of them: leave out {argument}, or {policy.name}"
                        )
            warnings.warn(
                f"{self.policies[0].name} drops tokens and {self.selector.name} reads fewer of them: both bet on the "
                "same redundancy, so measure the accuracy of the two together",
                KvcompWarning,
                stacklevel=3,
            )

    @classmethod
    def parse(cls, spec: StackLike) -> Stack:
        """The stack that a spec or a single stage describes; a Stack is returned as it is.

        Raises:
            SpecError: bad syntax, unknown stage or argument (with the nearest valid names), a value of the wrong type
                or range, a combination that cannot work, or no spec at all.
        """
        if isinstance(spec, Stack):
            return spec
        if isinstance(spec, Stage):
            return cls((spec,))
        if not isinstance(spec, str):
            raise SpecError(f"stack {_said(spec)}: {_advice(spec)}")
        return cls(parse(spec))

    def __add__(self, other: Stack | Stage) -> Stack:
        """The stages of this stack and then those of `other`, as " + " in a spec.

        Raises:
            SpecError: `other` is neither a stage nor a stack, or the stages cannot work together.
        """
        if not isinstance(other, Stack | Stage):
            raise SpecError(f"{self} + {_said(other)}: {_advice(other)}")
        return Stack(self.stages + Stack.parse(other).stages)

    if not TYPE_CHECKING:

        def __radd__(self, other: Any) -> Any:
            """Only reached where the left operand is neither a stage nor a stack."""
            raise SpecError(f"{_said(other)} + {self}: {_advice(other)}")

    def __repr__(self) -> str:
        return f"Stack.parse({str(self)!r})"

    def __str__(self) -> str:
        return " + ".join(text_of(s, full=False) for s in self.stages)

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits that identify the stack with every argument spelled out, files by their content."""
        full = " + ".join(text_of(s, full=True) for s in self.stages)
        return hashlib.sha256(full.encode()).hexdigest()[:12]

    @cached_property
    def quantizer(self) -> Quantizer:
        """The quantizer, `none` where the stack names none."""
        own: Stage = next((s for s in self.stages if isinstance(s, Quantizer)), None) or find("none")()
        assert isinstance(own, Quantizer)
        return own

    @cached_property
    def policies(self) -> tuple[Policy, ...]:
        """The eviction policies, in the order in which they act."""
        return tuple(s for s in self.stages if isinstance(s, Policy))

    @cached_property
    def selector(self) -> Selector | None:
        """The selector; None where the stack names none: decode queries read every page."""
        return next((s for s in self.stages if isinstance(s, Selector)), None)

    @cached_property
    def latent(self) -> LatentStage | None:
        """What makes latents of K and V; None where the stack names none."""
        return next((s for s in self.stages if isinstance(s, LatentStage)), None)

    @cached_property
    def window(self) -> Window:
        """The stack's own `window(...)`, or the largest one that its methods publish."""
        own = next((s for s in self.stages if isinstance(s, Window)), None)
        if own is not None and own.sets:
            return own
        published = [s.default_window for s in self.stages]
        most = max(w[0] for w in published), max(w[1] for w in published)
        bits = self.quantizer.default_window_bits if own is None or own.bits is None else own.bits
        return replace(Window() if own is None else own, sinks=most[0], recent=most[1], bits=bits)

    @cached_property
    def page_size(self) -> int:
        """Tokens per page: the smallest size that all stages accept, 64 where none cares, a multiple of 16 always."""
        wanted = [s.page_multiple for s in self.stages if s.page_multiple > 1]
        return lcm(PAGE_UNIT, *wanted) if wanted else FREE_PAGE

    @cached_property
    def prefill_chunk(self) -> int | None:
        """Tokens per chunk of the prompt: the smallest that a stage asks for; None where it enters at once."""
        return min((s.prefill_chunk for s in self.stages if s.prefill_chunk is not None), default=None)

    def plan(self, layer: int, layers: int, full: Sequence[int] | None = None) -> LayerPlan:
        """What one of `layers` layers does, of which those in `full` go through the stack; None: all."""
        selector, leader = self.selector, None
        if selector is not None and selector.active(layer):
            choosers = [i for i in (range(layers) if full is None else full) if selector.active(i)]
            at = choosers.index(layer)
            leader = choosers[at - at % selector.share] if at % selector.share else None
        else:
            selector = None
        return LayerPlan(
            self.quantizer,
            self.policies,
            selector,
            self.window.sinks,
            self.window.recent,
            self.page_size,
            layer,
            layers,
            leader,
            self.latent is not None,
            exact_bits=self.window.bits,
            joint=self.latent,
        )

    def sliding_plan(self, layer: int, layers: int, window: int) -> LayerPlan | None:
        """What one of `layers` layers does whose queries see `window` tokens, their own included.

        None: it stays as it is. So it does without a quantizer, with `window(sliding=dense)`, with a calibration file
        that has no such layer, and where the window is smaller than the exact one and a page. Policies and
        selectors leave it alone; there are no sinks, as the first tokens leave the window.
        """
        named = any(isinstance(s, Quantizer) for s in self.stages)
        if not named or self.window.sliding == DENSE or not self.quantizer.has_layer(layer):
            return None
        size, recent = self.page_size, self.window.recent
        if recent + size > window:
            return None
        return LayerPlan(
            self.quantizer, (), None, 0, recent, size, layer, layers, sliding=window, exact_bits=self.window.bits
        )

    def effective_bits(
        self, head_dim: int, tokens: int, dtype: torch.dtype = torch.bfloat16, layers: int = 32
    ) -> float:
        """Bits held per element of K and V after prefilling `tokens` tokens, everything included.

        Codes, scales, zeros, summaries, the exact window in `dtype`, page tables and the tokens that were dropped; the
        mean over `layers` layers, for K and V of `head_dim` channels. Constants that all layers share (a Hadamard
        matrix) are left out. A cache reports the same figure for what it really holds, `memory().effective_bits`.

        Raises:
            SpecError: tokens or head_dim not positive.
        """
        for name, value in (("head_dim", head_dim), ("tokens", tokens), ("layers", layers)):
            if not isinstance(value, int) or value < 1:
                raise SpecError(f"effective_bits({name}={value!r}): expected a positive integer")
        plans = [self.plan(i, layers) for i in range(layers)]
        held = sum(held_by_stream(plan, *plan.streams(1, head_dim, head_dim)[1:], tokens, dtype) for plan in plans)
        return 8 * held / (layers * 2 * head_dim * tokens)

    def roundtrip(
        self, keys: Tensor, values: Tensor, queries: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """What attention would see of keys [B, Hkv, N, Dk] and values [B, Hkv, N, Dv] once they went through the stack.

        Evicted tokens are missing, [B, Hkv, N', D]; tokens of the exact window come back unchanged, the others as
        their pages decode, in the original coordinates and dtype. queries [B, Hq, N, Dk] (post-RoPE) are needed by
        policies that score with them; scale is the softmax scale, Dk^-0.5 by default.

        Raises:
            SpecError: shapes that do not match, or a policy that needs queries and gets none.
        """
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise SpecError(
                f"roundtrip: keys {tuple(keys.shape)} and values {tuple(values.shape)} must be [B, Hkv, N, D] "
                "with equal B, Hkv and N"
            )
        from kvcomp import roundtrip  # through the package: a store is made of a stack, not a stack of stores

        return roundtrip(self.plan(layer=0, layers=1), keys, values, queries, scale)


def _said(value: object) -> str:
    return value.__name__ if isinstance(value, type) else quote(value)


def _advice(value: object) -> str:
    """What to write instead of something that is neither a stage nor a stack."""
    if isinstance(value, type) and issubclass(value, Stage):
        return f"that is a class: write {value.__name__}(), with its arguments"
    if isinstance(value, str):
        return f"a spec is no stage: write Stack.parse({quote(value)})"
    return "expected a stage such as KIVI(bits=4), or a Stack"
