"""Every policy that scores tokens, as spec text; with a calibration file where one is needed."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from synthetic import MODEL, write

from kvcomp.calibration.stage import Calibrated
from kvcomp.fingerprint import Fingerprint
from kvcomp.policies.scored import ScoredPolicy
from kvcomp.stages.registry import find, stages

SCORED = sorted(name for name, stage in stages().items() if issubclass(stage, ScoredPolicy))


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def calibration(name: str, dim: int, heads: int = 2, model: Fingerprint = MODEL) -> str:
    """ ", calibration='FILE'" for layers 0 to 3 of so many KV heads of `dim` channels; "" where a policy needs none."""
    if not issubclass(find(name), Calibrated):
        return ""
    path = _folder() / f"{name}-{dim}-{heads}-{abs(hash(model))}"
    return f", calibration={str(write(path, name, heads, dim, layers=4, model=model))!r}"


def spec_of(name: str, given: str, dim: int, window: int | None = None, model: Fingerprint = MODEL) -> str:
    """name(given), with its file, and with `window` where it has one."""
    votes = f", window={window}" if window and "window" in find(name).__dataclass_fields__ else ""
    return f"{name}({given}{votes}{calibration(name, dim, model=model)})"
