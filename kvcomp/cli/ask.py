"""`kvcomp ask`: questions about a text that is read and compressed once."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcomp.console import Plain, styled, waiting
from kvcomp.errors import KvcompError
from kvcomp.files import read_text, reason
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import Model, loads_model
from kvcomp.text import quote, size_text

from .config_file import Config
from .output import Document, Json

DOCUMENT = Document(
    model="the model's name as given",
    stack="the stack, with its arguments",
    hash="the stack's hash",
    context_tokens="tokens of the context, with what a chat template puts before it",
    answers="an object for each question: question and text",
    held="bytes that the cache of the context holds",
    held_dense="bytes that an uncompressed cache would hold",
    held_ratio="held_dense / held",
)
EPILOG = f"""Examples:

  kvcomp ask report.txt --question "Who wrote it?" --question "What does it recommend?"

  kvcomp ask report.txt --stack "kvzip(keep=0.3) + kivi(bits=4)" --save report.kv --question "Who wrote it?"

  kvcomp ask report.txt --load report.kv --question "When was it written?"

{DOCUMENT.help}"""


@loads_model
def ask(
    context: Annotated[Path, typer.Argument(help="A text file to ask about.", show_default=False)],
    question: Annotated[list[str], typer.Option(help="A question about the context; repeat it.")],
    model: Model = "smollm2-135m",
    stack: Annotated[
        str | None, typer.Option(help="How to compress the context.  \\[default: kivi(bits=4), or that of --load]")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31, help="Stop an answer after this many tokens.")] = 64,
    save: Annotated[Path | None, typer.Option(help="Write the compressed context to this file.")] = None,
    load: Annotated[Path | None, typer.Option(help="Use the compressed context that --save wrote.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Leave out the tokenizer's chat template.")] = False,
    loading: Loading = DEFAULT,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Answer questions about a text that the model reads once, compressed before it knows any question.

    The prompt is the tokenizer's chat template, if it has one, around the context, an empty line and a question.
    """
    try:
        text = read_text(context, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise KvcompError(f"context: {quote(str(context))} is not UTF-8 text.") from error
    except OSError as error:
        raise KvcompError(f"context: {quote(str(context))}: {reason(error)}.") from error
    if load is not None and stack is not None:
        raise KvcompError("stack, load: the loaded cache has a stack already; leave --stack out.")
    if save is not None and os.path.exists(save):
        raise KvcompError(f"save: {quote(str(save))} exists: name another file, or remove it.")
    from kvcomp import CompressedCache, Stack
    from kvcomp import ask as answered
    from kvcomp.integrations.configs import decoder_config, max_positions
    from kvcomp.integrations.huggingface.ask import STACK, parts
    from kvcomp.integrations.huggingface.models import load_model

    parsed = Stack.parse(stack or STACK)
    with waiting(f"Loading {model}"):
        network, tokenizer = load_model(model, loading)
        chat = False if plain else None
        tokens = parts(tokenizer, text, chat).before.shape[1]
    limit = max_positions(decoder_config(network.config))
    if limit is not None and tokens + max_new_tokens > limit:
        raise KvcompError(
            f"context: {tokens} tokens and {max_new_tokens} new ones are more than the {limit} of {model}. "
            "Shorten the text or lower --max-new-tokens."
        )
    cache = CompressedCache(parsed, network) if load is None else CompressedCache.load(load, network)
    console, answers = Plain(), []
    with ExitStack() as reading:
        reading.enter_context(waiting(f"Reading {tokens:,} tokens"))
        for asked in question:
            (answer,), _ = answered(
                network, tokenizer, text, asked, cache=cache, chat=chat, max_new_tokens=max_new_tokens
            )
            reading.close()
            answers.append({"question": asked, "text": answer})
            if not as_json:
                console.print(styled(asked, "bold"), soft_wrap=True)
                console.print(answer, soft_wrap=True)
    if save is not None:
        cache.save(save)
    _report(model, cache, tokens, answers, console, as_json)


def _report(model: str, cache: Any, tokens: int, answers: list[dict[str, str]], console: Plain, as_json: bool) -> None:
    memory = cache.memory()
    if as_json:
        DOCUMENT.print(
            model=model,
            stack=str(cache.stack),
            hash=cache.stack.hash,
            context_tokens=tokens,
            answers=answers,
            held=memory.held,
            held_dense=memory.dense,
            held_ratio=memory.ratio,
        )
        return
    sizes = f"{size_text(memory.held)}, uncompressed {size_text(memory.dense)}: {memory.ratio:.2f}x less"
    console.print(f"{cache.stack}: {tokens} tokens of context in {sizes}", soft_wrap=True)
