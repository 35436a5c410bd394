"""The options of how a model is loaded: the same in every command that loads one, and part of what a run is."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import typer
import yaml
from command import refused, run
from typer.main import get_command
from typer.testing import CliRunner

from kvcomp import console
from kvcomp.benchmarks.settings import Settings
from kvcomp.cli.app import app
from kvcomp.errors import KvcompError
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import LOADING, completed_maps, loads_model
from kvcomp.integrations.options import given as options_of

COMMANDS: dict[str, tuple[str, ...]] = {
    "ask": ("TEXT", "--question", "who"),
    "bench": ("--stack", "none", "--tasks", "niah_single_1", "--context", "400", "--samples", "1", "--out", "OUT"),
    "calibrate": ("--method", "klt", "--text", "TEXT", "--out", "OUT"),
    "generate": ("hello",),
    "speed": ("--stack", "int8", "--context", "64"),
    "tune": ("--text", "TEXT", "--stack", "int8", "--context", "256", "--samples", "1", "--out", "OUT"),
}
OLDER = ("model", "tasks", "contexts", "samples", "stacks", "seed", "max_new_tokens", "chat", "prefill_chunk", "dtype")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder.save(tmp_path_factory.mktemp("tiny"))


def command(name: str, model: Path, folder: Path) -> list[str]:
    text = folder / "text.txt"
    text.write_text("some words of a text " * 200)
    paths = {"TEXT": str(text), "OUT": str(folder / "out")}
    return [name, *(paths.get(word, word) for word in COMMANDS[name]), "--model", str(model)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_same_options(name: str) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    (own, first) = ({p.name: p for p in commands[n].params if p.name in LOADING} for n in (name, "bench"))
    assert list(own) == list(LOADING) == [field.name for field in fields(Loading)]
    for option, parameter in own.items():
        same = first[option]
        assert (parameter.help, parameter.is_flag) == (same.help, same.is_flag)
        assert parameter.default == getattr(DEFAULT, option)
        assert parameter.opts == [f"--{option.replace('_', '-')}"]
    assert "--trust-remote-code" in run(name, "--help").output


def test_all_commands_that_name_a_model_to_load_are_tested() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {name for name, of in commands.items() if any(p.name == "device" for p in of.params)} == set(COMMANDS)
    named = {name for name, of in commands.items() if any(p.name == "model" for p in of.params)}
    assert named - {"plan", "serve"} == set(COMMANDS)  # plan loads nothing, and vLLM what serve names, with its options


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--device", "nowhere"), "no such device here"),
        (("--device-map", "nowhere.json"), "device-map"),
        (("--device", "cpu", "--device-map", "auto"), "give one of the two"),
        (("--attn-implementation", "unheard_of"), "unheard_of"),
        (("--quantization", "int3"), "quantization"),
        (("--revision", "v1"), "--revision"),
        (("--dtype", "int8"), "dtype"),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_every_command_passes_them_on(name: str, given: tuple[str, ...], told: str, tiny: Path, tmp_path: Path) -> None:
    refused(run(*command(name, tiny, tmp_path), *given), told)
    assert not (tmp_path / "out").exists()


MODULES = {"peak": ("--child", "--context", "16"), "questions": ("--samples", "1"), "recall": ("--text", "TEXT")}


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_are_run_have_them_too(module: str) -> None:
    one = typer.Typer()
    one.command(cls=console.Command)(import_module(f"kvcomp.benchmarks.{module}").main)
    first = get_command(app).commands["bench"].params  # type: ignore[attr-defined]
    own = {p.name: p for p in get_command(one).params}
    for parameter in (p for p in first if p.name in LOADING):
        assert vars(own[parameter.name]).keys() == vars(parameter).keys()
        assert (own[parameter.name].opts, own[parameter.name].default) == (parameter.opts, parameter.default)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--device", "nowhere"), "no such device here"),
        (("--device-map", "nowhere.json"), "device-map"),
        (("--attn-implementation", "unheard_of"), "unheard_of"),
        (("--quantization", "int3"), "quantization"),
        (("--revision", "v1"), "--revision"),
        (("--dtype", "int8"), "dtype"),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_modules_pass_them_on(module: str, given: tuple[str, ...], told: str, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 200)
    one = typer.Typer()
    one.command(cls=console.Command)(import_module(f"kvcomp.benchmarks.{module}").main)
    more = [str(text) if word == "TEXT" else word for word in MODULES[module]]
    stack = "none + quest(pages=2)" if module == "recall" else "none"
    refused(CliRunner().invoke(one, ["--stack", stack, "--model", str(tiny), *more, *given]), told)


@pytest.mark.parametrize(
    "loading", [DEFAULT, Loading(dtype="bfloat16", device="cpu"), Loading(trust_remote_code=True, revision="v1")]
)
def test_options_say_a_loading_again(loading: Loading) -> None:
    found = []

    @loads_model
    def main(loading: Loading = DEFAULT) -> None:
        found.append(loading)

    one = typer.Typer()
    one.command()(main)
    assert CliRunner().invoke(one, options_of(loading)).exit_code == 0
    assert found == [loading]


def bench(tiny: Path, out: Path, *more: str) -> Any:
    words = ("--stack", "none", "--tasks", "niah_single_1", "--context", "400", "--samples", "1")
    return run("bench", "--model", tiny, *words, "--max-new-tokens", "2", "--out", out, *more)


def test_a_run_knows_how_its_model_was_loaded(tiny: Path, tmp_path: Path) -> None:
    given = ("--attn-implementation", "eager", "--device", "cpu", "--dtype", "bfloat16")
    options = {"dtype": "bfloat16", "device": "cpu", "attn_implementation": "eager"}
    out = tmp_path / "out"
    assert bench(tiny, out, *given).exit_code == 0
    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings.items() >= options.items()
    left = yaml.safe_load((out / "config.yaml").read_text())
    assert left.items() >= {name.replace("_", "-"): value for name, value in options.items()}.items()
    again = run("bench", "--config", out / "config.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again" / "config.json").read_text())["settings"] == settings
    assert "already holds 1 answers" in bench(tiny, out, *given).stderr
    for other in ((), given[:4], (*given[2:], "--attn-implementation", "sdpa")):
        refused(bench(tiny, out, *other), "another configuration")
    refused(bench(tiny, out, *given, "--trust-remote-code"), "trust_remote_code: None there, True now")


def test_runs_of_older_versions_go_on(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bench(tiny, out).exit_code == 0
    assert set(json.loads((out / "config.json").read_text())["settings"]) == set(OLDER)
    assert "device" not in yaml.safe_load((out / "config.yaml").read_text())
    assert "already holds 1 answers" in bench(tiny, out).stderr
    refused(bench(tiny, out, "--device", "cpu"), "device: None there, 'cpu' now")


@pytest.mark.parametrize(
    "given",
    [{"device": "cpu"}, {"device_map": "auto"}, {"attn_implementation": "eager"}, {"quantization": "bnb-4bit"}],
    ids=lambda given: next(iter(given)),
)
def test_vllm_is_not_given_what_it_decides(given: dict[str, str]) -> None:
    (name,) = given
    name = name.replace("_", "-")
    with pytest.raises(KvcompError, match=f"{name}: --engine vllm .*: leave out --{name}"):
        Settings("m", ("perplexity_code",), (512,), 1, ("none",), engine="vllm", loading=Loading(**given))
    hub = Loading(revision="v1", trust_remote_code=True)
    assert Settings("m", ("perplexity_code",), (512,), 1, ("none",), engine="vllm", loading=hub).loading == hub


@pytest.mark.parametrize(
    "given", [("--device-map", "auto"), ("--attn-implementation", "eager"), ("--quantization", "bnb-4bit")]
)
def test_attention_alone_loads_no_weights(given: tuple[str, str]) -> None:
    words = ("speed", "--attention", "--geometry", "qwen3-8b", "--stack", "int8")
    refused(run(*words, *given), given[0].lstrip("-"), "--attention loads no weights")


def test_maps_are_completed(tmp_path: Path) -> None:
    (tmp_path / "map.json").touch()
    (tmp_path / "model.gguf").touch()
    assert completed_maps("bal") == ["balanced", "balanced_low_0"]
    assert completed_maps(f"{tmp_path}/m") == [f"{tmp_path}/map.json"]
