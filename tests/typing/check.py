"""Type-check programs of users against kvcomp as it is installed: `python tests/typing/check.py SITE`.

`user.py` must pass `mypy --strict` and pyright's strict mode; of `refused.py` both must refuse the marked lines alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent


def mypy(paths: list[Path], site: Path) -> dict[tuple[str, int], str]:
    """The errors of `mypy --strict`, by file and line."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(site.parent / "mypy")]
    found = run([*command, *map(str, paths)], cwd=site, env={**os.environ, "MYPYPATH": "."})
    lines = re.findall(r"(\w+\.py):(\d+): error: (.*)", found)
    own = {path.name for path in paths}  # in site-packages, where users have it, mypy reports nothing of kvcomp itself
    return {(name, int(line)): message for name, line, message in lines if name in own}


def pyright(paths: list[Path], site: Path) -> dict[tuple[str, int], str]:
    """The errors of pyright's strict mode (basedpyright has it as a wheel), by file and line."""
    config = {"include": [str(path) for path in paths], "extraPaths": [str(site)], "typeCheckingMode": "strict"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyrightconfig.json").write_text(json.dumps(config))
        command = [str(Path(sys.executable).with_name("basedpyright")), "--outputjson", "--pythonpath", sys.executable]
        found = json.loads(run([*command, "-p", folder]))
    if found["summary"]["filesAnalyzed"] != len(paths):
        sys.exit(f"pyright did not read {len(paths)} files: {found}")
    errors = [each for each in found["generalDiagnostics"] if each["severity"] == "error"]
    return {(Path(each["file"]).name, each["range"]["start"]["line"] + 1): each["message"] for each in errors}


def run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a checker prints; 1 is its exit status where it found errors."""
    found = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    if found.returncode not in (0, 1):
        sys.exit(found.stdout + found.stderr)
    return found.stdout


CHECKERS: tuple[Callable[[list[Path], Path], dict[tuple[str, int], str]], ...] = (mypy, pyright)


def main(site: Path) -> None:
    paths = [HERE / "user.py", HERE / "refused.py"]
    lines = [(path.name, n, line) for path in paths for n, line in enumerate(path.read_text().splitlines(), 1)]
    wanted = {(name, n) for name, n, line in lines if line.endswith("# error")}
    failed = False
    for checker in CHECKERS:
        found = checker(paths, site.resolve())
        wrong = {at: found.get(at, "no error, where one is expected") for at in sorted(wanted ^ found.keys())}
        for (name, n), message in wrong.items():
            print(f"{checker.__name__}: {HERE / name}:{n}: {message}")
        print(f"    {checker.__name__}: {len(lines)} lines, {len(wanted & found.keys())} of {len(wanted)} errors found")
        failed |= bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
