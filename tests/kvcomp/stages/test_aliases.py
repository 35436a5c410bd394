"""The field's names of arguments: what papers, kvpress and transformers call them, in specs and in Python."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest

import kvcomp
from kvcomp import SpecError, Stack
from kvcomp.stages import Alias, Quantizer, arg, dropped_share, register
from kvcomp.stages import registry as reg
from kvcomp.stages.arguments import aliases_of
from kvcomp.stages.registry import find, stages

EVERY = [(name, alias) for name, cls in sorted(stages().items()) for alias in sorted(aliases_of(cls))]

# what each name of the field means, wherever a stage has such an argument
FIELD = {
    "nbits": "bits",
    "q_group_size": "group",
    "group_size": "group",
    "compression_ratio": "keep",
    "max_capacity_prompt": "budget",
    "window_size": "window",
    "kernel_size": "kernel",
    "residual_length": "recent",
    "token_budget": "tokens",
    "page_budget": "pages",
}
OTHERS = {  # stages whose argument of that name is something else
    "nbits": {"dsa", "sketch"},  # bits of index keys
    "compression_ratio": {"think", "dsa", "moba", "nsa", "quest", "sketch"},  # shares of channels, and of what is read
    "residual_length": {"h2o", "simlayerkv", "streaming"},  # a share of a budget; recent tokens that are quantized
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def values_of(name: str, argument: str) -> Iterator[Any]:
    """A few values of an argument, the default first, that differ from the stage's others."""
    default = next(f.default for f in fields(find(name)) if f.name == argument)
    yield from (value for value in (default, 4, 16, 32, 2, 0.25, False, True) if value is not None)


def accepted(name: str, argument: str) -> list[Any]:
    found = []
    for value in values_of(name, argument):
        try:
            Stack.parse(f"{name}({argument}={value!r})")
        except SpecError:
            continue
        found.append(value)
    assert found, f"no value of {name}({argument}=) is known to this test"
    return found


@pytest.mark.parametrize(("name", "alias"), EVERY)
def test_an_alias_is_the_argument_and_prints_as_that(name: str, alias: str) -> None:
    cls, meant = find(name), aliases_of(find(name))[alias]
    for value in accepted(name, meant.argument):
        given = value
        if meant.convert is not None:
            if not (isinstance(value, float) and 0 < value <= 1):
                continue
            given = 1 - value
        plain = Stack.parse(f"{name}({meant.argument}={value!r})")
        for other in (Stack.parse(f"{name}({alias}={given!r})"), Stack.parse(cls(**{alias: given}))):
            assert other == plain
            assert (str(other), other.hash, repr(other)) == (str(plain), plain.hash, repr(plain))
            assert f"{alias}=" not in str(other)


@pytest.mark.parametrize(("name", "alias"), EVERY)
def test_an_argument_has_one_value(name: str, alias: str) -> None:
    cls, meant = find(name), aliases_of(find(name))[alias]
    value = next(iter(accepted(name, meant.argument)))
    given = 0.5 if meant.convert else value
    twice = {meant.argument: value, alias: given}
    for arguments in (twice, dict(reversed(twice.items())), {meant.argument: None, alias: given}):
        text = ", ".join(f"{argument}={each!r}" for argument, each in arguments.items())
        for attempt in (lambda text=text: Stack.parse(f"{name}({text})"), lambda given=arguments: cls(**given)):
            with pytest.raises(SpecError, match=rf"{name}.*{meant.argument}.*twice.*{alias}|{name}.*twice.*leave one"):
                attempt()
    first = next(f.name for f in fields(cls))
    if meant.argument == first:
        with pytest.raises(SpecError, match=f"twice, by position and as {alias}"):
            cls(value, **{alias: given})


@pytest.mark.parametrize("name", sorted(stages()))
def test_every_stage_knows_the_names_of_the_field(name: str) -> None:
    known = aliases_of(find(name))
    for f in fields(find(name)):
        for alias, argument in FIELD.items():
            if f.name == argument and name not in OTHERS.get(alias, ()):
                assert known[alias].argument == argument
    for alias, meant in known.items():
        assert alias.isidentifier()
        assert alias not in {f.name for f in fields(find(name))}
        assert meant.argument in {f.name for f in fields(find(name))}
        assert f"{alias}" in (find(name).__doc__ or "")


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("kivi(nbits=4, q_group_size=64)", "kivi(bits=4, group=64)"),
        ("kivi(k_bits=4, v_bits=2, group_size=64)", "kivi(k=4, v=2, group=64)"),
        ("snapkv(compression_ratio=0.9, window_size=32, kernel_size=7)", "snapkv(keep=0.1, window=32, kernel=7)"),
        ("snapkv(max_capacity_prompt=1024)", "snapkv(budget=1024)"),
        ("knorm(compression_ratio=0)", "knorm(keep=1.0)"),
        ("kvzip(compression_ratio=0.7)", "kvzip(keep=0.3)"),
        ("lagkv(lag_size=64, n_sink=8)", "lagkv(lag=64, first=8)"),
        ("expected_attention(n_future_positions=64, n_sink=2, use_vnorm=false)", None),
        ("streaming(n_sink=2, recent_size=100)", "streaming(sinks=2, recent=100)"),
        ("think(key_channel_compression_ratio=0.4)", "think(keep=0.6)"),
        ("kivi + window(residual_length=64, n_sink=4)", "kivi + window(sinks=4, recent=64)"),
        ("quest(token_budget=1024)", "quest(tokens=1024)"),
        ("dsa(index_topk=512)", "dsa(tokens=512)"),
        ("chunkkv(chunk_length=20)", "chunkkv(span=20)"),
    ],
)
def test_what_users_of_other_libraries_write(spec: str, same: str | None) -> None:
    same = same or "expected_attention(future=64, sinks=2, norms=false)"
    assert Stack.parse(spec) == Stack.parse(same)
    assert str(Stack.parse(spec)) == str(Stack.parse(same))


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("snapkv(compression_ratio=1)", ["snapkv(compression_ratio=1.0)", "[0, 1)", "keep"]),
        ("snapkv(compression_ratio=-0.1)", ["compression_ratio=-0.1", "[0, 1)"]),
        ("snapkv(compression_ratio=half)", ["compression_ratio='half'", "float"]),
        ("snapkv(compression_ratio=true)", ["compression_ratio=True", "bool"]),
        ("snapkv(compression_ratio=0.5, budget=10)", ["keep", "budget"]),
        ("snapkv(compression_ratio=0.5, keep=0.5)", ["keep", "twice", "compression_ratio"]),
        ("kivi(group_size=64, q_group_size=64)", ["group", "twice", "q_group_size"]),
        ("kivi(nbits=3)", ["bits=3", "2 or 4"]),
        ("kivi(nbit=4)", ["'nbit'", "did you mean 'nbits'"]),
        ("kivi(residual_length=64)", ["residual_length", "window(recent="]),
        ("kivi(sinks=4)", ["sinks", "window(sinks="]),
        ("knorm(window_size=3)", ["'window_size'"]),
    ],
)
def test_refusals_name_what_was_written(spec: str, named: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        Stack.parse(spec)
    for part in named:
        assert part in str(error.value)


def test_no_share_is_kept_by_rounding() -> None:
    for percent in range(1, 100):
        (stage,) = Stack.parse(f"snapkv(compression_ratio={percent / 100})").stages
        assert stage == kvcomp.SnapKV(keep=(100 - percent) / 100)


def test_a_stage_of_the_users_own_declares_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reg, "_stages", dict(reg.stages()))

    @register("theirs")
    @dataclass(frozen=True)
    class Theirs(Quantizer):
        aliases: ClassVar = {"width": "bits", "lost": dropped_share("rate"), "gone": "nothing of this stage"}
        bits: int = arg(4, "bits")
        rate: float = arg(0.5, "share")

    assert aliases_of(Theirs).keys() == {"width", "lost", "nbits"}
    assert isinstance(aliases_of(Theirs)["width"], Alias)
    assert Stack.parse("theirs(width=8, lost=0.25)") == Stack((Theirs(bits=8, rate=0.75),))
    assert Theirs(nbits=2).bits == 2  # type: ignore[call-arg]
