"""One prefix, many conversations: a system prompt is computed and held once, whoever continues from it.

python examples/shared_prefix.py
"""

from __future__ import annotations

import torch

from kvcomp import CompressedCache, prefill
from kvcomp.integrations.huggingface import memory_of
from kvcomp.integrations.huggingface.models import load_model

RULES = "Answer in one sentence. Name the source of every number. Say so if you do not know. Keep a friendly tone. "
USERS = ("What is the tallest bridge?", "Who invented concrete?", "How long is a day on Mars?", "Why is the sky blue?")


def main(
    stack: str = "int(bits=4)", prefix_tokens: int = 1024, new_tokens: int = 16, model_name: str = "smollm2-135m"
) -> dict[str, float]:
    model, tokenizer = load_model(model_name)
    prefix = tokenizer(RULES * (prefix_tokens // 20), return_tensors="pt").input_ids[:, :prefix_tokens].to(model.device)
    shared = CompressedCache(stack, model)
    prefill(model, prefix, [shared], tokenizer=tokenizer)

    conversations = []
    for question in USERS:
        cache = shared.fork()
        ids = torch.cat([prefix, tokenizer(question, return_tensors="pt").input_ids.to(model.device)], 1)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False)
        print(f"{question} {tokenizer.decode(out[0, ids.shape[1] :]).strip()!r}")
        conversations.append(cache)

    apart = sum(cache.memory().held for cache in conversations)
    together = memory_of(conversations).held
    dense = sum(cache.memory().dense for cache in conversations)
    print(f"\n{len(USERS)} conversations over a prefix of {prefix.shape[1]} tokens hold, in MiB:")
    for name, size in (("DynamicCache", dense), (f"{stack}, no sharing", apart), (f"{stack}, shared", together)):
        print(f"  {name:28}{size / 2**20:8.2f}  {dense / size:5.1f} times less")
    return {"together": together, "apart": apart, "dense": dense}


if __name__ == "__main__":
    main()
