"""What a run measures, whichever engine answers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from kvcomp import Stack
from kvcomp.benchmarks.results import RunError
from kvcomp.benchmarks.tasks import GROUPS, expand, takes_chat
from kvcomp.integrations.loading import DEFAULT, DTYPES, Loading, option
from kvcomp.text import quote

HUGGING_FACE, VLLM = ENGINES = ("huggingface", "vllm")
MOST = {"samples": 100_000, "max-new-tokens": 2**31, "prefill-chunk": 2**31, "context": 2**40}
SEEDS = 2**53
UNKNOWN_TO_VLLM = ("device", "device_map", "attn_implementation", "quantization")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    max_new_tokens: caps the new tokens of every task, and the scored ones of a text; None leaves each task its own.
    data: where the texts of tasks come from, see `kvcomp.benchmarks.data`.
    chat: put prompts into the model's chat template, except LongBench's few-shot and code tasks, and texts.
    prefill_chunk: prompts enter every stack by so many tokens, which attend to what it kept; None: as the stack asks.
    engine: what answers, one of `ENGINES`.
    context_first: compress what stands before the question, which every stack reads afterwards. Otherwise prompts enter
        whole, and policies see the question.
    loading: how the model is loaded.
    named: the tasks that were asked for by their own name, and not by a group's.
    """

    model: str
    tasks: tuple[str, ...]
    contexts: tuple[int, ...]
    samples: int
    stacks: tuple[str, ...]
    seed: int = 0
    max_new_tokens: int | None = None
    data: str | None = None
    chat: bool = False
    prefill_chunk: int | None = None
    engine: str = HUGGING_FACE
    loading: Loading = DEFAULT
    context_first: bool = False
    named: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise RunError(f"engine: {quote(self.engine)} is none of {', '.join(ENGINES)}.")
        if self.engine == VLLM:
            if self.loading.dtype not in (None, DTYPES[0]):
                raise RunError(f"dtype: with --engine {VLLM} models run in {DTYPES[0]}, not in {self.loading.dtype}.")
            self.loading.refuse(UNKNOWN_TO_VLLM, f"--engine {VLLM} decides that by itself")
        object.__setattr__(self, "named", tuple(name for name in self.tasks if name not in GROUPS))
        tasks = expand(self.tasks, self.data)
        compared = [task for task in tasks if task in GROUPS["fidelity"]]
        if self.chat and not any(map(takes_chat, tasks)):
            raise RunError(
                f"chat: no prompt of {', '.join(tasks)} is put into a chat template: leave out --chat, or choose tasks "
                "of ruler or longbench."
            )
        if self.engine == VLLM and self.context_first:
            raise RunError(
                f"context-first: --engine {VLLM} compresses a prompt when all of it is in: choose --engine "
                f"{HUGGING_FACE}, or leave out --context-first."
            )
        if self.engine == VLLM and compared:
            raise RunError(
                f"tasks: {compared[0]} compares whole distributions, which vLLM does not give out: choose "
                f"--engine {HUGGING_FACE}, or a task of perplexity."
            )
        whole = [("samples", self.samples), ("max-new-tokens", self.max_new_tokens)]
        whole += [("prefill-chunk", self.prefill_chunk), *(("context", context) for context in self.contexts)]
        for argument, value in whole:
            if value is not None and value < 1:
                raise RunError(f"{argument}: {value} is less than 1.")
            if value is not None and value > MOST[argument]:
                raise RunError(f"{argument}: {quote(value)} is more than {MOST[argument]}.")
        if abs(self.seed) > SEEDS:
            raise RunError(f"seed: {quote(self.seed)} is not within +-{SEEDS}.")
        for argument, values in (("task", tasks), ("context", self.contexts), ("stack", self.stacks)):
            if not values:
                raise RunError(f"{argument}: at least one is needed.")
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "contexts", tuple(sorted(set(self.contexts))))
        stacks: dict[str, str] = {}  # by hash: files of other names may have the same content
        for stack in map(Stack.parse, self.stacks):
            stacks.setdefault(stack.hash, str(stack))
        object.__setattr__(self, "stacks", tuple(stacks.values()))


def flat(settings: Settings) -> dict[str, Any]:
    """Settings by name, and beside them the options of loading: the dtype always, others where they are given."""
    own = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "loading"}
    return own | {"dtype": settings.loading.dtype} | settings.loading.changed()


def as_options(settings: Settings) -> dict[str, Any]:
    """The options of `kvcomp bench` that are these settings, as a file for `--config` has them."""
    options: dict[str, Any] = {"model": settings.model, "tasks": ",".join(settings.tasks)}
    options |= {"context": list(settings.contexts), "stack": list(settings.stacks)}
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.name in ("model", "tasks", "contexts", "stacks", "named", "loading"):
            continue
        if value != f.default or f.name == "seed":
            options[f.name.replace("_", "-")] = value
    return options | {option(name): value for name, value in settings.loading.changed().items()}


def end_tokens(configured: int | list[int] | None, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those that the model's generation config names, and the tokenizer's."""
    named = configured if isinstance(configured, list) else [configured]
    return {token for token in (tokenizer.eos_token_id, *named) if token is not None}
