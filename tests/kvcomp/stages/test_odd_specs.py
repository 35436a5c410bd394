"""Specs of any size and content: a stack, or a SpecError that a person can read."""

from __future__ import annotations

import random
import typing
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import odd_specs
import pytest
import torch
from command import refused, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make

from kvcomp import CompressedCache, SpecError, Stack
from kvcomp.policies import expected
from kvcomp.stages.registry import find, stages
from kvcomp.text import QUOTED, quote

LONGEST_MESSAGE = 3 * QUOTED


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def accepted(spec: str) -> Stack | None:
    """The stack, which must be what its own text and hash say; None where the spec is refused in a short message."""
    message = ""
    try:
        stack = Stack.parse(spec)
    except SpecError as error:
        message = str(error)
    if message:
        assert len(message) <= LONGEST_MESSAGE
        assert message.isprintable()
        return None
    again = Stack.parse(str(stack))
    assert again == stack
    assert (str(again), again.hash) == (str(stack), stack.hash)
    return stack


@pytest.mark.parametrize("seed", range(3))
def test_random_specs_are_stacks_or_spec_errors(seed: int) -> None:
    rng = random.Random(seed)
    found = [accepted(odd_specs.spec(rng)) for _ in range(250)]
    assert 20 < sum(stack is not None for stack in found) < 230


@given(st.text(max_size=60) | st.text(alphabet="kivi(bits=2)+ -~[]{}'\"\\.0", max_size=400))
@settings(deadline=None, max_examples=150)
def test_any_text_is_a_stack_or_a_spec_error(text: str) -> None:
    accepted(text)


@given(
    name=st.sampled_from(sorted(stages())),
    data=st.data(),
    value=st.integers(-(10**500), 10**500).map(str) | st.floats().map(repr) | st.text(max_size=300).map(repr),
)
@settings(deadline=None, max_examples=200)
def test_any_value_of_any_argument_is_taken_or_a_spec_error(name: str, data: st.DataObject, value: str) -> None:
    arguments = fields(find(name))
    if arguments:
        accepted(f"{name}({data.draw(st.sampled_from(arguments)).name}={value})")


@pytest.mark.parametrize(
    "spec",
    [
        f"snapkv(keep={'9' * 400})",
        f"snapkv(keep={'9' * 5000})",
        f"streaming(recent={'9' * 400})",
        "+".join(["streaming"] * 3000),
        "+".join(["knorm"] * 33),
        f"int(bits={'-' * 3000}4)",
        f"int(bits={'~' * 900}4)",
        f"int(bits={'-' * 9900}4)",
        f"int(bits={'[' * 150}4{']' * 150})",
        f"int(bits=a{'.b' * 900})",
        f"x{'()' * 900}",
        "int(bits={[]: 1})",
        "int(bits={{}})",
        "a" * 10**6,
        "\0" * 10**6,
        "klt(calibration='')",
        "klt(calibration=' ')",
        "klt(calibration='a\\0b')",
        "klt(calibration='a\\ud800b')",
        "klt(calibration='a\\x1b[2Jb')",
    ],
    ids=range(20),
)
def test_what_no_stack_can_be_is_refused_in_a_short_message(spec: str) -> None:
    assert accepted(spec) is None


def test_a_home_of_nobody_is_no_error_until_the_file_is_read() -> None:
    stack = accepted("klt(calibration='~nosuchuser/x')")
    assert stack is not None
    assert stack.hash != Stack.parse("klt(calibration='~nosuchuser/y')").hash


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("snapkv(threshold=-5)", ["threshold=-5.0", "more than 0"]),
        ("snapkv(threshold=1.5)", ["threshold=1.5", "at most 1"]),
        ("knorm(threshold=5)", ["threshold=5.0", "at most 0"]),
        ("keydiff(threshold=-1)", ["threshold=-1.0", "more than -1"]),
        ("lagkv(threshold=1e999)", ["threshold=inf", "at most 3"]),
        ("expected_attention(threshold=0)", ["threshold=0.0", "more than 0"]),
        ("expected_attention(future=1000000000)", ["future=1000000000", "at most 65536"]),
        ("random(seed=99999999999999999999999)", ["seed=99999999999999999999999", "within"]),
        ("int(clip=1e-300)", ["clip=1e-300", "at least 0.01"]),
        ("oscar(k_clip=1e-9)", ["k_clip=1e-09", "at least 0.01"]),
        ("snapkv(keep=1e-9)", ["keep=1e-09", "at least 1e-06"]),
        ("kvzip(keep=1e-9)", ["keep=1e-09", "at least 1e-06"]),
        ("think(keep=1e-9)", ["keep=1e-09", "at least 1e-06"]),
        ("svd(rank=1e-9)", ["rank=1e-09", "at least 1e-06"]),
        ("quest(keep=1e-9)", ["keep=1e-09", "at least 1e-06"]),
        ("moba(top_p=1e-9)", ["top_p=1e-09", "at least 1e-06"]),
        ("kivi(group=1600000000)", ["kivi(bits=2, group=1600000000)", "1600000000 tokens", "at most 65536"]),
    ],
)
def test_an_absurd_value_is_refused_with_what_would_be_accepted(spec: str, named: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        Stack.parse(spec)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize("stage", sorted(stages()))
def test_a_stage_that_python_makes_is_checked_alike(stage: str) -> None:
    cls = find(stage)
    for argument, hint in typing.get_type_hints(cls).items():
        if argument in {f.name for f in fields(cls)}:
            value = "a\0b" if "str" in str(hint) else 10**400 if "int" in str(hint) else None
            if value is not None:
                with pytest.raises(SpecError, match=argument):
                    cls(**{argument: value})


@pytest.mark.parametrize(
    ("spec", "same", "reserved"),
    [
        ("window(sinks=1000000000000, recent=1000000000000)", "none", None),
        ("window(sinks=1000000000000, recent=1000000000000)", "none", 256),
        ("int8 + window(recent=1000000000000)", "none", 256),
        ("streaming(recent=1000000000000) + int8", "int8 + window(sinks=4)", None),
        ("h2o(budget=9007199254740992)", "none", None),
        ("quest(pages=1000000000000, first=1000000000000, dense_layers=0)", "none", None),
        ("snapkv(window=1000000000000, budget=1000000000000)", "none", None),
    ],
)
def test_a_count_of_more_than_all_tokens_is_all_of_them(spec: str, same: str, reserved: int | None) -> None:
    model, ids = make("llama", num_hidden_layers=2), torch.randint(3, 256, (1, 90))
    found = []
    for stack in (spec, same):
        cache = CompressedCache(stack, model, preallocate=reserved)
        with torch.no_grad():
            found.append(torch.cat([model(x, past_key_values=cache).logits[:, -1] for x in (ids, ids[:, :1])]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_the_same_policy_may_come_twice() -> None:
    once, twice = Stack.parse("knorm(keep=0.5)"), Stack.parse("knorm(keep=0.5) + knorm(keep=0.5)")
    k = torch.randn(1, 2, 100, 16, generator=torch.Generator().manual_seed(0))
    for x, y in zip(once.roundtrip(k, k), twice.roundtrip(k, k), strict=True):
        assert torch.equal(x, y)


def test_spaces_in_a_file_name_are_kept() -> None:
    spec = "klt(calibration='my  own\u3000file.st')\n  +  knorm"
    stack = Stack.parse(spec)
    assert stack.stages[0].calibration == "my  own\u3000file.st"  # type: ignore[attr-defined]
    assert Stack.parse(str(stack)) == stack


def test_parentheses_group_stages() -> None:
    assert Stack.parse("(knorm + int8) + window") == Stack.parse("knorm + (int8 + window)")


def test_the_mean_rotation_of_many_positions_is_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, found = make("llama", num_hidden_layers=2), torch.randint(3, 256, (1, 90)), []
    for block in (512, 7):
        monkeypatch.setattr(expected, "BLOCK", block)
        cache = CompressedCache("expected_attention(keep=0.5, future=100)", model)
        with torch.no_grad():
            found.append(torch.cat([model(x, past_key_values=cache).logits[:, -1] for x in (ids, ids[:, :1])]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec",
    ["random(seed=99999999999999999999999)", f"snapkv(keep={'9' * 400})", "klt(calibration='')", "oscar", "dsa"],
    ids=range(5),
)
def test_doctor_refuses_in_one_line(spec: str) -> None:
    refused(run("doctor", "--stack", spec), spec.partition("(")[0])


def test_doctor_takes_any_window(tmp_path: Path) -> None:
    result = run("doctor", "--stack", "window(sinks=1000000000000, recent=1000000000000) + int8")
    assert result.exit_code == 0, result.output


def test_a_quoted_value_is_short() -> None:
    for value in (10**5000, "a" * 10**6, "\0" * 1000, [[[1] * 1000]], None):
        assert len(quote(value)) < QUOTED + 40
        assert quote(value).isprintable()
