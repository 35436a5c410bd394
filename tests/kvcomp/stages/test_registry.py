"""The registry: every stage can be found, is documented, and owns its name."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint

import pytest

from kvcomp import KvcompWarning, SpecError
from kvcomp.stages import LatentStage, Policy, Quantizer, Selector
from kvcomp.stages import registry as reg
from kvcomp.stages.registry import find, register, stages
from kvcomp.stages.window import Window


def test_the_methods_that_ship_are_known() -> None:
    known = stages()
    assert {"none", "kivi", "int", "snapkv", "streaming", "quest", "window"} <= set(known)
    assert list(known) == sorted(known)
    assert find("window") is Window


@pytest.mark.parametrize("name", sorted(stages()))
def test_every_stage_is_a_documented_frozen_dataclass_with_defaults(name: str) -> None:
    cls = find(name)
    assert cls.name == name
    assert issubclass(cls, (Quantizer, LatentStage, Policy, Selector, Window))
    assert is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # the dataclass's own
    assert cls.paper
    for f in fields(cls):
        assert f.default is not MISSING
        assert f.metadata["help"]
    assert cls() == cls()
    assert hash(cls()) == hash(cls())


def test_an_unknown_name_gets_the_nearest_or_all() -> None:
    with pytest.raises(SpecError, match=r"'streamin'.*'streaming'"):
        find("streamin")
    with pytest.raises(SpecError, match=r"int, int8, keydiff"):
        find("xyzzy")


def test_a_name_has_one_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = find("kivi")
    monkeypatch.setattr(reg, "_stages", dict(stages()))

    @dataclass(frozen=True)
    class Other(Quantizer):
        """Somebody else's."""

    with pytest.raises(SpecError, match=r"'kivi'.*quantizers\.kivi\.KIVI"):
        register("kivi")(Other)
    assert find("kivi") is owner
    assert register("kivi")(owner) is owner  # a module that is loaded twice
    register("kivi2")(Other)
    assert find("kivi2") is Other


def test_a_package_that_does_not_load_takes_no_other_stage_down(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint(name="broken", value="no_such_package:Stage", group=reg.GROUP)
    monkeypatch.setattr(reg, "entry_points", lambda group: [broken])
    reg._load_all.cache_clear()
    with pytest.warns(KvcompWarning, match="'broken' of no_such_package:Stage cannot be loaded"):
        assert "kivi" in reg.stages()
