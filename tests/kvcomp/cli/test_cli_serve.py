"""`kvcomp serve`: the command of vLLM that it runs."""

from __future__ import annotations

import importlib.util
import json
import shlex
from itertools import pairwise

import pytest
from command import refused, run

from kvcomp.cli import serve


def command(*arguments: str) -> list[str]:
    return shlex.split(run("serve", *arguments, "--dry-run").stdout)


def test_options_follow_from_the_stack_and_others_are_vllms() -> None:
    found = command("./model", "--stack", "kivi(bits=2)", "--port", "8001", "--enforce-eager")
    options = dict(pairwise(found))
    assert found[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert options["--model"] == "./model"
    assert options["--attention-backend"] == "CUSTOM"
    assert json.loads(options["--additional-config"]) == {"kvcomp": {"stack": "kivi(bits=2)"}}
    assert options["--port"] == "8001"
    assert found[-1] == "--enforce-eager"


@pytest.mark.parametrize(
    ("stack", "given", "size"),
    [
        ("int(bits=4)", [], 64),
        ("int(bits=4) + quest(pages=8)", [], 64),
        ("int(bits=4, group=96, per=channel)", [], 96),
        ("int8", ["--block-size", "128"], 128),
    ],
)
def test_blocks_hold_whole_pages(stack: str, given: list[str], size: int) -> None:
    found = command("model", "--stack", stack, *given)
    assert found.count("--block-size") == 1
    assert found[found.index("--block-size") + 1] == str(size)


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(run("serve", "model", "--stack", "kivii", "--dry-run"), "kivii", "kivi")
    refused(run("serve", "model", "--stack", "adakv + int8", "--dry-run"), "adakv keeps other numbers of tokens")
    for option in serve.OURS:
        refused(run("serve", "m", "--stack", "int8", f"{option}=x", "--dry-run"), f"{option} follows from MODEL and")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(run("serve", "model", "--stack", "int8"), "vLLM is not installed")


def test_the_server_takes_the_place_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(serve.os, "execv", lambda path, arguments: started.append([path, *arguments]))
    run("serve", "model", "--stack", "int8", "--port", "1")
    assert started == [[started[0][0], *command("model", "--stack", "int8", "--port", "1")]]
