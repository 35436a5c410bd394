"""What kvcomp exports: complete, documented, typed in what it returns, and enough for the author of a method."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
import types
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_models import make

import kvcomp
from kvcomp import KIVI, CompressedCache, KvcompError, SnapKV, Stack, prefill
from kvcomp.stages import registry as reg
from kvcomp.stages.registry import stages

ROOT = Path(__file__).parents[2]
PUBLIC = ("kvcomp", "kvcomp.stages", "kvcomp.integrations.huggingface", "kvcomp.cache.blocks")
EXPORTS = [(module, name) for module in PUBLIC for name in importlib.import_module(module).__all__]
METHODS = sorted((ROOT / "examples" / "methods").glob("*.py"))
IDS = re.compile(r"\d{4}\.\d{4,5}")


def exported(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def test_every_stage_of_kvcomp_is_exported_by_its_own_name() -> None:
    ours = {cls.__name__: cls for cls in stages().values() if cls.__module__.startswith("kvcomp.")}
    found = {name: getattr(kvcomp, name) for name in kvcomp.__all__}
    assert {name: found.get(name) for name in ours} == ours
    assert len(ours) >= 32


@pytest.mark.parametrize("module", PUBLIC)
def test_what_type_checkers_are_told_is_what_is_imported(module: str) -> None:
    """The names declared under TYPE_CHECKING, those of the lazy imports and `__all__` agree, and so do their homes."""
    found = importlib.import_module(module)
    tree = ast.parse(inspect.getsource(found))
    declared = {}
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                base = "." * statement.level + (statement.module or "")
                declared |= {alias.name: base for alias in statement.names}
    assert found.__all__ == sorted(found.__all__, key=_isort)
    assert len(set(found.__all__)) == len(found.__all__)
    homes = getattr(found, "_HOMES", {})
    assert declared.keys() == homes.keys()
    assert declared.keys() - set(found.__all__) <= {"roundtrip"}  # by which `Stack.roundtrip` reaches the cache
    for name, base in declared.items():
        home = importlib.import_module(base, module)
        assert getattr(home, name) is getattr(found, name)
    assert set(found.__all__) <= set(dir(found))
    with pytest.raises(AttributeError, match="nonsense"):
        found.nonsense  # noqa: B018


def _isort(name: str) -> tuple[int, str]:
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize(("module", "name"), EXPORTS)
def test_every_export_is_documented(module: str, name: str) -> None:
    found = exported(module, name)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        assert isinstance(found, str) or typing.get_args(found)  # a constant, or an alias of types
        return
    assert inspect.getdoc(found)
    assert not (found.__doc__ or "").startswith(f"{name}(")  # the dataclass's own
    if inspect.isclass(found):
        for member, value in vars(found).items():
            function = getattr(value, "fget", getattr(value, "func", getattr(value, "__func__", value)))
            if not member.startswith("_") and inspect.isfunction(function):
                docs = [getattr(vars(base).get(member), "__doc__", None) for base in found.__mro__]
                assert any(docs), f"{name}.{member}"


@pytest.mark.parametrize(("module", "name"), EXPORTS)
def test_tensors_have_shapes_in_the_documentation(module: str, name: str) -> None:
    """Where an export's function takes or returns a tensor, its documentation says of which shape, as in [B, n]."""
    found = exported(module, name)
    members = [*vars(found).items()] if inspect.isclass(found) else [(name, found)]
    for member, value in members:
        function = getattr(value, "fget", getattr(value, "func", getattr(value, "__func__", value)))
        if member.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue  # what overrides a method without a word of its own has the words of that
        signature = inspect.signature(function)
        hints = [p.annotation for p in signature.parameters.values()] + [signature.return_annotation]
        if {"Tensor", "Tensor | None"} & set(map(str, hints)):
            assert re.search(r"\[[\w.*][^\]]*\]", function.__doc__), f"{name}.{member}{signature}"


@pytest.mark.parametrize("name", sorted(stages()))
def test_every_stage_names_its_paper_or_says_that_it_is_ours(name: str) -> None:
    cls = stages()[name]
    tree = ast.parse(inspect.getsource(inspect.getmodule(cls)))  # type: ignore[arg-type]
    written = next(ast.get_docstring(x) for x in tree.body if isinstance(x, ast.ClassDef) and x.name == cls.__name__)
    assert written is not None
    assert set(IDS.findall(cls.paper)) <= set(IDS.findall(written))
    assert IDS.search(written) or "Ours" in written
    whole = cls.__doc__ or ""
    for f in dataclasses.fields(cls):
        assert f"{f.name} ({f.type}): {f.metadata['help']}" in whole
    assert "SpecError" in whole


def test_what_public_functions_return_is_public() -> None:
    """Every class of kvcomp that the annotations of exports promise is exported somewhere."""
    public = {exported(module, name) for module, name in EXPORTS if inspect.isclass(exported(module, name))}
    missing = set()
    for module, name in EXPORTS:
        found = exported(module, name)
        functions = [found] if inspect.isfunction(found) else []
        if inspect.isclass(found):
            for attribute, member in vars(found).items():
                function = getattr(member, "fget", getattr(member, "func", getattr(member, "__func__", member)))
                if inspect.isfunction(function) and not attribute.startswith("_"):
                    functions.append(function)
        if name in ("LayerPlan", "Pages", "Step", "Windows", "BlockLayer", "Setup"):
            continue  # what engines do with these is given from one to the other
        for function in functions:
            scope = {**vars(sys.modules[function.__module__]), **{n: getattr(kvcomp, n) for n in kvcomp.__all__}}
            for cls in classes(eval(str(inspect.signature(function).return_annotation), scope)):
                if cls.__module__.startswith("kvcomp") and not public & set(cls.__mro__):
                    missing.add(f"{name}.{function.__name__} -> {cls.__qualname__}")
    assert missing == set()


def classes(hint: Any) -> list[type]:
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        return [hint]
    return [cls for part in typing.get_args(hint) for cls in classes(part)]


# -- authors' API -----------------------------------------------------------------------------------------------------


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"method_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_of_ones_own_needs_only_the_authors_api(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert {name for name in imported if (name or "").startswith("kvcomp")} == {"kvcomp.stages"}

    before = dict(reg.stages())
    monkeypatch.setattr(reg, "_stages", dict(before))
    load(path)
    (name,) = reg._stages.keys() - before
    stage = reg._stages[name]()
    stack = stage + KIVI(bits=4) if stage.family != "quantizer" else SnapKV(keep=0.5) + stage
    assert stack == Stack.parse(str(stack))
    model, ids = make("llama", num_hidden_layers=2), torch.randint(3, 256, (2, 400))
    cache = CompressedCache(stack, model)
    prefill(model, ids, [cache])
    logits = model(ids[:, :1], past_key_values=cache).logits
    assert bool(logits.isfinite().all())
    assert name in cache.report()
    assert cache.memory().held < cache.memory().dense
    k, v = torch.randn(2, 1, 2, 300, 64).unbind()
    back = Stack.parse(stage).roundtrip(k, v, queries=torch.randn(1, 4, 300, 64))
    if stage.family == "quantizer":
        torch.testing.assert_close(back[0], k, rtol=0.05, atol=1e-3)
    if stage.family == "policy":
        assert back[0].shape[2] == 75


def test_the_examples_are_a_score_a_grid_and_a_selector() -> None:
    assert [path.stem for path in METHODS] == ["grid", "score", "selector"]


# -- what objects say in their reprs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preallocate", [None, 512])
def test_a_repr_is_one_short_line_with_sizes(preallocate: int | None) -> None:
    model, ids = make("llama", num_hidden_layers=2), torch.randint(3, 256, (2, 400))
    cache = CompressedCache(SnapKV(keep=0.5) + KIVI(bits=4), model, preallocate=preallocate)
    assert repr(cache) == "<CompressedCache snapkv(keep=0.5) + kivi(bits=4): empty, 2 of 2 layers compressed>"
    (filled,) = prefill(model, ids, [cache])
    assert repr(filled).startswith("Prefilled(logits=float32 [2, 256], dense_s=")
    assert repr(cache) == "<CompressedCache snapkv(keep=0.5) + kivi(bits=4): 2 x 400 tokens, 2 of 2 layers compressed>"
    before = cache.memory()
    repr(cache)
    assert cache.memory() == before
    assert re.match(r"Memory\(held=\d+\.\d KiB, dense=400\.0 KiB, \d+\.\d\d effective bits, .*window", repr(before))
    model(ids[:, :1], past_key_values=cache)
    assert re.match(r"Traffic\(read=\d+\.\d KiB, dense=401\.0 KiB, .*pages", repr(cache.traffic()))
    for thing in (cache, filled, before, cache.traffic(), cache.stack, *cache.stack.stages):
        assert len(repr(thing)) < 200
        assert "\n" not in repr(thing)


def test_the_repr_of_a_cache_lets_chunks_wait() -> None:
    """Chunks of a prompt wait for more of it: to look at a cache must not end the prompt."""
    model, ids = make("llama", num_hidden_layers=2), torch.randint(3, 256, (1, 700))
    found = []
    for look in (False, True):
        cache = CompressedCache("snapkv(keep=0.5, window=16) + kivi(bits=4)", model)
        for chunk in ids.split(100, 1):
            model(chunk, past_key_values=cache)
            if look:
                assert f"1 x {cache.get_seq_length()} tokens" in repr(cache)
        found.append(cache.memory())
    assert found[0] == found[1]


def test_a_compaction_says_what_it_did() -> None:
    done = kvcomp.Compaction((64, 512), 45, [0.25, 0.5], [0.1, 0.0625])
    assert repr(done) == "Compaction(span=(64, 512), tokens=45, error<=0.5, lse_error<=0.1 in 2 layers)"


def test_errors_are_of_one_family() -> None:
    for name in ("SpecError", "UnsupportedError"):
        assert issubclass(getattr(kvcomp, name), KvcompError)
