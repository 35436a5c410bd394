"""Calibration files of stages that name none: made once a model, from the text in the package, and kept for later."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcomp.calibration.file import KIND
from kvcomp.calibration.stage import Calibrated
from kvcomp.calibration.weights import FILES, add_samples
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.stages import Stage
from kvcomp.stages.stack import Stack

if TYPE_CHECKING:
    from vllm.config import ModelConfig

TOKENS, CONTEXT = 8192, 2048
NAMES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # of a config: nothing of the model


def fitted(stack: Stack, model: ModelConfig) -> Stack:
    """The stack, with a file for each stage that needs one and names none.

    The file is `calibration/<stage>-<digest>.safetensors` in `$XDG_CACHE_HOME/kvcomp` (`~/.cache` without the
    variable), the digest of the model's config and weights, the text and the format. Where there is none, one process
    of the engine runs `kvcomp calibrate`, and the others wait for it.

    Raises:
        UnsupportedError: it could not be made; the message has the command's last words.
    """
    if not any(map(lacks_file, stack.stages)):
        return stack
    code, context = bool(model.trust_remote_code), min(CONTEXT, int(model.max_model_len))
    given = (str(model.model), model.revision, code, context, _digest(model, context))
    return Stack(tuple(_with_file(s, *given) if lacks_file(s) else s for s in stack.stages))


def lacks_file(stage: Stage) -> bool:
    """Whether a stage may have a calibration file, and names none."""
    return isinstance(stage, Calibrated) and stage.calibration is None


@cache
def _with_file(stage: Any, model: str, revision: str | None, code: bool, context: int, digest: str) -> Stage:
    import fcntl  # not on Windows, where vLLM is not either

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = root / "kvcomp" / "calibration" / f"{stage.name}-{digest}.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with (file.parent / f".{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                with importlib.resources.as_file(_text()) as text:
                    _calibrate(stage.name, model, revision, code, text, context, file)
    except (KvcompError, OSError) as error:
        raise UnsupportedError(
            f"{stage.name} needs a calibration of {model}, which could not be made: {error}. Make one with `kvcomp "
            f"calibrate --method {stage.name} --model ...` and name it: {stage.name}(calibration='FILE')"
        ) from error
    fitted: Stage = replace(stage, calibration=str(file))
    return fitted


def _digest(model: ModelConfig, context: int) -> str:
    """Of a model's config, samples of its weights or their revision on a hub, and what is read to calibrate it."""
    config = model.hf_config
    said = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in NAMES}
    text = _text().read_text(encoding="utf-8")
    words = [KIND, json.dumps(said, sort_keys=True, default=str), str(model.revision), text, str(TOKENS), str(context)]
    digest = hashlib.sha256("\0".join([*words, str(getattr(config, "_commit_hash", None))]).encode())
    folder = Path(str(model.model))
    add_samples(digest, (f for kind in FILES for f in folder.glob(kind)))
    return digest.hexdigest()[:24]


def _text() -> Any:
    """The novel in the package."""
    return importlib.resources.files("kvcomp.benchmarks") / "data" / "haystack.txt"


def _calibrate(method: str, model: str, revision: str | None, code: bool, text: Path, context: int, file: Path) -> None:
    """Write the file, in a process of its own: vLLM changes what torch does by default in this one.

    Raises:
        KvcompError: the command failed.
    """
    logging.getLogger("vllm.kvcomp").info("Calibrating %s for %s, once: %s", method, model, file)
    command = [sys.executable, "-m", "kvcomp", "calibrate", "--model", model, "--method", method, "--text", str(text)]
    command += ["--tokens", str(TOKENS), "--context", str(context), "--out", str(file)]
    command += [] if revision is None else ["--revision", revision]
    command += ["--trust-remote-code"] if code else []
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KvcompError((done.stderr.strip() or done.stdout.strip() or "no words").splitlines()[-1])
