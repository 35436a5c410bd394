"""`kvcomp stacks`: every stage, its arguments and its paper."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvcomp.console import Plain, styled

from .output import print_json

if TYPE_CHECKING:
    from kvcomp.stages import Stage

EXAMPLES = """Examples:

  kvcomp stacks

  kvcomp stacks --json

--json prints an object for each stage, under its name: family, summary, paper, and arguments, each with its name,
default and help."""


def stacks(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")] = False,
) -> None:
    """List every stage that a stack can be made of: its arguments, their defaults, and its paper."""
    from kvcomp.stages.registry import stages

    known = {name: _describe(stage) for name, stage in stages().items()}
    if as_json:
        print_json(known)
        return
    console = Plain()
    for family in dict.fromkeys(stage["family"] for stage in known.values()):
        grid = Table(box=None, padding=(0, 2, 0, 0), show_header=False, highlight=False)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column()
        for name, stage in known.items():
            if stage["family"] == family:
                grid.add_row(styled(name, "bold cyan"), "", stage["summary"])
                for argument in stage["arguments"]:
                    grid.add_row("", f"{argument['name']}={argument['default']}", argument["help"])
                if stage["paper"]:
                    grid.add_row("", styled("paper", "dim"), styled(stage["paper"], "dim"))
        console.print()
        console.print(styled(family, "bold"))
        console.print(grid)


def _describe(stage: type[Stage]) -> dict[str, Any]:
    return {
        "family": stage.family,
        "summary": (stage.__doc__ or "").strip().split("\n")[0],
        "paper": stage.paper,
        "arguments": [
            {
                "name": field.name,
                "default": None if field.default is MISSING else field.default,
                "help": field.metadata.get("help", ""),
            }
            for field in fields(stage)
        ],
    }
