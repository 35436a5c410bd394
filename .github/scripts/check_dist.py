"""Check what a release uploads: `python .github/scripts/check_dist.py dist [TAG]`.

One sdist with the C sources; wheels for manylinux on x86-64 and aarch64 with the C kernels for that processor and all
their functions; one wheel for any platform without them; one version, that of the tag. Prints a line for each file.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = "kvcomp/kernels/cpu/_attend.abi3.so"
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of an ELF file
NAME = re.compile(r"kvcomp-(?P<version>[^-]+?)(-py3-none-(?P<platform>.+)\.whl|\.tar\.gz)")


def functions() -> list[str]:
    """The functions of the kernels that the Python code calls."""
    loading = (ROOT / "kernels" / "cpu" / "loading.py").read_text(encoding="utf-8")
    return sorted({*re.findall(r"\bkvcomp_\w+", loading)})


def check_wheel(path: Path, platform: str) -> str:
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        for part in ("kvcomp/py.typed", "kvcomp/policies/snapkv.py", "kvcomp/benchmarks/templates/report.html"):
            require(part in names, f"{path.name} has no {part}")
        outside = [name for name in names if not re.match(r"kvcomp(-[^/]+\.dist-info)?/", name)]
        require(not outside, f"{path.name} installs {outside} beside kvcomp")
        libraries = [name for name in names if re.search(r"\.so(\.\d+)*$", name)]
        if platform == "any":
            require(not libraries, f"{path.name} is for any platform and has {libraries}")
            return "no kernels"
        require(libraries == [KERNELS], f"{path.name} has {libraries}: expected {KERNELS} alone")
        found = wheel.read(KERNELS)
    machine = platform.removeprefix("manylinux_").split("_", 2)[2]
    require(found[:4] == b"\x7fELF", f"{path.name}: {KERNELS} is no ELF file")
    require(int.from_bytes(found[18:20], "little") == MACHINES[machine], f"{path.name}: kernels of another processor")
    missing = [name for name in functions() if b"\0" + name.encode() + b"\0" not in found]
    require(not missing, f"{path.name}: the kernels lack {missing}")
    return f"{machine} kernels of {len(found):,} bytes, {len(functions())} functions"


def check_sdist(path: Path) -> str:
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    parts = [f"kernels/cpu/{file.name}" for file in (ROOT / "kernels" / "cpu").glob("*.[ch]")]
    missing = [part for part in [*parts, "tests/conftest.py", "examples/engine.py"] if part not in names]
    require(not missing, f"{path.name} lacks {missing}")
    return f"{len(parts)} C sources and headers"


def require(true: bool, otherwise: str) -> None:
    if not true:
        raise SystemExit(f"error: {otherwise}")


def main(folder: str, tag: str = "") -> None:
    found = {path: NAME.fullmatch(path.name) for path in sorted(Path(folder).iterdir())}
    for path, match in found.items():
        require(match is not None, f"{path.name} is neither a wheel py3-none-PLATFORM nor an sdist of kvcomp")
    versions = {match["version"] for match in found.values() if match}
    require(len(versions) == 1, f"versions {sorted(versions)}: expected one")
    require(tag in ("", f"v{versions.copy().pop()}"), f"tag {tag} is not of version {versions.copy().pop()}")
    platforms = []
    for path, match in found.items():
        platform = match["platform"].split(".")[0] if match and match["platform"] else None
        said = check_wheel(path, platform) if platform else check_sdist(path)
        platforms.append(platform and re.sub(r"manylinux_\d+_\d+", "manylinux", platform))
        print(f"{path.name}: {said}")
    wanted = {None, "any", "manylinux_x86_64", "manylinux_aarch64"}
    require(set(platforms) == wanted and len(platforms) == len(wanted), f"found {platforms}, expected {wanted}")


if __name__ == "__main__":
    main(*sys.argv[1:])
