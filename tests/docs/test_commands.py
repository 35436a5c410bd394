"""Commands in README and docs/: options of `kvcomp` and of its modules exist, stacks parse, make has the targets."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import pytest
import typer
import typer.main

from kvcomp import Stack
from kvcomp.cli.app import app

SHELL = ("console", "shell", "bash", "sh")


def commands() -> Iterator[tuple[Path, str]]:
    """Every command line of a shell block, after `$ `, with its continuations."""
    for path in documents.DOCUMENTS:
        for block in documents.blocks(path):
            if block.language in SHELL:
                joined = re.sub(r"\\\n", " ", block.text)
                for line in re.findall(r"^\$ (.+(?:\n {4}.+)*)", joined, re.MULTILINE):
                    yield path, " ".join(line.split("\n"))


def mentions() -> Iterator[tuple[Path, list[str]]]:
    """Commands in the text, which may lack what they need: `kvcomp bench --engine vllm`."""
    for path in documents.DOCUMENTS:
        for span in re.findall(r"`(kvcomp [^`\n]+)`", documents.prose(path)):
            if "…" not in span:
                yield path, shlex.split(span)


def parts(line: str) -> Iterator[list[str]]:
    """The commands of a shell line that are ours: kvcomp, python -m kvcomp..., make."""
    line = re.sub(r"\s+\.\.\.(?=\s|$)", "", line).replace('"${stacks[@]}"', "--stack none")
    words = shlex.split(line, comments=True)
    command: list[str] = []
    for word in [*words, ";"]:
        if word in (";", "|", "||", "&&", "do", "done", "for", "while") or word.endswith(";"):
            command.append(word.rstrip(";"))
            command = [w for w in command if w not in ("", "do", "done", "|")]
            while command and re.match(r"^[A-Z_]+=", command[0]):
                command = command[1:]
            if command and command[0] in ("kvcomp", "make", "python"):
                yield command
            command = []
        else:
            command.append(word)


FOUND = [(path, command) for path, line in commands() for command in parts(line)]

MENTIONS = list(mentions())


def parse(command: Any, words: list[str], name: str) -> None:
    """Let click read the words: unknown options, missing values and wrong types raise.

    Options without a value for the command (--version, --install-completion) act while they are read: they only have
    to exist.
    """
    acting = {option for p in command.params if p.is_eager or not p.expose_value for option in p.opts}
    if words and words[0] in acting:
        return
    context = command.make_context(name, list(words), resilient_parsing=False)
    children = getattr(command, "commands", None)
    if children is not None:
        rest = [*context._protected_args, *context.args]
        _, child, rest = command.resolve_command(context, rest)
        parse(child, rest, child.name)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(("path", "words"), FOUND, ids=[f"{documents.name(p)}: {' '.join(c)[:70]}" for p, c in FOUND])
def test_the_command_exists(path: Path, words: list[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", documents.read(documents.ROOT / "Makefile"), re.MULTILINE)
        assert {w for w in words[1:] if "=" not in w} <= set(targets)
    elif words[0] == "kvcomp":
        parse(typer.main.get_command(app), words[1:], "kvcomp")
    elif words[1] == "-m" and words[2].startswith("kvcomp.") and words[2] != "kvcomp.benchmarks.lm_eval":
        module = importlib.import_module(words[2])
        assert "__main__" in documents.read(Path(str(module.__file__))), f"{words[2]} is no command"
        if hasattr(module, "typer"):
            solo = typer.Typer(add_completion=False)
            solo.command()(module.main)
            parse(typer.main.get_command(solo), words[3:], words[2])
    elif words[1].endswith(".py"):
        assert (documents.ROOT / words[1]).exists()


@pytest.mark.parametrize(
    ("path", "words"), list(mentions()), ids=lambda x: documents.name(x) if isinstance(x, Path) else " ".join(x)
)
def test_a_command_in_the_text_has_these_options(path: Path, words: list[str]) -> None:
    command, rest = typer.main.get_command(app), words[1:]
    while rest and hasattr(command, "commands"):
        assert rest[0] in command.commands or rest[0].startswith("-")
        command, rest = command.commands.get(rest[0], command), rest[1:]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in rest if word.startswith("--")} <= options


@pytest.mark.parametrize("path", documents.DOCUMENTS, ids=documents.name)
def test_stacks_in_commands_parse(path: Path) -> None:
    """What follows --stack is a stack, unless it holds a placeholder or a file that only the reader has."""
    for page, line in commands():
        if page != path:
            continue
        for spec in re.findall(r'--stack "([^"]+)"', line):
            if not re.search(r"[{$]|calibration|\bvnorm\b|STACK|…", spec):
                assert str(Stack.parse(spec))


def test_commands_were_found_and_wrong_ones_are_seen() -> None:
    assert len(FOUND) > 30
    root = typer.main.get_command(app)
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse(root, ["bench", "--stack", "none", "--sample", "3"], "kvcomp")
    with pytest.raises(Exception, match=r"(?i)no such command"):
        parse(root, ["bnch"], "kvcomp")
