"""docs/models.md: what every architecture was found to do. `make test-models` writes it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import transformers

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "models.md"
FOUND = ROOT / "out" / "models"  # a JSON file for each architecture of the last run
LOSSY = ("int8", "kivi4", "snapkv + int8", "int8 + quest")
COLUMNS = ("architecture", "layers", "full precision", *LOSSY, "remarks")
OURS = {
    "CompressedLayer": "full",
    "LatentLayer": "latent",
    "IndexedLayer": "indexed",
    "IndexedLatentLayer": "indexed",
    "SlidingLayer": "sliding",
}
THEIRS = {
    "DynamicLayer": "cross-attention",
    "DynamicSlidingWindowLayer": "sliding",
    "LinearAttentionLayer": "recurrent",
    "LinearAttentionAndFullAttentionLayer": "hybrid",
    "LinearAttentionAndSlidingWindowAttentionLayer": "hybrid sliding",
    "DummyLayer": "without a cache of their own",
}


def pinned() -> str:
    """The version of transformers that the document is of."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(r'^transformers==([\d.]+); python_version >= "3.11"', text, re.MULTILINE)
    assert found, "constraints.txt names no version of transformers"
    return found[1]


def is_pinned() -> bool:
    return transformers.__version__ == pinned()


def head() -> str:
    return f"""# Models

What `make test-models` finds for every causal LM of transformers {pinned()} and ten models with images, each built
tiny with random weights (`tests/models/overrides.py`). The file is written by that command.

- **layers**: those that kvcomp compresses, and those that stay transformers' own.
- **full precision**: pages of the quantizer `none` against `DynamicCache`: a padded batch, two turns, chunked prefill,
  beams, prompt lookup, eager attention, a cache made from the config alone, and `DynamicCache` on the hooked model.
  `equal`: the same tokens, and logits within 1e-3, of a model whose logits change at least ten times as much where
  its prompt is hidden.
- **int8** (`int(bits=8)`), **kivi4** (`kivi(bits=4)`), **snapkv + int8** (a fifth of the tokens leave), **int8 +
  quest** (half of the pages): the model is made to say what the dense one said. `yes`: the first token's logits are
  equal, the later ones alike.
- **refused**: a `KvcompError` says why; it is quoted under remarks. **n/a**: transformers does not do it with its own
  cache.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
"""


def layers(result: dict[str, Any]) -> str:
    """ "2 full; own: 2 sliding" of the classes of a cache's layers."""
    counts = result.get("layers", {})
    ours = ", ".join(f"{n} {OURS[name]}" for name, n in counts.items() if name in OURS)
    theirs = ", ".join(f"{n} {THEIRS.get(name, name)}" for name, n in counts.items() if name not in OURS)
    return "; own: ".join(part for part in (ours or ("none" if theirs else ""), theirs) if part)


def compresses(result: dict[str, Any]) -> bool:
    return any(name in OURS for name in result.get("layers", {}))


def kind(verdict: str) -> str:
    return verdict.partition(":")[0]


def exact(result: dict[str, Any]) -> str:
    """What the situations in full precision come to."""
    verdicts = {name: verdict for name, verdict in result["verdicts"].items() if name not in LOSSY}
    kinds = {kind(verdict) for verdict in verdicts.values()}
    for bad in ("wrong", "crash"):
        if bad in kinds:
            return f"**{bad}**: {', '.join(name for name, verdict in verdicts.items() if kind(verdict) == bad)}"
    if kind(verdicts["padded"]) != "equal":
        return kind(verdicts["padded"])
    refused = [name for name, verdict in verdicts.items() if kind(verdict) == "refused"]
    return "equal" + (f"; refused: {', '.join(refused)}" if refused else "")


def cell(verdict: str | None) -> str:
    if verdict is None:
        return ""
    return {"plausible": "yes", "equal": "yes"}.get(verdict, kind(verdict))


def remarks(result: dict[str, Any]) -> str:
    """Every reason that was given, once; and what transformers itself does not do."""
    verdicts = result["verdicts"]
    reasons: dict[str, list[str]] = {}
    for name, verdict in verdicts.items():
        what, _, why = verdict.partition(": ")
        if why and what != "n/a":
            reasons.setdefault(f"{what}: {why}" if what in ("wrong", "crash") else why, []).append(name)
    told = list(reasons)
    none = [name for name, verdict in verdicts.items() if kind(verdict) == "n/a"]
    if none == list(verdicts):
        told.append(verdicts[none[0]].partition(": ")[2])
    elif none:
        told.append(f"n/a: {', '.join(none)}")
    if not compresses(result) and result.get("layers"):
        told.append("nothing is compressed, and a warning says so")
    return "; ".join(told)


def row(name: str, result: dict[str, Any]) -> str:
    """The line of an architecture."""
    if "not_built" in result:
        cells = ["", "not built", *[""] * len(LOSSY), result["not_built"]]
    elif "fatal" in result:
        cells = ["", f"**{result['fatal'].splitlines()[-1]}**", *[""] * (len(LOSSY) + 1)]
    else:
        lossy = (cell(result["verdicts"].get(name)) for name in LOSSY)
        cells = [layers(result), exact(result), *lossy, remarks(result)]
    return "| " + " | ".join(_plain(text) for text in (name, *cells)) + " |"


def _plain(text: str) -> str:
    """Text that a table's cell can hold, the same on every machine."""
    text = re.sub(r"0x[0-9a-f]+", "0x...", " ".join(text.split()))
    return text.replace("|", "\\|").replace("<", "&lt;")


def keep(name: str, result: dict[str, Any]) -> None:
    """Leave a result for `main`."""
    FOUND.mkdir(parents=True, exist_ok=True)
    file = FOUND / f"{re.sub('[^A-Za-z0-9_-]', '_', name)}.json"
    file.write_text(json.dumps({"name": name, "transformers": transformers.__version__, **result}), encoding="utf-8")


def main(names: list[str]) -> int:
    """Write the document of the last run: docs/models.md where it is of the pinned transformers, else out/models.md."""
    results = {}
    for file in sorted(FOUND.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["transformers"] == transformers.__version__:
            results[result["name"]] = result
    missing = [name for name in names if name not in results]
    if missing:
        print(f"document.py: no results of {', '.join(missing)}: run make test-models", file=sys.stderr)
        return 1
    target = DOCUMENT if is_pinned() else FOUND.with_suffix(".md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(head() + "".join(f"{row(name, results[name])}\n" for name in names), encoding="utf-8")
    print(f"wrote {target.relative_to(ROOT)}: {len(names)} models")
    return 0


if __name__ == "__main__":
    from images import MODELS
    from tiny import architectures

    sys.exit(main([*architectures(), *MODELS]))
