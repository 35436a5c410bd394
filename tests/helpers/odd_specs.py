"""Random stack specs: right ones, nearly right ones, and noise."""

from __future__ import annotations

import random
import typing
from dataclasses import fields

from kvcomp.stages.registry import stages

WORDS = ["none", "true", "False", "nan", "inf", "hadamard", "own", "common", "adaptive", "pyramid", "token", "channel"]
NUMBERS = ["0", "1", "-1", "2", "4", "16", "32", "0.5", "0.25", "1.0", "1e-9", "1e-300", "1e999", "-5", "2.5"]
HUGE = ["9" * 30, "9" * 400, "9" * 5000, str(10**12), str(2**53), str(2**63)]
TEXTS = [
    "''",
    "'a'",
    "'a  b'",
    "'x\\0'",
    "'\\ud800'",
    "'~nosuchuser/x'",
    '"[bold]"',
    "'=1+1'",
    "b'2'",
    "f'{x}'",
    "'" + "n" * 300 + "'",
]
ODD = [
    "...",
    "1+1",
    "1+2j",
    "[1]",
    "{[]: 1}",
    "{{}}",
    "(1,)",
    "lambda: 0",
    "x.y",
    "x[0]",
    "not 4",
    "--4",
    "4 if 4 else 4",
    "*a",
    "**a",
    "(x:=2)",
]
DEEP = ["[0]", "()", ".a", "**4", " if 4 else 4"]
MARKS = ["+", " + ", "+ ", "-", " ", ",", "+\n", "\t+ ", "++", "#", "\u00a0+ "]
LETTERS = "kivsnap(=2,)+ 'q\"\n[*.{\\\0\ud800é–ｋ"


def spec(rng: random.Random) -> str:
    """A spec of one of these kinds, chosen by `rng`."""
    kind = rng.random()
    if kind < 0.72:
        parts = [_stage(rng) for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 5]))]
        text = parts[0]
        for part in parts[1:]:
            text += (" + " if rng.random() < 0.85 else rng.choice(MARKS)) + part
        return _damaged(text, rng) if rng.random() < 0.25 else text
    if kind < 0.8:
        return "".join(rng.choices(LETTERS, k=rng.randrange(60)))
    if kind < 0.86:
        return f"int(bits={rng.choice('-~+([{') * rng.choice([2, 50, 300, 3000, 9000])}4"
    if kind < 0.92:
        return rng.choice(["+", "+\n"]).join([rng.choice(["streaming", "knorm", "x"])] * rng.choice([2, 30, 40, 3000]))
    if kind < 0.96:
        return f"int(bits={rng.choice('4x')}{rng.choice(DEEP) * rng.choice([1, 40, 900])})"
    return rng.choice(["a", "'", "(", "\\", ".", "0", "é", "\0"]) * rng.choice([1, 199, 201, 10**4, 10**6])


def _stage(rng: random.Random) -> str:
    known = stages()
    name = rng.choice(sorted(known))
    cls = known[name]
    hints = typing.get_type_hints(cls)
    chosen = rng.sample([f.name for f in fields(cls)], k=min(len(fields(cls)), rng.choice([0, 0, 1, 1, 2, 3])))
    arguments = [f"{argument}={_value(str(hints[argument]), rng)}" for argument in chosen]
    if rng.random() < 0.03:
        arguments.append(rng.choice(["bitz=2", "4", "keep=0.5", "keep=0.5"]))
    if rng.random() < 0.04:
        name = name[:-1] + rng.choice("abz")
    return f"{name}({', '.join(arguments)})" if arguments or rng.random() < 0.5 else name


def _value(hint: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        return rng.choice([*HUGE, *TEXTS, *ODD])
    if "bool" in hint:
        return rng.choice(["true", "false"])
    if "int" in hint or "float" in hint:
        return rng.choice([*NUMBERS, str(rng.randrange(1, 300)), repr(rng.random())])
    return rng.choice([*WORDS, *TEXTS])


def _damaged(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(["", rng.choice(LETTERS), text[at:] * 2]) + text[at + rng.randrange(2) :]
