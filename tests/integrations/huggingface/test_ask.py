"""Questions about a text that is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_folder
import torch

import kvcomp
from kvcomp import CompressedCache, KvcompError
from kvcomp.integrations.huggingface.ask import parts
from kvcomp.integrations.huggingface.models import load_model

CONTEXT = "The grass is green. The sky is blue. " * 12
QUESTIONS = ["The sky is", "Which colour has the grass?"]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(str(tiny_folder.save(tmp_path_factory.mktemp("model"))), device="cpu")


@pytest.fixture(params=[False, True], ids=["plain", "chat"])
def tokenizer(request: pytest.FixtureRequest, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(loaded[1], "chat_template", TEMPLATE if request.param else None)
    return loaded[1]


def test_answers_are_those_of_whole_prompts(loaded: tuple[Any, Any], tokenizer: Any) -> None:
    model = loaded[0]
    found = kvcomp.ask(model, tokenizer, CONTEXT, QUESTIONS, "none", max_new_tokens=6)
    for question, text in zip(QUESTIONS, found.texts, strict=True):
        whole = f"{CONTEXT}\n\n{question}"
        if tokenizer.chat_template:
            whole = f"[user]{whole}[end][assistant]"
        before = parts(tokenizer, CONTEXT).before
        rest = whole[len(tokenizer.decode(before[0])) :] + ("" if tokenizer.chat_template else "\n")
        ids = torch.cat([before, tokenizer(rest, return_tensors="pt").input_ids], 1)
        assert tokenizer.decode(ids[0]) == whole + ("" if tokenizer.chat_template else "\n")
        out = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_the_context_is_read_once(loaded: tuple[Any, Any], tokenizer: Any, tmp_path: Path) -> None:
    model = loaded[0]
    fed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    n = parts(tokenizer, CONTEXT).before.shape[1]
    try:
        first = kvcomp.ask(model, tokenizer, CONTEXT, QUESTIONS[0], "kivi(bits=4)", max_new_tokens=2)
        assert fed[0] == n
        assert max(fed[1:]) < n
        held = first.cache.get_seq_length()
        del fed[:]
        again = kvcomp.ask(model, tokenizer, CONTEXT, QUESTIONS, cache=first.cache, max_new_tokens=2)
        assert max(fed) < n
    finally:
        hook.remove()
    assert again.cache is first.cache
    assert again.texts[0] == first.texts[0]
    assert first.cache.get_seq_length() == held == n
    first.cache.save(tmp_path / "cache")
    loaded_again = CompressedCache.load(tmp_path / "cache", model)
    assert kvcomp.ask(model, tokenizer, CONTEXT, QUESTIONS, cache=loaded_again, max_new_tokens=2).texts == again.texts
    empty = CompressedCache("kivi(bits=4)", model)
    assert kvcomp.ask(model, tokenizer, CONTEXT, QUESTIONS, cache=empty, max_new_tokens=2).texts == again.texts


def test_a_policy_that_repeats_the_context(loaded: tuple[Any, Any], tokenizer: Any) -> None:
    found = kvcomp.ask(
        loaded[0], tokenizer, CONTEXT, QUESTIONS, "kvzip(keep=0.5) + int(bits=4) + window(recent=16)", max_new_tokens=2
    )
    assert len(found.texts) == 2
    assert found.cache.memory().held < 0.7 * found.cache.memory().dense  # half of the tokens, exact


def test_what_cannot_be_asked(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    cache = kvcomp.ask(model, tokenizer, CONTEXT, "a", "none", max_new_tokens=1).cache
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((CONTEXT, []), {}, r"questions=\[\]"),
        ((CONTEXT, ["a", " "]), {}, "questions=' '"),
        ((CONTEXT, ["a", 3]), {}, "questions=3"),
        (("  ", "a"), {}, "context='  '"),
        ((None, "a"), {}, "context=None"),
        ((CONTEXT, "a", "none"), {"cache": cache}, "a stack and a cache"),
        ((CONTEXT[:40], "a"), {"cache": cache}, "the cache holds .* tokens and this context has"),
        ((CONTEXT, "a"), {"chat": True}, "no chat template"),
    ]
    for args, options, said in cases:
        with pytest.raises(KvcompError, match=said):
            kvcomp.ask(model, tokenizer, *args, **options)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(KvcompError, match="chat=False"):
        kvcomp.ask(model, tokenizer, CONTEXT, "a")
