"""Stores in a file: what comes back is what was held, bit for bit, in as many bytes; or one error that says why not."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcomp import KvcompError, SpecError, Stack, UnsupportedError
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.saving import Saved, read, write
from kvcomp.layout import Field
from kvcomp.stages import Codec, PageShape, Quantizer
from kvcomp.stages import registry as reg
from kvcomp.stages.registry import register, stages

CPU = torch.device("cpu")
SPECS = [
    "none",
    "none + window(sinks=3, recent=9)",
    "kivi(bits=2) + window(sinks=2, recent=16)",
    "int(bits=4, basis=hadamard) + quest(pages=2, dense_layers=0)",
    "turboquant(bits=3)",
    "turboquant(bits=2.5)",
    "klt(bits=2) + window(sinks=2, recent=16)",
    "h2o(budget=150) + int(bits=8) + window(sinks=2, recent=16)",
    "rkv(budget=150) + int(bits=8) + window(sinks=2, recent=16)",
    "snapkv(budget=40, window=8) + kivi(bits=4, group=16) + window(sinks=2, recent=8)",
    "streaming(sinks=4, recent=40) + int",
]
pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy")


def make(spec: str, rows: int = 2, heads: int = 2, dim: int = 32) -> LayerStore:
    store, x = LayerStore(Stack.parse(spec).plan(0, 1)), torch.zeros(rows, heads, 1, dim)
    store.start(x, x)
    return store


def save(path: Path, spec: str, *stores: LayerStore) -> None:
    write(path, Saved(Stack.parse(spec), "float32", {}, [store.state() for store in stores]))


def load(path: Path) -> list[LayerStore]:
    saved = read(path)
    stores = [LayerStore(saved.stack.plan(i, len(saved.layers))) for i in range(len(saved.layers))]
    for store, state in zip(stores, saved.layers, strict=True):
        store.restore(state, CPU)
    return stores


def data_bytes(path: Path) -> int:
    """Bytes after the header, whose length the first eight bytes say."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apply(store: LayerStore, name: str, seed: int) -> str:
    """One step of a store's life, decided by the seed; returns the refusal, if it was refused."""
    kv = (store.rows, store.heads)
    try:
        if name == "write":
            n = 1 + seed % 90
            k, v = random(seed, 2, *kv, n, store.k_dim).unbind()
            valid = None if seed % 2 else random(seed, store.rows, n) < 0.7
            store.write(k, v, valid, random(seed + 1, store.rows, 2 * store.heads, n, store.k_dim), 0.2)
        elif name == "append":
            for i in range(1 + seed % 40):
                store.append(*random(seed + i, 2, *kv, 1, store.k_dim).unbind())
                store.settle()
        elif name == "crop":
            store.crop(seed % 30)
        else:
            store.select_rows(random(seed, 1 + seed % 3, store.rows).argmax(-1))
    except KvcompError as error:
        return str(error)
    return ""


def assert_same(a: LayerStore, b: LayerStore) -> None:
    """The same tokens, and the same attention in every bit."""
    assert a.history.length == b.history.length
    assert a.tail == b.tail
    assert a.kept.tolist() == b.kept.tolist()
    for stream in a.table.counts.nonzero().flatten().tolist():
        for x, y in zip(a._tokens(stream), b._tokens(stream), strict=True):
            assert torch.equal(x, y)
    for n in (1, 3):
        q = random(7, a.rows, 2 * a.heads, n, a.k_dim)
        chunk = (*random(8, 2, a.rows, a.heads, n, a.k_dim).unbind(), torch.ones(1, n, n).tril().bool())
        for x, y in zip(a.attend(q, 0.2, None, chunk)[:2], b.attend(q, 0.2, None, chunk)[:2], strict=True):
            assert torch.equal(x, y)


STEPS = st.tuples(st.sampled_from(["write", "append", "append", "crop", "select"]), st.integers(0, 2**20))


@given(spec=st.sampled_from(SPECS), before=st.lists(STEPS, max_size=5), after=st.lists(STEPS, min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_a_store_goes_on_as_if_it_had_never_been_saved(
    spec: str, before: list[tuple[str, int]], after: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("saved") / "store"
    store = make(spec)
    for name, seed in before:
        apply(store, name, seed)
    save(path, spec, store)
    (again,) = load(path)
    size, was, held = data_bytes(path), store.held(set()), again.held(set())
    learned = sum(t.nbytes for t in store.codec.state().values())
    assert size == sum(held.values()) - held["constants"] + learned
    assert held["slack"] == 0
    wide = [x for x in (store.table.rows, store.table.received) if x is not None]
    spare = sum(x[:, store.table.longest :].numel() * x.itemsize for x in wide)
    cropped = was["history"] - sum(t.nbytes for t in store.history.tensors())  # masks that are views
    assert size == sum(was.values()) - was["constants"] + learned - was["slack"] - spare - cropped
    assert_same(store, again)
    for name, seed in after:
        assert apply(store, name, seed) == apply(again, name, seed)
        assert_same(store, again)


@pytest.mark.parametrize("spec", SPECS)
def test_a_file_of_what_was_loaded_is_the_same_file(spec: str, tmp_path: Path) -> None:
    store = make(spec)
    for i, name in enumerate(["write", "append", "append", "select", "crop"]):
        apply(store, name, 17 + i)
    save(tmp_path / "one", spec, store)
    save(tmp_path / "two", spec, *load(tmp_path / "one"))
    one, two = (load_file(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    said = [safe_open(tmp_path / name, framework="pt").metadata() for name in ("one", "two")]
    assert said[0] == said[1]


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "(budget" in spec])
def test_a_prompt_goes_on_after_it_was_saved_between_chunks(spec: str, tmp_path: Path) -> None:
    """Its budget is that of the whole prompt, whichever of its chunks came before."""
    store = make(spec)
    for tokens in (25, 131):
        apply(store, "write", tokens)
    again = store
    for tokens in (39, 89, 7):
        save(tmp_path / "store", spec, again)
        (again,) = load(tmp_path / "store")
        assert again.prompt == store.prompt
        for each in (store, again):
            assert not apply(each, "write", tokens)
        assert_same(store, again)
    for each in (store, again):
        apply(each, "append", 3)
    assert again.prompt is store.prompt is None
    save(tmp_path / "store", spec, again)
    assert_same(store, *load(tmp_path / "store"))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("x", "prompt is 'x', expected a list of 2"),
        ([[0, 0]], "prompt is a list, expected a list of 2"),
        ([[0], [0] * 4], "prompt: seen is a list, expected a list of 2"),
        ([[0, 0], [0] * 5], "prompt: held is a list, expected a list of 4"),
        ([[0, -1], [0] * 4], r"prompt: seen has \[0, -1\], expected integers from 0 to \[25, 25\]"),
        ([[0, 26], [0] * 4], r"prompt: seen has \[0, 26\]"),
        ([[0, True], [0] * 4], r"prompt: seen has \[0, True\]"),
        ([[0, 0.5], [0] * 4], r"prompt: seen has \[0, 0.5\]"),
        ([[3, 3], [3, 3, 4, 3]], r"prompt: held has \[3, 3, 4, 3\], expected integers from 0 to \[3, 3, 3, 3\]"),
    ],
)
def test_a_prompt_that_never_began_so(prompt: Any, words: str) -> None:
    store, plan = make("none"), Stack.parse("none").plan(0, 1)
    x = random(0, 2, 2, 25, 32)
    store.write(x, x, None)
    LayerStore(plan).restore({name: x for name, x in store.state().items() if name != "prompt"}, CPU)  # an older file's
    with pytest.raises(KvcompError, match=words):
        LayerStore(plan).restore(store.state() | {"prompt": prompt}, CPU)


def test_pages_that_rows_share_are_written_once(tmp_path: Path) -> None:
    store = make("none + window(recent=0)", rows=1)
    apply(store, "write", 89)
    save(tmp_path / "one", "none + window(recent=0)", store)
    store.select_rows(torch.zeros(6, dtype=torch.int64))
    save(tmp_path / "six", "none + window(recent=0)", store)
    one, six = (load_file(tmp_path / name)["layers.0.pages"] for name in ("one", "six"))
    assert len(one) == 2
    assert torch.equal(one, six)


def test_a_state_copies_nothing_where_nothing_is_idle() -> None:
    store = make("none + window(recent=0)")
    x = random(0, 2, 2, 128, 32)
    store.write(x, x, None)
    assert store.state()["pages"] is store.pool.data
    assert store.state()["exact"]["k"] is store.exact.k


def test_what_was_forgotten_is_in_no_file(tmp_path: Path) -> None:
    store, spec = make("none + window(recent=60)", rows=4), "none + window(recent=60)"
    mark = torch.tensor(1234.5678)
    k, v = random(0, 2, 4, 2, 200, 32).unbind()
    for x in (k, v):
        x[0] = x[:, :, 175:] = mark
    store.write(k, v, None)
    store.crop(25)
    store.select_rows(torch.tensor([1, 2, 3]))
    needle = mark.numpy().tobytes()
    for idle in (store.pool.data, *store.exact.tensors):  # a quarter of the pool may lie idle
        assert needle in idle.numpy().tobytes()
    save(tmp_path / "store", spec, store)
    assert needle not in (tmp_path / "store").read_bytes()


def test_an_empty_store_is_empty_again(tmp_path: Path) -> None:
    save(tmp_path / "store", "kivi", LayerStore(Stack.parse("kivi").plan(0, 1)), make("kivi"))
    never, started = load(tmp_path / "store")
    assert not never.started
    assert started.history.length == 0
    assert apply(started, "write", 50) == ""


def test_tensors_come_to_the_device_and_counters_stay_on_the_host(tmp_path: Path) -> None:
    store = make("kivi + window(recent=16)")
    apply(store, "write", 88)
    save(tmp_path / "store", "kivi + window(recent=16)", store)
    again = LayerStore(store.plan)
    again.restore(read(tmp_path / "store").layers[0], torch.device("meta"))
    assert {t.device.type for t in (again.pool.data, *again.exact.tensors)} == {"meta"}
    assert again.device.type == again.table.device.type == "meta"
    assert {t.device.type for t in (again.table.rows, again.table.counts, again.exact.counts)} == {"cpu"}
    assert again.kept.tolist() == store.kept.tolist()


def test_a_loaded_store_does_not_depend_on_its_file(tmp_path: Path) -> None:
    path, store = tmp_path / "store", make("none")
    apply(store, "write", 89)
    save(path, "none", store)
    (again,) = load(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(store, again)


# -- codecs -----------------------------------------------------------------------------------------------------------


class LearningCodec(Codec):
    """Divides by the largest value of the first pages that it sees."""

    def __init__(self, shape: PageShape) -> None:
        self.shape, self.largest = shape, torch.zeros(0)

    @property
    def fields(self) -> tuple[Field, ...]:
        s = self.shape
        return Field("k", (s.page_size, s.k_dim), s.dtype), Field("v", (s.page_size, s.v_dim), s.dtype)

    def encode(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        if not len(self.largest):
            self.largest = keys.abs().amax()[None]
        return {"k": keys / self.largest, "v": values}

    def decode(self, page: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return page["k"] * self.largest, page["v"]

    def constants(self) -> list[Tensor]:
        return [self.largest]

    def state(self) -> dict[str, Tensor]:
        return {"largest": self.largest}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.largest = state["largest"]


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> type[Quantizer]:
    monkeypatch.setattr(reg, "_stages", dict(stages()))

    @register("learning")
    @dataclass(frozen=True)
    class Learning(Quantizer):
        """A quantizer whose codec depends on what it saw."""

        paper = "none"
        pages: int = field(default=1, metadata={"help": "unused"})

        def codec(self, shape: PageShape) -> Codec:
            return LearningCodec(shape)

    return Learning


@pytest.mark.usefixtures("learning")
def test_what_a_codec_learned_is_saved(tmp_path: Path) -> None:
    store = make("learning")
    apply(store, "write", 89)
    save(tmp_path / "store", "learning", store)
    (again,) = load(tmp_path / "store")
    assert isinstance(again.codec, LearningCodec)
    assert again.codec.largest.item() == store.codec.constants()[0].item() > 1
    assert_same(store, again)
    assert data_bytes(tmp_path / "store") == sum(again.held(set()).values())
    apply(store, "write", 87)
    apply(again, "write", 87)
    assert_same(store, again)


@pytest.mark.usefixtures("learning")
def test_pages_of_another_layout_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make("learning")
    apply(store, "write", 89)
    save(tmp_path / "store", "learning", store)
    swapped = (Field("v", (64, 32), torch.float32), Field("k", (64, 32), torch.float32))  # as many bytes
    monkeypatch.setattr(LearningCodec, "fields", property(lambda self: swapped))
    with pytest.raises(KvcompError, match=r"layer 0 holds pages of .*'k'.* but the stack makes .*'v'"):
        load(tmp_path / "store")


# -- states -----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    return random(draw(st.integers(0, 9)), *shape).to(draw(st.sampled_from(DTYPES)))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
LEAVES = PLAIN | tensors() | st.sampled_from(DTYPES)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text() | st.just("$tensor"), inner, max_size=3)
    ),
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.double(), b.double())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@given(VALUES)
@settings(deadline=None, max_examples=100)
def test_any_state_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("state") / "file"
    write(path, Saved(Stack.parse("none"), "", {"a": 1}, [value, [value]]))
    saved = read(path)
    assert same(saved.layers, [value, [value]])
    assert saved.model == {"a": 1}


def test_a_tensor_is_written_once_and_a_view_without_the_rest(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    mask = torch.ones(2, 50)
    write(tmp_path / "file", Saved(Stack.parse("none"), "", {}, [mask, mask[:], base[10:20], base[::100], mask[:1]]))
    layers = read(tmp_path / "file").layers
    assert data_bytes(tmp_path / "file") == (100 + 10 + 10 + 50) * 4
    assert layers[0] is layers[1]
    assert torch.equal(layers[2], base[10:20])
    assert torch.equal(layers[3], base[::100])
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in layers)


@pytest.mark.parametrize("value", [{1, 2}, object(), torch.Size([1]), {"deep": [torch.nn.Linear(1, 1)]}, {(1, 2): 3}])
def test_what_a_file_cannot_hold_is_named(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"save: layers\.1\S* is a \w+, .*cannot be saved"):
        write(tmp_path / "file", Saved(Stack.parse("none"), "", {}, [None, value]))
    assert list(tmp_path.iterdir()) == []


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good file."""
    store = make("kivi")
    apply(store, "write", 89)
    save(tmp_path / "cache.kv", "kivi", store)
    return tmp_path / "cache.kv"


def claim(file: Path, **changes: str) -> Path:
    """The same file with other metadata."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({name: tensor.clone() for name, tensor in load_file(file).items()}, file, metadata | changes)
    return file


def refused(path: Path, *said: str, error: type[KvcompError] = KvcompError) -> None:
    with pytest.raises(error) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    for text in said:
        assert text in message


def test_the_metadata_says_what_it_is(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "kvcomp cache"
    assert metadata["version"] == "1"
    assert metadata["stack"] == "kivi(bits=2)"
    assert metadata["stack_hash"] == Stack.parse("kivi").hash
    assert metadata["dtype"] == "float32"
    assert re.fullmatch(r"\d+(\.\d+)+\S*|0\+unknown", metadata["kvcomp"])


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.kv", f"load('{tmp_path}/none.kv')", "no such file")
    refused(tmp_path, "no such file")


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file(file: Path, share: float) -> None:
    os.truncate(file, int(share * file.stat().st_size))
    refused(file, "load('", "cache.kv')", "no complete safetensors file")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("These are no tensors, but words. " * 9)
    refused(tmp_path / "text", "no complete safetensors file")
    save_file({"weight": torch.zeros(3)}, tmp_path / "bare")
    refused(tmp_path / "bare", "holds tensors, but no cache", "save()")
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights", {"format": "pt"})
    refused(tmp_path / "weights", "holds tensors, but no cache")


def test_another_version_of_the_format(file: Path) -> None:
    refused(claim(file, version="2", kvcomp="9.9"), "format version 2", "written by kvcomp 9.9", "reads version 1")


def test_a_stack_that_means_something_else_by_now(file: Path) -> None:
    refused(
        claim(file, stack_hash="0" * 12, kvcomp="0.0.1"), "'kivi(bits=2)' means something else", "kvcomp 0.0.1 wrote"
    )


def test_a_stage_that_is_not_installed(file: Path) -> None:
    refused(claim(file, stack="kivvi(bits=2)"), "'kivvi'", "'kivi'", error=SpecError)


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    saved = Saved(Stack.parse("none"), "", {}, [torch.zeros(100)])
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    for path, reason in (("none/cache.kv", "No such file"), ("file/cache.kv", "Not a dir"), ("folder", "Is a dir")):
        with pytest.raises(KvcompError, match=rf"save\('.*{path}'\): it cannot be written: .*{reason}"):
            write(tmp_path / path, saved)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_disk_without_room_leaves_the_old_file(file: Path) -> None:
    resource = pytest.importorskip("resource")
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(KvcompError, match=r"save\('.*cache.kv'\): it cannot be written: File too large"):
            write(file, Saved(Stack.parse("none"), "", {}, [torch.zeros(1 << 16)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["cache.kv"]


def test_an_interrupted_save_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("kvcomp.cache.saving.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(file, Saved(Stack.parse("none"), "", {}, []))
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == ["cache.kv"]


def test_a_new_file_replaces_the_old_one(file: Path) -> None:
    write(file, Saved(Stack.parse("none"), "", {}, [5]))
    assert read(file).layers == [5]
    assert [p.name for p in file.parent.iterdir()] == ["cache.kv"]
