"""A record per sample and stack, the configuration of a run, and what either may hold."""

from __future__ import annotations

import typing
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Annotated, Any, TypedDict

from kvcomp.benchmarks.schema import NAME, Range, SchemaError, check
from kvcomp.errors import KvcompError
from kvcomp.fingerprint import Fingerprint
from kvcomp.text import quote

# What a score is: right answers; nats per token, the lower the better; 1 - TVD to the dense distributions.
ACCURACY, NLL, FIDELITY = "accuracy", "nll", "fidelity"
SCORES = {ACCURACY: Range(0, 1), NLL: Range(0, 700), FIDELITY: Range(0, 1)}  # e^700 is a float

Name = Annotated[str, NAME]
Count = Annotated[int, Range(1, 2**40)]
Natural = Annotated[int, Range(0, 2**40)]
Bytes = Annotated[int, Range(1, 2**60)]
Seconds = Annotated[float, Range(0, 1e9)]


class RunError(KvcompError):
    """A run that cannot start, continue or be read as asked."""


@dataclass(frozen=True)
class Record:
    """One sample answered with one stack. Bytes: held at the end of the answer, read by its last step.

    Raises:
        RunError: a value that no run measures; the message names the field, the value and what would be accepted.
    """

    task: Name
    context: Count
    index: Natural
    stack: Name
    hash: Name
    score: float
    prediction: str
    references: list[str]
    depth: Annotated[float, Range(0, 1)] | None
    tags: list[Name]  # groups of its task that the sample belongs to
    origin: str  # the texts that the prompt was made of
    prompt_tokens: Count
    new_tokens: Natural
    effective_bits: Annotated[float, Range(0, 1e9)]
    held: Bytes
    held_dense: Bytes
    read: Bytes
    read_dense: Bytes
    ms_per_token: Seconds  # median over the decode steps
    prefill_s: Seconds  # the dense prefill that stacks share; 0 for one that entered alone
    metric: Name = ACCURACY
    prefill_own_s: Seconds | None = None  # what this stack added, or all of its own; None: it is in prefill_s, of all
    peak: Annotated[int, Range(0, 2**60)] | None = None  # held when decoding began, and what memory grew by at most
    # of fidelity, for each scored token: KL divergence in nats, 1 - TVD, and 1 where the most likely token is the same
    kl: list[Annotated[float, Range(0, 1e9)]] | None = None
    overlap: list[Annotated[float, Range(0, 1)]] | None = None
    top1: list[Annotated[int, Range(0, 1)]] | None = None
    classes: list[str] | None = None  # of a classification: the answers to choose from

    def __post_init__(self) -> None:
        try:
            check(self.metric, str, "metric")
            if self.metric not in SCORES:
                raise SchemaError(f"metric is {quote(self.metric)}, expected {', '.join(SCORES)}")
            for name, hint in _hints().items():
                rule = SCORES[self.metric] if name == "score" else None
                object.__setattr__(self, name, check(getattr(self, name), hint, name, rule))
            if self.metric == FIDELITY:
                counts = [len(found or ()) for found in (self.kl, self.overlap, self.top1)]
                if not counts[0] == counts[1] == counts[2] > 0:
                    raise SchemaError(f"kl, overlap and top1 have {counts} values, expected one a scored token in each")
        except SchemaError as error:
            where = ", ".join(quote(value, 60) for value in (self.task, self.context, self.index, self.stack))
            raise RunError(f"record of {where}: {error}") from error

    @property
    def key(self) -> tuple[str, int, int, str]:
        return (self.task, self.context, self.index, self.hash)

    @classmethod
    def of(cls, values: Any) -> Record:
        """The record of a line's values.

        Raises:
            SchemaError, RunError: they are not those of a record.
        """
        if type(values) is not dict:
            raise SchemaError("not a whole record: expected an object")
        known = {field.name: field.default is MISSING for field in fields(cls)}
        missing = [name for name, required in known.items() if required and name not in values]
        other = [name for name in values if name not in known]
        if missing or other:
            what = f"it has no {missing[0]}" if missing else f"{other[0]!r} is no field of it"
            raise SchemaError(f"not a whole record: {what}")
        return cls(**values)


@cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Record, include_extras=True)


class Settings(TypedDict, total=False):
    """`kvcomp.benchmarks.settings.Settings` as a configuration holds them; older versions had fewer."""

    model: str
    tasks: list[Name]
    contexts: list[Count]
    samples: Count
    stacks: list[Name]
    seed: Annotated[int, Range(-(2**53), 2**53)]
    max_new_tokens: Count | None
    chat: bool
    prefill_chunk: Count | None
    dtype: Name | None
    device: Name
    device_map: Name
    attn_implementation: Name
    quantization: Name
    revision: Name
    trust_remote_code: bool
    context_first: bool


class Machine(TypedDict, total=False):
    """Where a run was measured."""

    cpu: str | None
    cores: Natural | None
    threads: Natural | None
    gpu: str | None


class Model(TypedDict):
    """The fingerprint of the model that answered; weights: None where they were not available."""

    name: str
    config: Name
    weights: Name | None


class LeftOut(TypedDict):
    """A task that does not fit a context, and why."""

    task: Name
    context: Count
    reason: str


class _Config(TypedDict):
    settings: Settings
    versions: dict[str, str]
    machine: Machine


class Config(_Config, total=False):
    """`config.json` of a run; older versions wrote neither `model` nor `left_out`."""

    command: str
    data: dict[str, str]
    model: Model
    left_out: list[LeftOut]
    workers: list[Count]  # how many processes measured it at once, one after the other; absent: one
    shard: Name  # "i/n", of a folder that holds a part of a run


def fingerprint_of(config: dict[str, Any]) -> Fingerprint | None:
    """The model that a configuration notes; None in those of older versions."""
    noted = config.get("model")
    return None if noted is None else Fingerprint(noted["name"], noted["config"], noted["weights"])


def left_out(config: dict[str, Any]) -> list[str]:
    """A line for each task of a configuration that does not fit a context."""
    return [
        f"left out: {left['task']} at {left['context']} tokens: {left['reason']}" for left in config.get("left_out", [])
    ]


def remarks(config: dict[str, Any]) -> list[str]:
    """What a report says of how a run was measured: tasks left out, a part of a run, several processes at once."""
    found = left_out(config)
    if "shard" in config:
        found.append(f"shard {config['shard']} of a run: its other shards are not in this report")
    if workers := config.get("workers"):
        found.append(f"measured by {' and '.join(map(str, workers))} processes at once, which its times are of")
    return found


def config_of(values: Any) -> dict[str, Any]:
    """The configuration, checked.

    Raises:
        SchemaError: something is missing, or is not what it should be.
    """
    found: dict[str, Any] = check(values, Config, "")
    return found
