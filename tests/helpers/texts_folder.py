"""A folder for --data: small files in the schemas of the real ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["work", "idea", "time", "people", "thing", "startup", "year", "problem", "company", "life", "money", "city"]
ARTICLES, PARAGRAPHS = 12, 5
HOTPOT_ITEMS = 20


def save(folder: Path) -> Path:
    """Essays, SQuAD 2 and HotpotQA (distractor), each under its official name. Returns the folder."""
    rng = random.Random(0)
    text = " ".join(sentence(rng, 12) + ("\n\n" if i % 7 == 0 else "") for i in range(800))
    write(folder / "PaulGrahamEssays.json", {"text": text})
    write(folder / "dev-v2.0.json", {"version": "v2.0", "data": [article(i, rng) for i in range(ARTICLES)]})
    write(folder / "hotpot_dev_distractor_v1.json", [hotpot(i, rng) for i in range(HOTPOT_ITEMS)])
    return folder


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


def article(number: int, rng: random.Random) -> dict[str, Any]:
    """Each paragraph has a question with an answer, given twice, and one without."""
    paragraphs = []
    for i in range(PARAGRAPHS):
        answer, name = f"answer {number} {i}", f"{number}-{i}"
        answers = [{"text": answer, "answer_start": 0}, {"text": answer, "answer_start": 0}]
        paragraphs.append(
            {
                "context": f"Paragraph {name} of article {number} says {answer}. {sentence(rng, 15)}",
                "qas": [
                    {"id": name, "question": f"What does {name} say?", "answers": answers, "is_impossible": False},
                    {"id": f"no {name}", "question": "Why not?", "answers": [], "is_impossible": True},
                ],
            }
        )
    return {"title": f"Article {number}", "paragraphs": paragraphs}


def hotpot(number: int, rng: random.Random) -> dict[str, Any]:
    """Ten paragraphs; the fourth and the eighth hold the answer."""
    context = [[f"Title {number}-{i}", [f"This is {number}-{i}.", f" {sentence(rng, 12)}"]] for i in range(10)]
    return {
        "_id": str(number),
        "question": f"Which word is hidden in {number}?",
        "answer": f"secret{number}",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [[f"Title {number}-3", 0], [f"Title {number}-7", 1], [f"Title {number}-7", 0]],
        "context": context,
    }
