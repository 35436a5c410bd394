"""What is refused or warned of when a chunk comes to a layer, before it is taken."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from kvcomp.errors import KvcompError, KvcompWarning

if TYPE_CHECKING:
    from .held import HeldLayer


def refuse_nothing(tokens: int) -> None:
    if tokens == 0:
        raise KvcompError("the cache was given 0 new tokens: the prompt is empty, or all of it is cached already")


def check_arrival(layer: HeldLayer, n: int) -> None:
    """Refuse n tokens that are more than the layer may hold; warn where the stack takes its prompt in another way."""
    length = layer.get_seq_length()
    if layer.max_tokens is not None and length + n > layer.max_tokens:  # padding counts there
        seen = int(layer.counted()[0].max()) + n
        if seen > layer.max_tokens:
            raise KvcompError(
                f"{seen} tokens exceed the model's max_position_embeddings={layer.max_tokens}: shorten the prompt or "
                "the generation, or pass max_tokens= to CompressedCache if the model's positions do reach further"
            )
    if layer.prefill_chunk is not None and n > layer.prefill_chunk:
        warnings.warn(
            f"{n} tokens came at once to a stack that takes its prompt in chunks of {layer.prefill_chunk}, so they "
            f"see each other densely: use kvcomp.prefill, or generate(prefill_chunk_size={layer.prefill_chunk})",
            KvcompWarning,
            stacklevel=3,
        )
    if n == 1 and not length and layer.plan.gathers and layer.to_come is None:
        warnings.warn(
            "the first token came alone, as generated tokens do: if all of the prompt comes so, "
            f"{layer.plan.policies[0].name} evicts nothing of it: use kvcomp.prefill(chunk=1), or larger chunks",
            KvcompWarning,
            stacklevel=3,
        )
