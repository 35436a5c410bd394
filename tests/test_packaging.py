"""What is installed: every folder under kvcomp, none beside it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from kvcomp.kernels import cpu

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETTINGS, VERSION = PROJECT["tool"]["setuptools"], PROJECT["project"]["version"]
FOLDERS = SETTINGS["package-dir"]


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_dist = _imported(ROOT / ".github" / "scripts" / "check_dist.py")


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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Python of an environment with a copy of kvcomp, not an editable one, and what else this one has; and a
    checkout of the sources that it was installed from, with nothing built in it."""
    folder = tmp_path_factory.mktemp("installed")
    checkout, environment, here = folder / "checkout", folder / "venv", Path(sysconfig.get_path("purelib"))
    nothing_made = shutil.ignore_patterns("*.so", "build", "out", ".*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=nothing_made)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    (site / "others.pth").write_text(f"{here}\n", encoding="utf-8")  # what is installed as editable there is not found
    install = [*PIP, "install", *isolation(), "--target", site]
    subprocess.run([*install, checkout], check=True, cwd=folder, env=clean() | {"CC": "false"})
    shutil.rmtree(checkout / "build", ignore_errors=True)
    library = cpu.library()
    if library is not None:  # compiled once already, which takes a while
        shutil.copy(library._name, site / "kvcomp" / "kernels" / "cpu")
    return python, checkout


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def isolation() -> list[str]:
    """Options to build with the setuptools that is there, if it is new enough; otherwise pip fetches one."""
    new = importlib.util.find_spec("setuptools") and int(version("setuptools").split(".")[0]) >= 77
    return ["--no-deps", *(["--no-build-isolation"] if new else [])]


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def said(python: Path, checkout: Path, *arguments: str) -> str:
    """What this Python prints in the checkout, where nothing fails."""
    done = subprocess.run([python, *arguments], capture_output=True, text=True, cwd=checkout, env=clean())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


KERNEL = "from kvcomp.kernels import cpu; print(cpu.__file__, cpu.library() and cpu.library()._name)"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="bin/python")
def test_a_checkout_works_where_a_copy_is_installed(installed: tuple[Path, Path]) -> None:
    python, checkout = installed
    assert "CompressedCache" in said(
        python, checkout, "-c", "from kvcomp import CompressedCache; print(CompressedCache)"
    )
    assert "Usage" in said(python, checkout, "-m", "kvcomp", "--help")
    assert "passed" in said(
        python, checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kvcomp/stages/test_registry.py"
    )


@pytest.mark.slow
@pytest.mark.skipif(cpu.library() is None, reason="no C compiler")
def test_a_checkout_takes_the_kernel_of_an_installed_copy_of_the_same_sources(installed: tuple[Path, Path]) -> None:
    python, checkout = installed
    shown = said(python, checkout, "-c", KERNEL)
    assert str(checkout) in shown
    assert "venv" in shown.split()[-1]
    source = checkout / "kernels" / "cpu" / "select.c"
    text = source.read_text(encoding="utf-8")
    source.write_text(text + "/* another kernel */\n", encoding="utf-8")
    try:
        assert said(python, checkout, "-c", KERNEL).split()[-1] == "None"
        assert "rebuild it" in said(python, checkout, "-c", "from kvcomp.kernels import cpu; print(cpu.missing())")
    finally:
        source.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_an_installed_copy_needs_no_sources(installed: tuple[Path, Path]) -> None:
    python, checkout = installed
    shown = said(python, checkout.parent, "-c", KERNEL)
    assert str(checkout) not in shown
    assert (shown.split()[-1] != "None") is (cpu.library() is not None)


@pytest.mark.slow
def test_a_wheel_without_kernels_is_for_any_platform(installed: tuple[Path, Path], tmp_path: Path) -> None:
    _, checkout = installed
    built = [*PIP, "wheel", *isolation(), "--wheel-dir", tmp_path, checkout]
    subprocess.run(built, check=True, env=clean() | {"KVCOMP_KERNELS": "none"}, cwd=tmp_path)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == f"kvcomp-{VERSION}-py3-none-any.whl"
    assert check_dist.check_wheel(wheel, "any") == "no kernels"
    with pytest.raises(SystemExit, match="expected"):
        check_dist.check_wheel(wheel, "manylinux_2_28_x86_64")
    with pytest.raises(SystemExit, match="expected"):  # no sdist, no kernels
        check_dist.main(str(tmp_path))
    with pytest.raises(SystemExit, match="tag"):
        check_dist.main(str(tmp_path), "v0.0.1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "said"), [("required", "Failed building wheel"), ("some", "expected auto, required or none")]
)
def test_a_release_is_not_built_without_its_kernels(
    installed: tuple[Path, Path], tmp_path: Path, kernels: str, said: str
) -> None:
    _, checkout = installed
    built = [*PIP, "wheel", *isolation(), "--wheel-dir", tmp_path, checkout]
    settings = clean() | {"KVCOMP_KERNELS": kernels, "CC": "false"}
    done = subprocess.run(built, capture_output=True, text=True, env=settings, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(cpu.library() is None, reason="no C compiler")
def test_the_check_of_releases_knows_the_functions_of_the_kernels() -> None:
    library = cpu.library()
    assert library is not None
    found = Path(library._name).read_bytes()
    assert len(check_dist.functions()) > 8
    assert all(b"\0" + name.encode() + b"\0" in found for name in check_dist.functions())


def test_one_version_everywhere() -> None:
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d\S*)\]", changes, re.MULTILINE)
    assert cited == released[0] == VERSION


def test_the_workflows_run_what_there_is() -> None:
    """Files and make targets that the workflows name."""
    named = set()
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = workflow.read_text(encoding="utf-8")
        named |= set(re.findall(r"(?:bash|python) (\.\S+)", text))
        for target in re.findall(r"run: make (\S+)", text):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert named == {".ci/run", ".github/scripts/check_dist.py"}
    assert all((ROOT / name).exists() for name in named)
