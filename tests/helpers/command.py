"""The `kvcomp` command as the tests run it."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from kvcomp.cli.app import app

WIDTH = {"COLUMNS": "200"}


def run(*args: object, stdin: str | None = None) -> Result:
    return CliRunner(env=WIDTH).invoke(app, [str(arg) for arg in args], input=stdin, prog_name="kvcomp")


def refused(result: Result, *parts: str) -> None:
    """The command exited with code 2, and ended with an error of one or two lines that has all parts."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip("\n").splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith("error:"))
    what, *way_out = lines[start:]
    assert len(way_out) <= 1, lines[start:]
    assert all(line.startswith("  ") for line in way_out), lines[start:]
    for part in parts:
        assert part in " ".join([what, *way_out])
