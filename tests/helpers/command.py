"""The `kvcomp` command as the tests run it."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from kvcomp.cli.app import app

WIDTH = {"COLUMNS": "200"}


def run(*args: object, stdin: str | None = None) -> Result:
    return CliRunner(env=WIDTH).invoke(app, [str(arg) for arg in args], input=stdin)


def refused(result: Result, *parts: str) -> None:
    """The command left with code 2, and its last line is the error and has all parts."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error:")
    for part in parts:
        assert part in line
