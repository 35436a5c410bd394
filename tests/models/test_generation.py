"""Transformers' own tests of generation and caches, restated: `CompressedCache` where they take their default cache.

After transformers 5.23's GenerationTesterMixin (tests/generation/test_utils.py) and tests/utils/test_cache_utils.py, on
ten architectures. `INAPPLICABLE` holds the tests that do not apply to a model, with the reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from situations import Prompt, tokens
from tiny import tiny_model
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kvcomp import CompressedCache
from kvcomp.integrations.huggingface.layer import CompressedLayer

ARCHITECTURES = (
    *("llama", "qwen3", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3", "qwen3_next", "opt", "mixtral"),
    "phi3, no window",
)
STATEFUL = "transformers refuses drafts for models with recurrent states, whatever the cache"
INAPPLICABLE = {
    ("assisted_decoding", "qwen3_next"): STATEFUL,
    ("assisted_decoding_by_another_model", "qwen3_next"): STATEFUL,
    ("assisted_decoding_with_samples", "qwen3_next"): STATEFUL,
    ("prompt_lookup", "qwen3_next"): STATEFUL,
}
COMPILED = ("llama", "gemma3_text", "qwen3_next")  # torch.compile takes long: one of full, sliding and recurrent layers
SCORES = {"repetition_penalty": 1.2, "remove_invalid_values": True, "no_repeat_ngram_size": 2, "suppress_tokens": [0]}
PADDED = Prompt.padded()
ONE = Prompt(input_ids=tokens(1, 90))

pytestmark = pytest.mark.filterwarnings("ignore")


class Pair:
    """A model with transformers' own cache, and the same with ours."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.models: dict[tuple[bool, str | None], PreTrainedModel] = {}

    def model(self, ours: bool, implementation: str | None = None) -> PreTrainedModel:
        key = ours, implementation
        if key not in self.models:
            self.models[key] = tiny_model(self.name, implementation)
        return self.models[key]

    def cache(self, ours: bool, implementation: str | None = None) -> Any:
        model = self.model(ours, implementation)
        return CompressedCache("none", model) if ours else DynamicCache(config=model.config)

    def run(self, ours: bool, prompt: Prompt, new: int = 3, implementation: str | None = None, **options: Any) -> Any:
        """A greedy generation of `new` tokens, with its logits; options go to `generate`."""
        asked: dict[str, Any] = {
            "past_key_values": self.cache(ours, implementation),
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            "max_new_tokens": new,
            "min_new_tokens": new,
            **options,
        }
        with torch.no_grad():
            return self.model(ours, implementation).generate(**prompt, **asked)

    def both(self, prompt: Prompt, new: int = 3, seed: int = 0, **options: Any) -> tuple[Any, Any]:
        """(ours, theirs)"""
        results = []
        for ours in (True, False):
            torch.manual_seed(seed)
            results.append(self.run(ours, prompt, new, **options))
        return results[0], results[1]


def same(ours: Any, theirs: Any) -> None:
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


RESTATED: dict[str, Callable[[Pair], None]] = {}


def restated(test: Callable[[Pair], None]) -> Callable[[Pair], None]:
    RESTATED[test.__name__] = test
    return test


# -- generation


@restated
def greedy(pair: Pair) -> None:
    same(*pair.both(PADDED, **SCORES))


@restated
def greedy_with_all_outputs(pair: Pair) -> None:
    """Hidden states and attentions of every step, under eager attention."""
    asked = {"output_hidden_states": True, "output_attentions": True, "output_scores": True}
    ours, theirs = pair.both(PADDED, implementation="eager", **asked, **SCORES)
    same(ours, theirs)
    assert isinstance(ours.past_key_values, Cache)
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None) == (y is None)
            if y is not None:
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@restated
def sampling(pair: Pair) -> None:
    same(*pair.both(PADDED, do_sample=True, num_return_sequences=2, top_k=10, top_p=0.7, temperature=0.7, **SCORES))


@restated
def beam_search(pair: Pair) -> None:
    beams = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": False}
    ours, theirs = pair.both(PADDED, 6, output_scores=True, **beams, **SCORES)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-4, rtol=1e-4)


@restated
def beam_sampling(pair: Pair) -> None:
    ours, theirs = pair.both(PADDED, 6, num_beams=2, do_sample=True, top_k=10)
    assert ours.sequences.tolist() == theirs.sequences.tolist()


@restated
def beams_that_reorder_the_cache(pair: Pair) -> None:
    ours, theirs = pair.both(ONE, 8, num_beams=4, num_return_sequences=4, output_scores=True)
    assert any(len(set(beam)) > 1 for beam in ours.beam_indices.tolist())
    assert ours.sequences.tolist() == theirs.sequences.tolist()


@restated
def no_input_ids(pair: Pair) -> None:
    same(*pair.both(Prompt(), bos_token_id=1))


@restated
def embeddings_as_input(pair: Pair) -> None:
    embed = pair.model(False).get_input_embeddings()
    given = Prompt(inputs_embeds=embed(PADDED["input_ids"]).detach(), attention_mask=PADDED["attention_mask"])
    ours, theirs = pair.both(given)
    same(ours, theirs)
    from_ids = pair.run(True, PADDED)
    assert from_ids.sequences[:, PADDED["input_ids"].shape[1] :].tolist() == ours.sequences.tolist()


@restated
def embeddings_that_differ_give_other_logits(pair: Pair) -> None:
    width = pair.model(True).get_input_embeddings().weight.shape[1]
    logits = []
    for seed in (0, 1):
        random = torch.randn(2, 80, width, generator=torch.Generator().manual_seed(seed))
        logits.append(torch.stack(pair.run(True, Prompt(inputs_embeds=random)).logits))
    assert not torch.allclose(logits[0], logits[1])


@restated
def continuing_from_a_cache(pair: Pair) -> None:
    whole = pair.run(True, ONE, 4)
    part = pair.run(True, ONE, 3)
    rest = pair.run(True, Prompt(input_ids=part.sequences), 1, past_key_values=part.past_key_values)
    assert rest.sequences.tolist() == whole.sequences.tolist()
    torch.testing.assert_close(rest.logits[-1], whole.logits[-1], atol=1e-4, rtol=1e-4)


@restated
def continuing_from_embeddings(pair: Pair) -> None:
    embed = pair.model(True).get_input_embeddings()
    prompt = embed(ONE["input_ids"]).detach()
    whole = pair.run(True, Prompt(inputs_embeds=prompt), 6)
    part = pair.run(True, Prompt(inputs_embeds=prompt), 3)
    longer = torch.cat([prompt, embed(part.sequences).detach()], 1)
    rest = pair.run(True, Prompt(inputs_embeds=longer), 3, past_key_values=part.past_key_values)
    assert torch.cat([part.sequences, rest.sequences], 1).tolist() == whole.sequences.tolist()


@restated
def logits_of_the_last_token_only(pair: Pair) -> None:
    same(*pair.both(ONE, logits_to_keep=1))


@restated
def assisted_decoding(pair: Pair) -> None:
    """By a copy of the model: every draft is right."""
    assistant = tiny_model(pair.name)
    assistant.generation_config.num_assistant_tokens = 3
    ours, theirs = pair.both(ONE, 8, assistant_model=assistant)
    same(ours, theirs)
    assert pair.run(False, ONE, 8).sequences.tolist() == ours.sequences.tolist()


@restated
def assisted_decoding_by_another_model(pair: Pair) -> None:
    assistant = tiny_model(pair.name)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.mul_(0.9)
    assistant.generation_config.num_assistant_tokens = 3
    same(*pair.both(ONE, 8, assistant_model=assistant))


@restated
def assisted_decoding_with_samples(pair: Pair) -> None:
    assistant = tiny_model(pair.name)
    assistant.generation_config.num_assistant_tokens = 2
    ours, theirs = pair.both(ONE, 6, seed=1, assistant_model=assistant, do_sample=True)
    assert ours.sequences.tolist() == theirs.sequences.tolist()


@restated
def prompt_lookup(pair: Pair) -> None:
    repeated = Prompt(input_ids=tokens(1, 30).repeat(1, 3))
    ours, theirs = pair.both(repeated, 8, prompt_lookup_num_tokens=2)
    same(ours, theirs)
    assert pair.run(False, repeated, 8).sequences.tolist() == ours.sequences.tolist()


@restated
def compiled_forwards(pair: Pair) -> None:
    model = tiny_model(pair.name)
    cache = CompressedCache("none", model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    pair.models = {(True, None): model, **{key: m for key, m in pair.models.items() if key != (True, None)}}
    same(pair.run(True, ONE, 3, past_key_values=cache), pair.run(False, ONE, 3))


# -- caches


@restated
def left_padding_changes_nothing(pair: Pair) -> None:
    model, last = pair.model(True), []
    ids = ONE["input_ids"]
    for padding in (0, 32):
        padded = torch.cat([ids.new_zeros(1, padding), ids], 1)
        mask = torch.cat([ids.new_zeros(1, padding), torch.ones_like(ids)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = pair.cache(True)
        with torch.no_grad():
            first = model(padded, attention_mask=mask, position_ids=positions, past_key_values=cache)
            more = torch.cat([mask, mask.new_ones(1, 1)], 1)
            step = {"attention_mask": more, "position_ids": positions[:, -1:] + 1}
            second = model(tokens(1, 1), past_key_values=cache, **step)
        last.append(torch.cat([first.logits[:, -1], second.logits[:, -1]]))
    torch.testing.assert_close(*last, atol=1e-4, rtol=1e-4)


@restated
def format_of_the_cache(pair: Pair) -> None:
    """Lengths, and keys and values [B, H, N, D] in every attention layer, as transformers' own."""
    outputs = []
    for ours in (True, False):
        with torch.no_grad():
            outputs.append(pair.model(ours)(**PADDED, past_key_values=pair.cache(ours), use_cache=True))
    ours, theirs = (output.past_key_values for output in outputs)
    assert len(ours) == len(theirs) == pair.model(True).config.get_text_config().num_hidden_layers
    assert ours.get_seq_length() == theirs.get_seq_length() == PADDED["input_ids"].shape[1]
    for mine, own in zip(ours.layers, theirs.layers, strict=True):
        if getattr(own, "keys", None) is not None:
            assert mine.keys.shape == own.keys.shape
            assert mine.values.shape == own.values.shape


@restated
def update_and_read_back(pair: Pair) -> None:
    ours, theirs = pair.cache(True), pair.cache(False)
    at = next(i for i, layer in enumerate(ours.layers) if isinstance(layer, CompressedLayer))
    generator = torch.Generator().manual_seed(0)
    for n in (8, 1):
        keys, values = (torch.rand(2, 2, n, 16, generator=generator) for _ in range(2))
        found, expected = ours.update(keys, values, at), theirs.update(keys, values, at)
    for mine, own in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[:], own)
    torch.testing.assert_close(ours.layers[at].keys[:], theirs.layers[at].keys)
    torch.testing.assert_close(ours.layers[at].values[:], theirs.layers[at].values)


@restated
def a_prefix_copied_for_several_prompts(pair: Pair) -> None:
    said = []
    for ours in (True, False):
        cache = pair.cache(ours)
        with torch.no_grad():
            pair.model(ours)(**ONE, past_key_values=cache)
        for n in (3, 7, 1):
            prompt = Prompt(input_ids=torch.cat([ONE["input_ids"], tokens(1, n, seed=n)], 1))
            said.append(pair.run(ours, prompt, 4, past_key_values=copy.deepcopy(cache)).sequences.tolist())
    assert said[:3] == said[3:]


@restated
def a_long_sampled_text(pair: Pair) -> None:
    ours, theirs = pair.both(Prompt(input_ids=ONE["input_ids"][:, :13]), 70, do_sample=True)
    assert ours.sequences.tolist() == theirs.sequences.tolist()


@restated
def more_left_padding_gives_the_same_tokens(pair: Pair) -> None:
    ids = ONE["input_ids"]
    padded = torch.cat([ids.new_zeros(1, 42), ids], 1)
    plain = pair.run(True, ONE, 6).sequences[:, ids.shape[1] :]
    more = pair.run(True, Prompt(input_ids=padded, attention_mask=(padded != 0).long()), 6)
    assert more.sequences[:, padded.shape[1] :].tolist() == plain.tolist()


@restated
def reordered_rows(pair: Pair) -> None:
    last = []
    for ours in (True, False):
        model, cache = pair.model(ours), pair.cache(ours)
        with torch.no_grad():
            model(tokens(4, 90), past_key_values=cache)
            cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
            last.append(model(tokens(4, 1, seed=3), past_key_values=cache).logits)
    torch.testing.assert_close(*last, atol=1e-4, rtol=1e-4)


@restated
def a_mask_of_four_dimensions(pair: Pair) -> None:
    """Three continuations of one prefix, side by side in a row."""
    last = []
    implementation = "eager" if pair.name == "gpt_oss" else None
    ids = tokens(1, 12)
    for ours in (True, False):
        model, cache = pair.model(ours, implementation), pair.cache(ours, implementation)
        mask = torch.zeros(1, 1, 3, 12)
        mask[..., 9:] = torch.finfo(torch.float32).min
        mask[0, 0, :, 9:].diagonal().zero_()
        with torch.no_grad():
            model(ids[:, :9], past_key_values=cache)
            positions = torch.full((1, 3), 9)
            step = model(ids[:, 9:], attention_mask=mask, position_ids=positions, past_key_values=cache)
        last.append(step.logits)
    torch.testing.assert_close(*last, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.mark.parametrize("name", RESTATED)
def test_restated(pair: Pair, name: str) -> None:
    if name == "compiled_forwards" and pair.name not in COMPILED:
        return
    if (name, pair.name) in INAPPLICABLE:
        with pytest.raises((ValueError, NotImplementedError, AttributeError, RuntimeError)):  # with their cache as well
            _theirs_alone(pair, name)
        return
    RESTATED[name](pair)


def _theirs_alone(pair: Pair, name: str) -> None:
    """Run a test with transformers' own cache in place of ours."""

    class Theirs(Pair):
        def cache(self, ours: bool, implementation: str | None = None) -> Any:
            return DynamicCache(config=self.model(ours, implementation).config)

    RESTATED[name](Theirs(pair.name))


def test_the_table_of_what_does_not_apply_names_tests() -> None:
    assert {name for name, _ in INAPPLICABLE} <= set(RESTATED)
    assert {architecture for _, architecture in INAPPLICABLE} <= set(ARCHITECTURES)
    assert len(RESTATED) == 25
    assert all(inspect.signature(test).parameters.keys() == {"pair"} for test in RESTATED.values())


def test_a_wrong_cache_would_fail() -> None:
    """The comparison sees the loss of one page."""
    pair = Pair("llama")
    theirs = pair.run(False, ONE, 3)

    class Lossy(Pair):
        def cache(self, ours: bool, implementation: str | None = None) -> Any:
            return CompressedCache("streaming(sinks=4, recent=16)", self.model(ours, implementation))

    with pytest.raises(AssertionError):
        same(Lossy("llama").run(True, ONE, 3), theirs)
