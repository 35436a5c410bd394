"""Print what a language server shows of kvcomp's classes: completions after `kvcomp.`, and hover text of calls.

    python tests/typing/hover.py [NAME ...]

NAME: exported classes. It reads this checkout, laid out as it is installed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jedi

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("policies", "quantizers", "sparse", "kernels", "integrations", "benchmarks")  # installed under kvcomp


def lay_out(folder: Path) -> Path:
    """A folder that has this checkout's kvcomp as it is installed, by links."""
    package = folder / "kvcomp"
    package.mkdir()
    for path in (ROOT / "kvcomp").iterdir():
        (package / path.name).symlink_to(path)
    for name in FOLDERS:
        (package / name).symlink_to(ROOT / name)
    return folder


def project(site: Path) -> jedi.Project:
    return jedi.Project(site, sys_path=[str(site), *sys.path], smart_sys_path=False)


def completions(site: Path, code: str) -> list[str]:
    """Names that complete `code`."""
    return [found.name for found in jedi.Script(code, project=project(site)).complete()]


def hover(site: Path, name: str) -> tuple[str, str]:
    """The signature that a call of an exported class shows, and the class's documentation."""
    code = f"from kvcomp import {name}\n{name}("
    (signature,) = jedi.Script(code, project=project(site)).get_signatures()
    return signature.to_string(), signature.docstring(raw=True)


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        site = lay_out(Path(folder))
        print("from kvcomp import ...:", ", ".join(completions(site, "from kvcomp import ")))
        print("from kvcomp.stages import ...:", ", ".join(completions(site, "from kvcomp.stages import ")))
        for name in names:
            signature, text = hover(site, name)
            print(f"\n=== {name}(\n{signature}\n\n{text}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["KIVI", "SnapKV", "Quest", "CompressedCache"])
