"""Folders of runs as `kvcomp bench` writes them, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvcomp.benchmarks.results import Record, Results

MISSING = object()  # stands for a field that is taken away


def record(**values: Any) -> Record:
    default = {
        "task": "niah_single_1",
        "context": 512,
        "index": 0,
        "stack": "none",
        "hash": "none",
        "score": 1.0,
        "prediction": "x",
        "references": ["x"],
        "depth": 0.31,
        "tags": [],
        "origin": "",
        "prompt_tokens": 500,
        "new_tokens": 4,
        "effective_bits": 16.0,
        "held": 2**20,
        "held_dense": 2**20,
        "read": 2**20,
        "read_dense": 2**20,
        "ms_per_token": 5.0,
        "prefill_s": 0.5,
        "peak": 2**20,
    }
    return Record(**{**default, **values})


def save(folder: Path, **settings: Any) -> Path:
    """Two stacks, three samples each."""
    config = {
        "command": f"kvcomp bench --out {folder.name}",
        "settings": {"model": "tiny", "tasks": ["niah_single_1"], "samples": 3, "seed": 0, "chat": False, **settings},
        "data": {},
        "versions": {"kvcomp": "0"},
        "machine": {"cpu": "a cpu", "cores": 2, "threads": 1, "gpu": None},
    }
    results = Results(folder, config)
    for stack in ("none", "kivi(bits=2)"):
        for index in range(3):
            results.append(record(stack=stack, hash=stack, index=index, score=float(index != 1)))
    return folder


def edit_record(folder: Path, line: int, **values: Any) -> None:
    """Change fields of a line of `samples.jsonl`, counted from 1."""
    file = folder / "samples.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[line - 1] = json.dumps(_edited(json.loads(lines[line - 1]), values))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def edit_config(folder: Path, part: str = "", **values: Any) -> None:
    """Change `config.json`, or a part of it."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if part:
        config[part] = _edited(config[part], values)
    file.write_text(json.dumps(config if part else _edited(config, values)), encoding="utf-8")


def _edited(there: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**there, **values}.items() if value is not MISSING}
