"""Language servers complete kvcomp's classes, and show their arguments, defaults and documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import kvcomp
from kvcomp.stages import Stage
from kvcomp.stages import __all__ as for_authors
from kvcomp.stages.registry import stages

OURS = sorted(cls.__name__ for cls in stages().values() if cls.__module__.startswith("kvcomp."))


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """What the script prints: completions, then signature and documentation of every stage class."""
    command = [sys.executable, str(Path(__file__).with_name("hover.py")), *OURS]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n=== ")


def test_every_export_completes(shown: list[str]) -> None:
    for line, names in zip(shown[0].splitlines(), (kvcomp.__all__, for_authors), strict=True):
        assert set(names) <= set(line.partition(": ")[2].split(", "))


@pytest.mark.parametrize("name", OURS)
def test_a_call_shows_arguments_types_defaults_and_the_paper(shown: list[str], name: str) -> None:
    signature, _, text = shown[1 + OURS.index(name)].removeprefix(f"{name}(\n").partition("\n\n")
    cls: type[Stage] = getattr(kvcomp, name)
    for f in fields(cls):
        given = re.findall(rf"\b{f.name}: {re.escape(str(f.type))}=arg\((.*?)\)(?=, \w+: |\)$)", signature, re.DOTALL)
        assert given, f.name
        default, _, help = given[-1].strip().partition(",")  # of a class after those of its bases
        assert help
        assert default in (repr(f.default).replace("'", '"'), default.upper())
    assert text.strip().startswith((cls.__doc__ or "").split("\n")[0])
    assert "arXiv" in text or "Ours" in text
