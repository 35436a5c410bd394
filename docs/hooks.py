"""What MkDocs asks for while it builds the site: pages that are generated from the code, and where the code is."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("policies", "quantizers", "sparse", "kernels", "integrations", "benchmarks")  # installed under kvcomp
TREE = ROOT / "build" / "docs-source"
MARK = re.compile(r"<!-- (commands|stages|changelog|public|objects)((?: [\w.]+)*) -->")


def on_startup(command: str, dirty: bool) -> None:
    """Lay the folders of the repository as they are installed, for mkdocstrings to read: kvcomp/policies and so on."""
    package = TREE / "kvcomp"
    shutil.rmtree(TREE, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "kvcomp").iterdir():
        (package / path.name).symlink_to(path)
    for folder in FOLDERS:
        (package / folder).symlink_to(ROOT / folder)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return MARK.sub(lambda mark: GENERATED[mark[1]](*mark[2].split()), markdown)


def commands() -> str:
    """A section for each command: its help, arguments and options."""
    import typer.main

    from kvcomp.cli.app import app

    root = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in _leaves("kvcomp", root))


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for child, sub in children.items():
        yield from _leaves(f"{name} {child}", sub)


def _command(name: str, command: Any) -> str:
    lines = [f"## {name}", "", _prose(command.help or "")]
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    if shown:
        lines += ["", "| argument or option | default | meaning |", "|---|---|---|"]
    for parameter in shown:
        flags = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
        if parameter.param_type_name == "argument":
            flags = f"`{parameter.name.upper()}`"
        default = parameter.default
        text = "" if default is None or default is False or default == () or callable(default) else f"`{default}`"
        lines.append(f"| {flags} | {text} | {_cell(getattr(parameter, 'help', None) or '')} |")
    if command.epilog:
        lines += ["", *_examples(command.epilog)]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text without rich's markup and click's marks."""
    return re.sub(r"\[/?(?:bold|dim|italic|cyan|)\]", "", text.replace("\b", "")).replace("\\[", "[")


def _prose(text: str) -> str:
    return re.sub(r"[ \t]*\n[ \t]*(?=\S)", "\n", _plain(text)).strip()


def _cell(text: str) -> str:
    return " ".join(_plain(text).replace("|", "\\|").replace("<", "&lt;").split())


def _examples(epilog: str) -> list[str]:
    """The lines of an epilog: commands in blocks, keys of --json as a list, text as it is."""
    lines: list[str] = []
    for part in re.split(r"\n\s*\n", _plain(epilog).strip()):
        text = " ".join(part.split())
        key = re.match(r"(\w+): (?=\S)", text) if "Keys" in "".join(lines) else None
        if re.match(r"(kvcomp|cat|\$) ", text):
            line = f"$ {text.removeprefix('$ ')}"
            if lines[-2:] == ["```", ""]:
                lines[-2:-2] = [line]
            else:
                lines += ["```console", line, "```", ""]
        elif key is not None:
            lines.append(f"- `{key[1]}`: {text[key.end() :]}")
        else:
            lines += ["", text, ""]
    return lines


def stages() -> str:
    """A section for each stage: what it does, its paper, its arguments."""
    from dataclasses import MISSING, fields

    from kvcomp.stages.arguments import aliases_of
    from kvcomp.stages.registry import stages as known

    lines: list[str] = []
    found = known()
    for family in ("quantizer", "latent", "policy", "selector", "window"):
        lines += [f"## {FAMILIES[family]}", ""]
        for name, stage in found.items():
            if stage.family != family:
                continue
            lines += [f"### {name}", "", _cell((stage.__doc__ or "").split("\n\n")[0]), ""]
            lines += [f"In Python: `kvcomp.{stage.__name__}`.", ""]
            papers = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", stage.paper)
            lines += [f"Paper: {papers}", ""] if papers else []
            if fields(stage):
                lines += ["| argument | default | meaning |", "|---|---|---|"]
            others: dict[str, list[str]] = {}
            for alias, meant in aliases_of(stage).items():
                others.setdefault(meant.argument, []).append(f"1 - `{alias}`" if meant.convert else f"`{alias}`")
            for field in fields(stage):
                default = "" if field.default is MISSING else f"`{field.default}`"
                also = f"; also {', '.join(others[field.name])}" if field.name in others else ""
                help = _cell(field.metadata.get("help", "") + also)
                lines.append(f"| `{field.name}` | {default} | {help} |")
            lines.append("")
    return "\n".join(lines)


FAMILIES = {
    "quantizer": "Quantizers",
    "latent": "Latents",
    "policy": "Eviction policies",
    "selector": "Selectors",
    "window": "Window",
}


def public(module: str) -> str:
    """mkdocstrings' directive for each name that a module declares in `__all__`, where it is defined."""
    package = importlib.import_module(module)
    found = {}
    for name in package.__all__:
        thing = getattr(package, name)
        if getattr(thing, "family", "") and module == "kvcomp" and getattr(thing, "name", ""):
            continue  # a stage of the registry: stages.md has it
        home = getattr(thing, "__module__", "") or ""
        if home.startswith("kvcomp") and hasattr(thing, "__qualname__"):
            found[f"{home}.{thing.__qualname__}"] = None
    return objects(*found)


def objects(*paths: str) -> str:
    return "\n\n".join(f"::: {path}" for path in paths)


def changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


GENERATED: dict[str, Callable[..., str]] = {
    "commands": commands,
    "stages": stages,
    "public": public,
    "objects": objects,
    "changelog": changelog,
}
