"""`kvcomp serve`: vLLM's server with a stack."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from typing import Annotated

import typer

from kvcomp.console import Plain
from kvcomp.errors import KvcompError

BLOCK = 64  # tokens
OURS = ("--additional-config", "--attention-backend", "--model")
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
EPILOG = """Examples:

  kvcomp serve ./my-model --stack "int(bits=4)" --port 8000 --max-model-len 8192

  kvcomp serve smollm2-135m --stack "klt(bits=2)" --dry-run"""


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a hub id, or an alias as of `kvcomp generate`.")],
    stack: Annotated[str, typer.Option(help="The stack that compresses the cache.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command, and do not run it.")] = False,
) -> None:
    """Serve a model with vLLM, its cache compressed by a stack: `vllm serve` with the options that this takes.

    All other options are vLLM's own. Blocks hold 64 tokens, or as many as the stack's pages need.
    """
    command = command_of(model, stack, context.args)
    if dry_run:
        Plain().print(shlex.join(command), soft_wrap=True)
        return
    if importlib.util.find_spec("vllm") is None:
        raise KvcompError('serve: vLLM is not installed: pip install "kvcomp[vllm]", see docs/vllm.md')
    sys.stdout.flush()
    os.execv(command[0], command)  # the server takes this process's place, and its signals


def command_of(model: str, stack: str, options: list[str]) -> list[str]:
    """The command that serves a model with a stack, and with options of vLLM.

    Raises:
        KvcompError: an option that follows from the stack, a stack that vLLM does not serve, or blocks that do not hold
            whole pages.
    """
    import torch

    from kvcomp.cache.blocks.setup import Setup
    from kvcomp.integrations.vllm.checks import check_stages
    from kvcomp.stages.stack import Stack

    parsed = Stack.parse(stack)
    check_stages(Setup(parsed, 32, 128, torch.bfloat16))
    names = [option.partition("=")[0] for option in options]
    for option in OURS:
        if option in names:
            raise KvcompError(f"{option} follows from MODEL and --stack: leave it out, or run vllm serve yourself.")
    size = parsed.page_size
    block = -(-BLOCK // size) * size
    if "--block-size" not in names:
        options = ["--block-size", str(block), *options]
    config = json.dumps({"kvcomp": {"stack": str(parsed)}})
    entry = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # `vllm` asks for a distribution of that name
    ours = ["--model", _place(model), "--attention-backend", "CUSTOM", "--additional-config", config]
    return [*entry, *ours, *options]


def _place(model: str) -> str:
    """What vLLM is to load: an alias is a folder of converted weights."""
    from kvcomp.integrations.huggingface.models import ALIASES, converted

    return str(converted(model)) if model in ALIASES else model
