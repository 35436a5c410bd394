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

TOWNS = ("Arlen", "Belmont", "Corvan", "Dunmore", "Elstow", "Farley", "Gresham", "Hadleigh", "Ilmen", "Jarrow")
QUESTIONS = ("Arlen", "Corvan", "Gresham", "Jarrow")


def document(bridges: int) -> tuple[str, dict[str, str]]:
    """A text about bridges, and the year of each."""
    names = [f"{town} {number}" if number else town for number in range(10) for town in TOWNS][:bridges]
    years = {name: str(1500 + 37 * i % 400) for i, name in enumerate(names)}
    return " ".join(f"The bridge of {name} was opened in {year}." for name, year in years.items()), years


def main(stack: str = "kivi(bits=4)", bridges: int = 60, model_name: str = "smollm2-135m") -> dict[str, float]:
    model, tokenizer = load_model(model_name)
    text, years = document(bridges)
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)

    start = time.perf_counter()
    cache = CompressedCache(stack, model)
    prefill(model, ids, [cache], tokenizer=tokenizer)
    read = time.perf_counter() - start

    forks, right = [], 0
    start = time.perf_counter()
    for town in QUESTIONS:
        question = tokenizer(f" The bridge of {town} was opened in", return_tensors="pt").input_ids.to(model.device)
        fork = cache.fork()  # continues by itself; the document's pages stay shared
        prompt = torch.cat([ids, question], 1)  # only what the fork does not hold is computed
        out = model.generate(prompt, past_key_values=fork, max_new_tokens=5, do_sample=False)
        answer = tokenizer.decode(out[0, prompt.shape[1] :])
        right += years[town] in answer
        print(f"{town}: {answer.split('.')[0].strip()} (in the document: {years[town]})")
        forks.append(fork)
    asked = (time.perf_counter() - start) / len(QUESTIONS)

    with torch.no_grad():
        dense = model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).past_key_values
    one = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    together = memory_of([cache, *forks]).held
    print(f"{ids.shape[1]} tokens read in {read:.1f} s, a question answered in {asked:.1f} s")
    print(f"held: document and {len(forks)} forks {together / 2**20:.1f} MiB, one DynamicCache {one / 2**20:.1f} MiB")
    print(
        f"{one / together:.1f} times less; {len(forks) + 1} DynamicCaches would hold {(len(forks) + 1) * one / 2**20:.1f} MiB"
    )
    return {
        "right": right,
        "held": together,
        "one": cache.memory().held,
        "dense": one,
        "read_s": read,
        "asked_s": asked,
    }


if __name__ == "__main__":
    main()
