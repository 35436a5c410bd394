"""A model with sliding windows, of a Llama with full attention: `python -m kvcomp.benchmarks.sliding --help`.

Small models with real weights and sliding windows are rare. The weights stay, and the config declares most layers
sliding: CWM has the weights of a Llama and two kinds of layers. The model was not trained so, and predicts texts longer
than the window less well; stacks are compared by how near they come to its own predictions.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.console import run
from kvcomp.errors import KvcompError


def declare(source: Path, target: Path, window: int, every: int) -> None:
    """Make `target` the model of the folder `source`, where one of `every` layers, the last, sees all tokens, and the
    others the last `window` tokens. The other files are links.

    Raises:
        KvcompError: no folder of a Llama, or the target exists.
    """
    if target.exists():
        raise KvcompError(f"out: {str(target)!r} exists: name a folder to make")
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KvcompError(f"model: {str(source)!r} is no folder that `save_pretrained` wrote: {error}") from error
    if config.get("model_type") != "llama":
        raise KvcompError(f"model: {str(source)!r} is a {config.get('model_type')}: expected a llama")
    full = [i % every == every - 1 for i in range(config["num_hidden_layers"])]
    config = {name: x for name, x in config.items() if x is not None}  # CWM's fields are stricter
    config |= {"model_type": "cwm", "architectures": ["CwmForCausalLM"], "sliding_window": window}
    config["layer_types"] = ["full_attention" if each else "sliding_attention" for each in full]
    shutil.copytree(source, target, copy_function=lambda file, copy: os.symlink(Path(file).resolve(), copy))
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def main(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    model: Annotated[str, typer.Option(help="The alias smollm2-135m, or the folder of a Llama.")] = "smollm2-135m",
    window: Annotated[int, typer.Option(min=2, help="Tokens that a query of a sliding layer sees.")] = 512,
    every: Annotated[int, typer.Option(min=1, help="One layer of so many sees all tokens.")] = 6,
) -> None:
    """Declare most layers of a Llama to see a sliding window, for `kvcomp bench --model OUT`."""
    from kvcomp.integrations.huggingface.models import ALIASES, converted

    declare(converted(model) if model in ALIASES else Path(model), out, window, every)


if __name__ == "__main__":
    run(main)
