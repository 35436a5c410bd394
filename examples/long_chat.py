"""A long chat in flat memory: the cache keeps within a budget, however many turns there are.

    python examples/long_chat.py

`streaming` keeps the first tokens and the last ones, so what was said long ago is forgotten. `h2o(budget=512)` keeps
what received most attention instead.
"""

from __future__ import annotations

import torch

from kvcomp import CompressedCache
from kvcomp.integrations.huggingface.models import load_model

TURNS = (
    "What is a bridge?",
    "Name three kinds of bridges.",
    "How is a suspension bridge built?",
    "What do engineers measure on an old bridge?",
    "Tell me a short story about a bridge.",
)


def main(
    stack: str = "streaming(sinks=4, recent=256) + kivi(bits=4)",
    turns: int = 10,
    new_tokens: int = 96,
    model_name: str = "smollm2-135m",
) -> list[dict[str, float]]:
    model, tokenizer = load_model(model_name)
    cache = CompressedCache(stack, model)
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    ids = torch.empty(1, 0, dtype=torch.int64, device=model.device)
    figures = []
    print(f"{stack}\n\n turn  tokens   held, MiB   DynamicCache, MiB")
    for turn in range(turns):
        message = [{"role": "user", "content": TURNS[turn % len(TURNS)]}]
        new = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = torch.cat([ids, new.input_ids.to(model.device)], 1)  # the whole chat; the cache computes what is new
        ids = model.generate(
            ids, past_key_values=cache, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
        held, dense = cache.memory().held, cache.get_seq_length() * token
        figures.append({"tokens": cache.get_seq_length(), "held": held, "dense": dense})
        print(f"{turn + 1:5} {cache.get_seq_length():7} {held / 2**20:11.2f} {dense / 2**20:19.2f}")
    return figures


if __name__ == "__main__":
    main()
