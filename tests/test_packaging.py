"""What is installed: every folder under kvcomp, none beside it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
FOLDERS = SETTINGS["package-dir"]


def test_every_folder_with_code_is_a_listed_package() -> None:
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert found == set(SETTINGS["packages"])


def test_every_module_lies_in_a_package() -> None:
    for folder in FOLDERS.values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), f"{module} would not be installed"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_every_command_of_the_makefile_is_shell_that_parses() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = next(line for line in text.splitlines() if line.startswith(".PHONY:")).split()[1:]
    command = ["make", "--dry-run", "--always-make", *targets]
    clean = {"PATH": os.environ["PATH"]}  # this test may itself run under make
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=clean)
    assert shown.stdout.count("\n") > len(targets)
    parsed = subprocess.run(["bash", "-n"], input=shown.stdout, capture_output=True, text=True)
    assert not parsed.stderr, parsed.stderr
    cut = [line for line in text.splitlines() if "$(call say," in line and line.count(",") > 1]
    assert not cut, "make cuts these lines at the second comma"


def test_nothing_is_installed_beside_kvcomp() -> None:
    names = [folder for folder in FOLDERS.values() if folder != "kvcomp"]
    code = f"import importlib.util as u; import kvcomp; print([n for n in {names} if u.find_spec(n)])"
    shown = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize("package", SETTINGS["packages"])
def test_every_package_is_found(package: str) -> None:
    assert importlib.util.find_spec(package) is not None
