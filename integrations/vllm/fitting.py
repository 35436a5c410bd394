"""Calibration files of stages that name none: made once a model, from the text in the package, and kept for later."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcomp.calibration.file import KIND
from kvcomp.calibration.stage import Calibrated
from kvcomp.errors import KvcompError, UnsupportedError
from kvcomp.stages import Stage
from kvcomp.stages.stack import Stack

if TYPE_CHECKING:
    from vllm.config import ModelConfig

TOKENS, CONTEXT = 8192, 2048


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
    code = bool(model.trust_remote_code)
    given = (str(model.model), model.revision, code, int(model.max_model_len))
    return Stack(tuple(_with_file(s, *given) if lacks_file(s) else s for s in stack.stages))


def lacks_file(stage: Stage) -> bool:
    """Whether a stage may have a calibration file, and names none."""
    return isinstance(stage, Calibrated) and stage.calibration is None


@cache
def _with_file(stage: Any, model: str, revision: str | None, code: bool, longest: int) -> Stage:
    import fcntl  # not on Windows, where vLLM is not either

    context = min(CONTEXT, longest)
    try:
        file = file_of(stage.name, model, revision, code, context)
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
    return replace(stage, calibration=str(file))


def file_of(method: str, model: str, revision: str | None = None, code: bool = False, context: int = CONTEXT) -> Path:
    """Where the calibration of a model is kept, whether or not it is there.

    Raises:
        ModelError: there is no such model.
    """
    from kvcomp.integrations.huggingface.models import on_disk
    from kvcomp.integrations.loading import Loading

    found = on_disk(model, Loading(revision=revision, trust_remote_code=code))
    words = (KIND, found.config, str(found.weights), _text().read_text(encoding="utf-8"), str(TOKENS), str(context))
    digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "kvcomp" / "calibration" / f"{method}-{digest}.safetensors"


def _text() -> Any:
    """The novel in the package."""
    return importlib.resources.files("kvcomp.benchmarks") / "data" / "haystack.txt"


def _calibrate(method: str, model: str, revision: str | None, code: bool, text: Path, context: int, file: Path) -> None:
    """Write the file, in a process of its own: vLLM changes what torch does by default in this one.

    Raises:
        KvcompError: the command failed.
    """
    from vllm.logger import init_logger

    init_logger("vllm.kvcomp").info("Calibrating %s for %s, once: %s", method, model, file)
    command = [sys.executable, "-m", "kvcomp", "calibrate", "--model", model, "--method", method, "--text", str(text)]
    command += ["--tokens", str(TOKENS), "--context", str(context), "--out", str(file)]
    command += [] if revision is None else ["--revision", revision]
    command += ["--trust-remote-code"] if code else []
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KvcompError((done.stderr.strip() or done.stdout.strip() or "no words").splitlines()[-1])
