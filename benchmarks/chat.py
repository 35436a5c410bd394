"""Prompts in a tokenizer's chat template."""

from __future__ import annotations

from typing import Any

from kvcomp.benchmarks.samples import TaskError


def in_chat(tokenizer: Any, prompt: str) -> str:
    """Return the prompt as a user's turn, the model's turn being next.

    Without the token that begins a text where the tokenizer adds that itself.

    Raises:
        TaskError: the tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise TaskError(
            "chat: the tokenizer of this model has no chat template: leave out --chat, or choose a model that is tuned "
            "for chat."
        )
    turns = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    begins = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if begins else text
