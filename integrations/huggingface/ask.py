"""Questions about a text that is read and compressed once: every question goes on from a fork of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcomp.errors import KvcompError
from kvcomp.stages.stack import StackLike
from kvcomp.text import quote

from .cache import CompressedCache
from .forward import generating_with
from .prefill import prefill

STACK = "kivi(bits=4)"
MARK = "<kvcomp: the question>"  # in place of a question, to see where a chat template puts it
BETWEEN = "\n\n"


class Answers(NamedTuple):
    """texts: an answer to each question, in order. cache: what holds the context, for further questions and files."""

    texts: list[str]
    cache: CompressedCache


class Parts(NamedTuple):
    """A prompt around its question: ids int64 [1, n] of what comes before, and the text after it."""

    before: Tensor
    after: str


def parts(tokenizer: Any, context: str, chat: bool | None = None) -> Parts:
    """The prompt of questions about `context`: in the tokenizer's chat template, as a user's message of the context, an
    empty line and the question; without a template the same as plain text.

    chat: False leaves the template out; None: use it if there is one.

    Raises:
        KvcompError: an empty context, or a template that is missing or does not keep the message as it is.
    """
    if not isinstance(context, str) or not context.strip():
        raise KvcompError(f"ask(context={quote(context)}): expected a text that is not empty")
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    if not chat:
        return Parts(tokenizer(context + BETWEEN, return_tensors="pt").input_ids, "\n")
    if not getattr(tokenizer, "chat_template", None):
        raise KvcompError("ask(chat=True): this tokenizer has no chat template: leave chat out")
    message = [{"role": "user", "content": f"{context}{BETWEEN}{MARK}"}]
    before, *rest = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).split(MARK)
    if len(rest) != 1:
        raise KvcompError("ask: this tokenizer's chat template changes the message: pass chat=False")
    return Parts(tokenizer(before, add_special_tokens=False, return_tensors="pt").input_ids, rest[0])


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    context: str,
    questions: str | Sequence[str],
    stack: StackLike | None = None,
    *,
    cache: CompressedCache | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 64,
    **generation: Any,
) -> Answers:
    """Answer questions about a context that the model reads once, compressed before any question is known.

    stack: how to compress it, `STACK` unless given. cache: one instead that is empty, or holds this context (of an
    earlier call, or loaded from a file), which is then not read again; it stays as it is. chat: as in `parts`.
    generation: further arguments of `model.generate`, such as `do_sample` (False unless given) or a `streamer`.

    Raises:
        KvcompError: a stack and a cache, a cache that holds something else, no questions, or an empty context.
    """
    if cache is not None and stack is not None:
        raise KvcompError("ask: a stack and a cache were given: the cache has a stack already, leave one out")
    asked = [questions] if isinstance(questions, str) else list(questions)
    wrong = next((q for q in asked if not isinstance(q, str) or not q.strip()), None if asked else asked)
    if wrong is not None:
        raise KvcompError(f"ask(questions={quote(wrong)}): expected one question or more, none of them empty")
    prompt = parts(tokenizer, context, chat)
    before = prompt.before.to(model.device)
    cache = CompressedCache(STACK if stack is None else stack, model) if cache is None else cache
    held, n = cache.get_seq_length(), before.shape[1]
    if held not in (0, n):
        raise KvcompError(
            f"ask(cache=...): the cache holds {held} tokens and this context has {n}: pass the context that it was "
            "filled with, or an empty cache"
        )
    if not held:
        prefill(model, before, [cache], tokenizer=tokenizer)
    texts = []
    for question in asked:
        rest = tokenizer(question + prompt.after, add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([before, rest.to(model.device)], 1)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, **generation}
        out = model.generate(ids, **generating_with(cache.fork()), **options)  # type: ignore[operator]
        texts.append(str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return Answers(texts, cache)
