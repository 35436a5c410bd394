"""What a model is put through with `CompressedCache`, and how that compares with transformers' own cache.

Every situation gives a verdict: "equal"; "refused: ..." for a KvcompError; "n/a: ..." where transformers' own cache
fails, too; "wrong: ..." and "crash: ..." for the rest.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kvcomp import CompressedCache, KvcompError, KvcompWarning

WINDOW = "window(sinks=2, recent=8)"
EXACT = f"none + {WINDOW}"
LOSSY = {  # and the least correlation with the dense logits that is no sign of a wrong cache
    "int8": (f"int(bits=8) + {WINDOW}", 0.9),
    "kivi4": (f"kivi(bits=4, group=16) + {WINDOW}", 0.8),
    "snapkv + int8": (f"snapkv(keep=0.8, window=8) + int(bits=8) + {WINDOW}", 0.3),
    "int8 + quest": (f"int(bits=8) + quest(keep=0.5) + {WINDOW}", 0.6),
}
TOLERANCE = 1e-3  # of logits; the differences of rounding are below 2e-5
SENSITIVE = 10 * TOLERANCE  # logits change by this where most of the prompt is hidden: a wrong cache is seen
LENGTHS = (150, 116)
HIDDEN = 110  # columns that the check of sensitivity hides
NEW = 5


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(seed))


class Forced(LogitsProcessor):
    """Has a generation say the given sequences [B, N]."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -1e9)
        return only.scatter_(1, self.sequences[:, ids.shape[1], None], 0.0)


class Prompt(dict[str, Any]):
    """What `generate` is given: input_ids, attention_mask, and whatever else the model reads."""

    @classmethod
    def padded(cls) -> Prompt:
        """A batch of two, padded on the left."""
        ids = tokens(2, LENGTHS[0], seed=2)
        mask = torch.ones_like(ids)
        ids[1, : LENGTHS[0] - LENGTHS[1]] = 0
        mask[1, : LENGTHS[0] - LENGTHS[1]] = 0
        return cls(input_ids=ids, attention_mask=mask)

    def hidden(self) -> Prompt:
        """The same, with most of its tokens hidden."""
        mask = self["attention_mask"].clone()
        mask[:, :HIDDEN] = 0
        return Prompt(self, attention_mask=mask)


def generate(model: PreTrainedModel, prompt: Prompt, cache: Any, new: int = NEW, **options: Any) -> Any:
    """Greedy generation with its logits. The pad token is never said: a next turn would take it for padding."""
    with torch.no_grad():
        return model.generate(
            **deepcopy(prompt),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=new,
            return_dict_in_generate=True,
            output_logits=True,
            use_cache=True,
            suppress_tokens=[0],
            **options,
        )


Make = Callable[[PreTrainedModel], Any]


def dense_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def ours(stack: str = EXACT) -> Make:
    return lambda model: CompressedCache(stack, model)


def from_config(model: PreTrainedModel) -> CompressedCache:
    return CompressedCache(EXACT, model.config)


def two_turns(model: PreTrainedModel, prompt: Prompt, make: Make) -> Any:
    cache = make(model)
    first = generate(model, Prompt(input_ids=tokens(1, 100)), cache, 3)
    return generate(model, Prompt(input_ids=torch.cat([first.sequences, tokens(1, 20, seed=5)], 1)), cache, 4)


def looked_up(model: PreTrainedModel, prompt: Prompt, make: Make) -> Any:
    repeated = Prompt(input_ids=tokens(1, 40).repeat(1, 3))
    return generate(model, repeated, make(model), 8, prompt_lookup_num_tokens=3)


def chunked(model: PreTrainedModel, prompt: Prompt, make: Make) -> Any:
    return generate(model, prompt, make(model), prefill_chunk_size=64)


def beams(model: PreTrainedModel, prompt: Prompt, make: Make) -> Any:
    return generate(model, prompt, make(model), num_beams=2)


def padded(model: PreTrainedModel, prompt: Prompt, make: Make) -> Any:
    return generate(model, prompt, make(model))


TEXT: dict[str, Callable[[PreTrainedModel, Prompt, Make], Any]] = {
    "two turns": two_turns,
    "chunked prefill": chunked,
    "beams": beams,
    "prompt lookup": looked_up,
}
WITH_IMAGES = {name: TEXT[name] for name in ("chunked prefill", "beams")}


def difference(a: Any, b: Any) -> float:
    """The largest difference between the logits of two generations; nan where their number differs."""
    if len(a.logits) != len(b.logits):
        return float("nan")
    return max(float((x.float() - y.float()).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))


def compared(found: Any, expected: Any) -> str:
    same = found.sequences.tolist() == expected.sequences.tolist()
    apart = difference(found, expected)
    if same and apart <= TOLERANCE:
        return "equal"
    if found.get("sequences_scores") is not None and same:  # the order of beams may differ in what they did not keep
        scores = float((found.sequences_scores - expected.sequences_scores).abs().max())
        return "equal" if scores <= TOLERANCE else f"wrong: scores of beams differ by {scores:.1e}"
    return f"wrong: logits differ by {apart:.1e}{'' if same else ', and tokens differ'}"


def said(error: Exception) -> str:
    """The verdict on an exception."""
    if isinstance(error, KvcompError):
        return f"refused: {' '.join(str(error).split())}"
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"crash: {type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(at.filename).name}:{at.lineno})"


def attempt(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        return error


def verdict(found: Any, expected: Any) -> str:
    """Of generations, or of the exceptions that came instead."""
    if isinstance(expected, Exception):
        return "n/a: transformers' own cache fails, too"
    return said(found) if isinstance(found, Exception) else compared(found, expected)


def lossy_verdict(found: Any, expected: Any, least: float) -> str:
    """Of a generation that was forced to say what the dense one did."""
    if isinstance(found, Exception):
        return said(found)
    first = float((found.logits[0] - expected.logits[0]).abs().max())
    if not first <= TOLERANCE:
        return f"wrong: the first token's logits differ by {first:.1e}"
    a, b = (torch.cat([x.float().flatten() for x in each.logits[1:]]) for each in (found, expected))
    likeness = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    return "plausible" if likeness >= least else f"wrong: correlation {likeness:.3f} with the dense logits"


def kinds_of(cache: CompressedCache) -> dict[str, str]:
    """What became of the layers: "4 full" -> "compressed"; what is not compressed is transformers' own."""
    found: dict[str, int] = {}
    for layer in cache.layers:
        found[type(layer).__name__] = found.get(type(layer).__name__, 0) + 1
    return {name: str(count) for name, count in sorted(found.items())}


def holds_states(layer: Any) -> bool:
    """Whether a recurrent layer of transformers' own holds anything."""
    return any(isinstance(x, Tensor) for states in vars(layer).values() for x in _items(states))


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)


def examine(model: PreTrainedModel, prompt: Prompt, situations: dict[str, Any] = TEXT) -> dict[str, Any]:
    """All verdicts on a model: {"layers": ..., "warned": ..., "verdicts": {situation: verdict}}."""
    plain = deepcopy(model)  # never hooked
    cache = attempt(lambda: dense_cache(plain))
    base = attempt(lambda: generate(plain, prompt, cache)) if not isinstance(cache, Exception) else cache
    if isinstance(base, Exception):
        return {"verdicts": {"padded": f"n/a: transformers itself does not run it with a cache: {short(base)}"}}
    if not any(getattr(layer, "is_initialized", True) or holds_states(layer) for layer in cache.layers):
        return {"verdicts": {"padded": "n/a: the model does not use a cache that it is given"}}
    if not all(bool(x.isfinite().all()) for x in base.logits):
        return {"verdicts": {"padded": "n/a: the dense model's logits are not finite"}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = attempt(lambda: padded(model, prompt, ours()))
    warned = sorted({str(w.message) for w in caught if issubclass(w.category, KvcompWarning)})
    verdicts = {"padded": verdict(found, base)}
    result: dict[str, Any] = {"warned": warned, "verdicts": verdicts}
    constructed = attempt(lambda: CompressedCache(EXACT, model))
    if isinstance(constructed, KvcompError):
        return result
    if not isinstance(constructed, Exception) and not isinstance(found, KvcompError):
        result["layers"] = kinds_of(constructed)
    if not isinstance(found, Exception):
        result["pages"] = found.past_key_values.memory().parts.get("pages", 0)
    forced = {"logits_processor": LogitsProcessorList([Forced(base.sequences)])}
    hidden = attempt(lambda: generate(plain, prompt.hidden(), dense_cache(plain), **forced))
    result["sensitivity"] = 0.0 if isinstance(hidden, Exception) else difference(hidden, base)
    for name, situation in situations.items():
        expected = attempt(lambda run=situation: run(plain, prompt, dense_cache))
        verdicts[name] = verdict(attempt(lambda run=situation: run(model, prompt, ours())), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (stack, least) in LOSSY.items():
            run = attempt(lambda s=stack: generate(model, prompt, CompressedCache(s, model), **forced))
            verdicts[name] = lossy_verdict(run, base, least)
    # what else a hooked model does, and a config alone
    expected, again = attempt(lambda: chunked(plain, prompt, dense_cache)), chunked
    if isinstance(expected, Exception):
        expected, again = base, padded
    verdicts["hooked, DynamicCache"] = verdict(attempt(lambda: again(model, prompt, dense_cache)), expected)
    if not isinstance(constructed, Exception):
        constructed.detach()
    verdicts["detached"] = verdict(attempt(lambda: padded(model, prompt, dense_cache)), base)
    verdicts["from the config"] = verdict(attempt(lambda: padded(model, prompt, from_config)), base)
    verdicts["eager"] = eager(plain, prompt, base)
    return result


def eager(plain: PreTrainedModel, prompt: Prompt, base: Any) -> str:
    """The verdict under attn_implementation="eager"; `plain` is used up."""
    if plain.config._attn_implementation == "eager":
        return "equal"  # that was "padded"
    model = deepcopy(plain)
    for each in (plain, model):
        each.set_attn_implementation("eager")
    expected = attempt(lambda: padded(plain, prompt, dense_cache))
    return verdict(attempt(lambda: padded(model, prompt, ours())), expected)


def short(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:160]}"
