"""The options of what loads a model, for the command line and for the modules that are commands of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from .loading import ATTENTION, DEFAULT, DEVICE_MAPS, DTYPES, QUANTIZATIONS, Loading, option

PACKAGED = ("smollm2-135m",)  # aliases of models; a shell would wait too long for torch to name them


def one_of(*values: str) -> Callable[[str], list[str]]:
    """What a shell completes an option with: the values that start with what was typed, in upper or lower case."""

    def complete(incomplete: str) -> list[str]:
        found = [value for value in values if value.lower().startswith(incomplete.lower())]
        return [incomplete + value[len(incomplete) :] for value in found]  # shells take what continues the text alone

    return complete


def completed_models(incomplete: str) -> list[str]:
    """Aliases, folders and .gguf files."""
    return [*one_of(*PACKAGED)(incomplete), *completed_paths(incomplete)]


def completed_paths(incomplete: str, suffix: str = ".gguf") -> list[str]:
    """Folders, and files of a suffix."""
    typed = Path(incomplete).expanduser()
    folder = typed if incomplete.endswith("/") else typed.parent
    start = incomplete[: len(incomplete) - len("" if incomplete.endswith("/") else typed.name)]
    found = [] if not incomplete or not folder.is_dir() else sorted(folder.iterdir())
    paths = [f"{start}{path.name}{'/' * path.is_dir()}" for path in found if path.is_dir() or path.suffix == suffix]
    return [path for path in paths if path.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option(
        help="The alias smollm2-135m, a .gguf file, a local folder, or a Hugging Face hub id.",
        autocompletion=completed_models,
    ),
]


def completed_maps(incomplete: str) -> list[str]:
    """Names of maps, folders and .json files."""
    return [*one_of(*DEVICE_MAPS)(incomplete), *completed_paths(incomplete, ".json")]


def _choice(*values: str, help: str) -> Any:
    return typer.Option(help=help, autocompletion=one_of(*values))


LOADING = {  # a field of `Loading`: the option that sets it
    "dtype": Annotated[
        str | None,
        _choice(*DTYPES, help=f"{', '.join(DTYPES)}.  \\[default: float32 on a CPU, bfloat16 on a GPU]"),
    ],
    "device": Annotated[
        str | None,
        _choice("cpu", "cuda", "cuda:0", "mps", help="Where the model runs, as in cuda:1.  \\[default: a GPU, or cpu]"),
    ],
    "device_map": Annotated[
        str | None,
        typer.Option(
            help="Spread the model over devices: auto, or a JSON file of devices by module. Needs accelerate.",
            autocompletion=completed_maps,
        ),
    ],
    "attn_implementation": Annotated[
        str, _choice(*ATTENTION, help="The model's own attention, by its name in transformers; it runs the prompt.")
    ],
    "quantization": Annotated[
        str | None, _choice(*QUANTIZATIONS, help=f"Quantize the weights while loading: {', '.join(QUANTIZATIONS)}.")
    ],
    "revision": Annotated[str | None, typer.Option(help="Branch, tag or commit of a model of the hub.")],
    "trust_remote_code": Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model, if it has any.")
    ],
}


def loads_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `LOADING` in the place of its parameter `loading`, which they become."""

    @wraps(command)
    def with_loading(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in LOADING}
        command(**given, loading=Loading(**chosen))

    parameters = []
    for parameter in signature(command, eval_str=True).parameters.values():
        if parameter.name == "loading":
            kind = Parameter.KEYWORD_ONLY
            parameters += [Parameter(n, kind, default=getattr(DEFAULT, n), annotation=a) for n, a in LOADING.items()]
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
    with_loading.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    with_loading.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_loading


def given(loading: Loading) -> list[str]:
    """The options of a command line that say `loading` again."""
    found = []
    for name, value in loading.changed().items():
        found += [f"--{option(name)}"] if value is True else [f"--{option(name)}", str(value)]
    return found
