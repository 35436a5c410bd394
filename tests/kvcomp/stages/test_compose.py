"""Stages that Python makes add up to the stack of their spec, and what cannot be added says what to write."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import random
import subprocess
import sys
import typing
import warnings
from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import odd_specs
import pytest
import torch
from tiny_models import make

import kvcomp
from kvcomp import KIVI, CompressedCache, Quest, SnapKV, SpecError, Stack, Stage, StreamingLLM, Window
from kvcomp.cache.blocks import Setup
from kvcomp.cost.bill import bill
from kvcomp.integrations.huggingface.shapes import shape_of
from kvcomp.stages import Policy, arg
from kvcomp.stages.registry import stages

SPEC = "snapkv(keep=0.25) + kivi(bits=4)"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def same(stack: Stack, spec: str) -> None:
    parsed = Stack.parse(spec)
    assert type(stack) is Stack
    assert stack == parsed
    assert hash(stack) == hash(parsed)
    assert (str(stack), stack.hash) == (str(parsed), parsed.hash)


def test_stages_and_stacks_add_in_any_order() -> None:
    a, b, c = SnapKV(keep=0.25), KIVI(bits=4), Window(sinks=4)
    same(a + b, SPEC)
    same((a + b) + c, f"{SPEC} + window(sinks=4)")
    same(a + (b + c), f"{SPEC} + window(sinks=4)")
    same((a + b) + Stack.parse(c), f"{SPEC} + window(sinks=4)")
    same(Stack.parse("snapkv(keep=0.25)") + b, SPEC)
    same(b + a, "kivi(bits=4) + snapkv(keep=0.25)")
    same(Stack([a, b]), SPEC)  # type: ignore[arg-type]
    same(Stack(x for x in (a, b)), SPEC)  # type: ignore[arg-type]
    same(Stack.parse(b), "kivi(bits=4)")
    assert Stack.parse(a + b) == a + b


@pytest.mark.parametrize("seed", range(3))
def test_any_stack_is_the_sum_of_its_stages(seed: int) -> None:
    rng, found = random.Random(seed), 0
    names = {name: getattr(kvcomp, name) for name in kvcomp.__all__}
    while found < 30:
        spec = odd_specs.spec(rng)
        try:
            parsed = Stack.parse(spec)
        except SpecError:
            continue
        found += 1
        first, *rest = parsed.stages
        total: Stage | Stack = first
        for stage in rest:
            total = total + stage
        same(Stack.parse(total), str(parsed))
        assert Stack(tuple(eval(repr(stage), names) for stage in parsed.stages)) == parsed
        assert eval(repr(parsed), names) == parsed


@pytest.mark.parametrize("name", sorted(stages()))
def test_numbers_of_python_are_those_of_the_spec(name: str) -> None:
    """An int where a float is asked for, and NumPy's numbers: one stack, one text, one hash."""
    cls = stages()[name]
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        accepted = str(hints[f.name])
        for given in (1, 4, 1.0, 0.5, np.int64(4), np.float64(0.5), np.float32(1)):
            plain = given.item() if isinstance(given, np.generic) else given
            if "str" in accepted or "bool" in accepted or (type(plain) is float and "float" not in accepted):
                with pytest.raises(SpecError, match=rf"{name}\({f.name}="):
                    cls(**{f.name: given})
                continue
            with contextlib.suppress(SpecError):
                parsed = Stack.parse(f"{name}({f.name}={plain!r})")
                same(Stack.parse(cls(**{f.name: given})), str(parsed))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: SnapKV() + 3, ["snapkv(budget=320) + 3", "KIVI(bits=4)"]),
        (lambda: 3 + SnapKV(), ["3 + snapkv(budget=320)", "a Stack"]),
        (lambda: SnapKV() + "kivi(bits=4)", ["Stack.parse('kivi(bits=4)')"]),
        (lambda: "kivi(bits=4)" + SnapKV(), ["Stack.parse('kivi(bits=4)')"]),
        (lambda: SnapKV() + None, ["+ None", "expected a stage"]),
        (lambda: SnapKV() + KIVI, ["KIVI()", "class"]),
        (lambda: KIVI + SnapKV(), ["KIVI()", "class"]),
        (lambda: SnapKV + KIVI, ["SnapKV()", "class"]),
        (lambda: SnapKV() + {"kivi": 4}, ["expected a stage"]),
        (lambda: Stack.parse(SPEC) + 3, [f"{SPEC} + 3"]),
        (lambda: 3 + Stack.parse(SPEC), [f"3 + {SPEC}"]),
        (lambda: Stack.parse(SPEC) + SPEC, ["Stack.parse("]),
        (lambda: sum([SnapKV(), KIVI()]), ["0 + snapkv(budget=320)"]),
        (lambda: Stack.parse(KIVI), ["KIVI()", "class"]),
        (lambda: Stack.parse(3), ["3", "expected a stage"]),
        (lambda: Stack.parse([KIVI()]), ["expected a stage"]),
        (lambda: Stack(KIVI()), ["Stack(KIVI(bits=2))", "expected stages"]),
        (lambda: Stack("kivi"), ["'kivi'", "Stack.parse"]),
        (lambda: Stack(("kivi",)), ["Stack.parse('kivi')"]),
        (lambda: Stack((KIVI,)), ["KIVI()"]),
        (lambda: KIVI() + KIVI(), ["at most one quantizer"]),
        (lambda: Window(sinks=2) + StreamingLLM(), ["window(sinks=2)", "streaming"]),
        (lambda: KIVI(bit=4), ["kivi", "'bit'", "'bits'"]),
        (lambda: KIVI(4, 4, 4, 32, 5), ["kivi", "at most 4", "5"]),
        (lambda: KIVI(4, bits=4), ["kivi", "bits", "twice"]),
        (lambda: KIVI(bits="4"), ["kivi(bits='4')", "int"]),
        (lambda: KIVI(bits=True), ["kivi(bits=True)", "bool"]),
        (lambda: SnapKV(keep=float("nan")), ["snapkv(keep=nan)"]),
        (lambda: SnapKV(keep=torch.tensor(0.5)), ["snapkv(keep=", "float"]),
        (lambda: SnapKV(keep=10**400), ["snapkv(keep=", "more than a float"]),
        (lambda: KIVI(residual_length=128), ["residual_length", "kivi + window(recent="]),
        (lambda: CompressedCache(KIVI, make("llama")), ["KIVI()"]),
    ],
)
def test_what_is_no_stack_says_what_to_write(wrong: typing.Callable[[], Any], named: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        wrong()
    for part in named:
        assert part in str(error.value)
    assert len(str(error.value)) < 500


def test_what_takes_a_stack_takes_a_spec_a_stack_and_a_stage() -> None:
    model = make("llama", num_hidden_layers=2)
    shape = shape_of(model.config, "llama")
    for given in ("kivi(bits=4)", Stack.parse("kivi(bits=4)"), KIVI(bits=4)):
        same(CompressedCache(given, model).stack, "kivi(bits=4)")
        same(Setup(given, 2, 64, torch.float32).stack, "kivi(bits=4)")
        same(typing.cast(Stack, bill(shape, given, 100).stack), "kivi(bits=4)")


def test_a_cache_of_stages_generates_what_its_spec_does() -> None:
    model, ids = make("llama", num_hidden_layers=2), torch.randint(3, 256, (1, 200))
    found = []
    for stack in (SnapKV(keep=0.5, window=16) + KIVI(bits=4), "snapkv(keep=0.5, window=16) + kivi(bits=4)"):
        cache = CompressedCache(stack, model)
        found.append(model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False))
    assert torch.equal(*found)


def test_a_stage_is_a_value() -> None:
    stage = SnapKV(compression_ratio=0.75, kernel_size=7)  # type: ignore[call-arg]
    for twin in (copy.copy(stage), copy.deepcopy(stage), pickle.loads(pickle.dumps(stage)), replace(stage)):
        assert twin == stage
        assert hash(twin) == hash(stage)
    assert replace(stage, keep=0.5) == SnapKV(keep=0.5, kernel=7)
    assert repr(stage) == "SnapKV(keep=0.25, kernel=7)"
    stack = stage + KIVI()
    assert pickle.loads(pickle.dumps(stack)) == stack


def test_signatures_are_those_of_the_dataclass() -> None:
    assert list(inspect.signature(KIVI).parameters) == ["bits", "k", "v", "group"]
    assert inspect.signature(KIVI).parameters["group"].default == 32
    for cls in stages().values():
        assert list(inspect.signature(cls).parameters) == [f.name for f in fields(cls)]


def test_a_stage_of_the_users_own_adds_up_too() -> None:
    @dataclass(frozen=True)
    class Mine(Policy, ABC):
        share: float = arg(0.5, "of something")

        def kept(self, tokens: int, *_: Any) -> int:
            return tokens

    stack = Mine(share=1) + KIVI()
    assert stack.policies == (Mine(share=1.0),)
    assert repr(Mine(share=1)) == "Mine(share=1.0)"


def test_dropping_and_selecting_warns_when_added_too() -> None:
    with pytest.warns(kvcomp.KvcompWarning, match=r"snapkv.*quest"):
        SnapKV() + Quest()


def test_names_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys, kvcomp; assert 'torch' not in sys.modules; kvcomp.KIVI; assert 'torch' in sys.modules; "
        "assert 'transformers' not in sys.modules; from kvcomp import SnapKV; print(SnapKV(keep=0.25) + kvcomp.KIVI(4))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == SPEC
