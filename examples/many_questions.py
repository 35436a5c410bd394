"""One document, many questions: the document is read once, and each question continues from a fork of its cache.

    python examples/many_questions.py

Forks share the pages of the document, so four of them hold little more than one.
"""

from __future__ import annotations

import time

import torch
from transformers import DynamicCache

from kvcomp import CompressedCache, prefill
from kvcomp.integrations.huggingface import memory_of
from kvcomp.integrations.huggingface.models import load_model

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
FACTS = {  # questions are beginnings of sentences, which a small model completes best
    "The bridge of Arlen was opened in": "1712",
    "The mayor of Corvan is called": "Tom Baker",
    "The library of Elstow has": "48215 books",
    "The castle of Gresham belongs to": "a fisherman",
}


def document(fillers: int) -> str:
    """A dull text with four facts in it."""
    parts = [FILLER] * fillers
    for i, (question, answer) in enumerate(FACTS.items()):
        parts.insert((2 * i + 1) * fillers // 8 + i, f"{question} {answer}. ")
    return "".join(parts)


def main(stack: str = "int(bits=4)", fillers: int = 60, model_name: str = "smollm2-135m") -> dict[str, float]:
    model, tokenizer = load_model(model_name)
    ids = tokenizer(document(fillers), return_tensors="pt").input_ids.to(model.device)

    start = time.perf_counter()
    cache = CompressedCache(stack, model)
    prefill(model, ids, [cache], tokenizer=tokenizer)
    read = time.perf_counter() - start

    forks, right = [], 0
    start = time.perf_counter()
    for question, expected in FACTS.items():
        asked_ids = tokenizer(question, return_tensors="pt").input_ids.to(model.device)
        fork = cache.fork()  # continues by itself; the document's pages stay shared
        prompt = torch.cat([ids, asked_ids], 1)  # only what the fork does not hold is computed
        out = model.generate(prompt, past_key_values=fork, max_new_tokens=8, do_sample=False)
        answer = tokenizer.decode(out[0, prompt.shape[1] :])
        right += expected in answer
        print(f"{question} {answer.split('.')[0].strip()} (in the document: {expected})")
        forks.append(fork)
    asked = (time.perf_counter() - start) / len(FACTS)

    with torch.no_grad():
        dense = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).past_key_values
    one = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    together = memory_of([cache, *forks]).held
    print(f"{ids.shape[1]} tokens read in {read:.1f} s, a question answered in {asked:.1f} s")
    many = (len(forks) + 1) * one
    print(f"held: document and {len(forks)} forks {together / 2**20:.1f} MiB, one DynamicCache {one / 2**20:.1f} MiB")
    print(f"{one / together:.1f} times less than one, {many / together:.1f} times less than {len(forks) + 1} of them")
    return {"right": right, "held": together, "one": cache.memory().held, "dense": one}


if __name__ == "__main__":
    main()
