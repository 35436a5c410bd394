"""`kvcomp generate`: a text continued from a compressed cache, and what the cache held and read."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvcomp.console import Plain, waiting
from kvcomp.errors import KvcompError
from kvcomp.files import read_text
from kvcomp.integrations.loading import DEFAULT, Loading
from kvcomp.integrations.options import Model, loads_model
from kvcomp.text import quote, size_text

from .config_file import Config
from .output import Document, Json

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from kvcomp import CompressedCache, Traffic

DOCUMENT = Document(
    model="the model's name as given",
    stack="the stack, with its arguments",
    hash="the stack's hash",
    prompt_tokens="tokens of the prompt",
    new_tokens="tokens that were generated",
    text="the generated text",
    held="bytes that the cache holds at the end",
    held_dense="bytes that an uncompressed cache would hold",
    held_ratio="held_dense / held",
    read="bytes of the cache that the last decode step read; null if there was none",
    read_dense="bytes that it would have read of an uncompressed cache; null if there was none",
    read_ratio="read_dense / read; null if there was none",
    effective_bits="bits held per cached number, everything counted",
)
EPILOG = f"""Examples:

  kvcomp generate "The capital of France is" --stack "kivi(bits=4)"

  kvcomp generate --file report.txt --stack "snapkv(keep=0.25) + kivi(bits=2)" --max-new-tokens 200

  cat notes.txt | kvcomp generate - --model ./my-model

{DOCUMENT.help}"""


@loads_model
def generate(
    prompt: Annotated[str | None, typer.Argument(help='The text to continue, or "-" to read it from stdin.')] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    model: Model = "smollm2-135m",
    stack: Annotated[str, typer.Option(help="How to compress the cache.")] = "kivi(bits=4)",
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31, help="Stop after this many tokens.")] = 64,
    loading: Loading = DEFAULT,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Continue a text from a compressed cache, and print what the cache held and read beside an uncompressed one."""
    text = _read_prompt(prompt, file)
    from kvcomp import CompressedCache, Stack

    parsed = Stack.parse(stack)
    from kvcomp.integrations.configs import decoder_config, max_positions
    from kvcomp.integrations.huggingface import prefill
    from kvcomp.integrations.huggingface.forward import generating_with
    from kvcomp.integrations.huggingface.models import load_model

    with waiting(f"Loading {model}"):
        network, tokenizer = load_model(model, loading)
    inputs = tokenizer(text, return_tensors="pt").to(network.device)
    length = inputs.input_ids.shape[1]
    limit = max_positions(decoder_config(network.config))
    if limit is not None and length + max_new_tokens > limit:
        raise KvcompError(
            f"prompt: {length} tokens and {max_new_tokens} new ones are more than the {limit} of {model}. "
            "Shorten the prompt or lower --max-new-tokens."
        )
    cache = CompressedCache(parsed, network)
    with ExitStack() as until_first_token:
        until_first_token.enter_context(waiting(f"Reading {length:,} prompt tokens"))
        if any(policy.reconstructs is not None for policy in parsed.policies):
            prefill(network, inputs.input_ids[:, :-1], [cache], tokenizer=tokenizer)
        ids = network.generate(
            **inputs,
            **generating_with(cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=_streamer(tokenizer, until_first_token, quiet=as_json),
            prefill_chunk_size=parsed.prefill_chunk,
        )
    new = ids[0, length:]
    if as_json:
        _print_json(model, cache, length, len(new), tokenizer.decode(new, skip_special_tokens=True))
        return
    memory, traffic = cache.memory(), _traffic(cache)
    table = Table(title=f"{parsed}, {length} prompt tokens", title_justify="left")
    for column in ("", "this stack", "dense", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("held", size_text(memory.held), size_text(memory.dense), f"{memory.ratio:.2f}x")
    if traffic is not None:
        table.add_row(
            "read by the last step", size_text(traffic.read), size_text(traffic.dense), f"{traffic.ratio:.2f}x"
        )
    table.add_row("effective bits", f"{memory.effective_bits:.2f}", "", "")
    Plain().print(table)


def _streamer(tokenizer: Any, until_first_token: ExitStack, quiet: bool) -> BaseStreamer:
    """Prints text as it comes, if not `quiet`; closes `until_first_token` when the first token is there."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        puts = 0

        def put(self, value: Any) -> None:
            self.puts += 1
            if self.puts == 2:  # the first call brings the prompt
                until_first_token.close()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if not quiet:
                super().on_finalized_text(text, stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _print_json(model: str, cache: CompressedCache, prompt_tokens: int, new_tokens: int, text: str) -> None:
    memory, traffic = cache.memory(), _traffic(cache)
    DOCUMENT.print(
        model=model,
        stack=str(cache.stack),
        hash=cache.stack.hash,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        text=text,
        held=memory.held,
        held_dense=memory.dense,
        held_ratio=memory.ratio,
        read=traffic and traffic.read,
        read_dense=traffic and traffic.dense,
        read_ratio=traffic and traffic.ratio,
        effective_bits=memory.effective_bits,
    )


def _traffic(cache: CompressedCache) -> Traffic | None:
    """What the last decode step read; None if the only token came from the prompt."""
    try:
        return cache.traffic()
    except KvcompError:
        return None


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise KvcompError('prompt: give either a text (or "-" for stdin) or --file.')
    if file is not None:
        try:
            text = read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise KvcompError(f"file: {quote(str(file))}: {reason}.") from error
    else:
        text = sys.stdin.read() if prompt == "-" else str(prompt)
    if not text.strip():
        raise KvcompError("prompt: it is empty; give a text to continue.")
    return text
