"""Damaged files: whatever is changed in one, it is refused in words or nothing has changed; and older files load."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcomp import KvcompError, Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.saving import Saved, read, write
from kvcomp.state import CHECKSUM, DamagedError, State, checksum

CPU = torch.device("cpu")
SPECS = (
    "none + window(sinks=3, recent=9)",
    "kivi(bits=2) + window(sinks=2, recent=16)",
    "int(bits=4, basis=hadamard) + quest(pages=2, dense_layers=0)",
    "turboquant(bits=2.5)",
    "klt(bits=2) + sketch(keep=0.3, dense_layers=0) + window(sinks=2, recent=16)",
    "h2o(budget=150, hold=true) + int(bits=8) + window(sinks=2, recent=16)",
    "snapkv(budget=40, window=8) + kivi(bits=4, group=16) + window(sinks=2, recent=8)",
)
Content = tuple[dict[str, Tensor], dict[str, str]]
pytestmark = pytest.mark.filterwarnings("ignore:.*same redundancy")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(spec: str) -> LayerStore:
    """Two rows, one of them padded, of 150 tokens and some steps."""
    store = LayerStore(Stack.parse(spec).plan(0, 1))
    store.start(torch.zeros(2, 2, 1, 32), torch.zeros(2, 2, 1, 32))
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[0, :30] = False
    store.write(*noise(1, 2, 2, 2, 150, 32).unbind(), valid, noise(2, 2, 4, 150, 32), 0.2)
    for i in range(5):
        store.append(*noise(10 + i, 2, 2, 2, 1, 32).unbind())
        store.attend(noise(20 + i, 2, 4, 1, 32), 0.2)
        store.settle()
    return store


def outcome(path: Path) -> list[Tensor]:
    """What a loaded store gives in its further life."""
    saved = read(path)
    store, out = LayerStore(saved.stack.plan(0, 1)), []
    (state,) = saved.layers
    store.restore(state, CPU)
    for i in range(70):
        store.append(*noise(30 + i, 2, 2, 2, 1, 32).unbind())
        out += store.attend(noise(40 + i, 2, 4, 1, 32), 0.2)[:2]
        store.settle()
    store.select_rows(torch.tensor([1, 1, 0]))
    return [*out, store.kept]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def unsigned(content: Content) -> Content:
    """As the first kvcomp wrote it: without a checksum."""
    tensors, metadata = content
    return tensors, {name: word for name, word in metadata.items() if name != CHECKSUM}


def content_of(path: Path) -> Content:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module", params=SPECS)
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("good") / "cache.kv"
    write(path, Saved(Stack.parse(request.param), "float32", {}, [filled(request.param).state()]))
    return path


def test_a_file_without_a_checksum_is_an_older_one(good: Path, tmp_path: Path) -> None:
    tensors, metadata = unsigned(content_of(good))
    save_file(tensors, tmp_path / "old", metadata)
    assert same(outcome(tmp_path / "old"), outcome(good))
    save_file(tensors, tmp_path / "old", metadata | {"crc33": "0"})
    with pytest.raises(KvcompError, match="the file is damaged: the header: 'crc33' is unknown"):
        read(tmp_path / "old")


def test_every_bit_counts(good: Path, tmp_path: Path) -> None:
    content, chance = good.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [chance.randrange(header) for _ in range(25)] + [chance.randrange(header, len(content)) for _ in range(15)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(KvcompError):
            read(tmp_path / "damaged")


def test_every_byte_counts(good: Path, tmp_path: Path) -> None:
    content, chance = good.read_bytes(), random.Random(0)
    for size in [0, 1, 7, 8, 9, *(chance.randrange(len(content)) for _ in range(15)), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(KvcompError, match="no complete safetensors file"):
            read(tmp_path / "cut")
    for more in (1, 8, 4096):
        (tmp_path / "long").write_bytes(content + bytes(more))
        with pytest.raises(KvcompError, match="no complete safetensors file"):
            read(tmp_path / "long")


# -- content without a checksum ---------------------------------------------------------------------------------------

Change = Callable[[Tensor], Tensor]
INTEGERS: dict[str, Change] = {
    "huge": lambda x: torch.full_like(x, torch.iinfo(x.dtype).max),
    "a million": lambda x: torch.full_like(x, min(10**6, torch.iinfo(x.dtype).max)),
    "least": lambda x: torch.full_like(x, torch.iinfo(x.dtype).min),
    "minus one": lambda x: x - 1,
    "plus one": lambda x: x + 1,
}
SHAPES: dict[str, Change] = {
    "half": lambda x: x[: len(x) // 2].contiguous(),
    "empty": lambda x: x[:0].contiguous(),
    "one column": lambda x: x[:, :1].contiguous() if x.dim() > 1 else x[:1],
    "flat": lambda x: x.reshape(-1)[None],
    "more": lambda x: torch.cat([x, x]),
    "scalar": lambda x: torch.zeros((), dtype=x.dtype),
    "wide": lambda x: x.to(torch.float64) if x.dtype != torch.float64 else x.float(),
    "bytes": lambda x: x.contiguous().view(torch.uint8) if x.dim() and x.itemsize > 1 else x[None],
}


def changes(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, tensor in tensors.items():
        integer = tensor.dtype in (torch.int32, torch.int64)
        for what, change in (SHAPES | (INTEGERS if integer else {})).items():
            yield f"{name} {what}", tensors | {name: change(tensor)}
        if tensor.is_floating_point():
            yield f"{name} nan", tensors | {name: torch.full_like(tensor, float("nan"))}
        yield f"{name} gone", {other: x for other, x in tensors.items() if other != name}
        yield f"{name} renamed", {("x" + other if other == name else other): x for other, x in tensors.items()}
    yield "one more", tensors | {"layers.7": torch.zeros(1)}


def test_tensors_that_are_none_of_a_store_are_refused(good: Path, tmp_path: Path) -> None:
    """Or they mean the same. Without a checksum nan among exact tokens is taken as it is, and where a policy evicts a
    token more or less."""
    (tensors, metadata), expected = unsigned(content_of(good)), outcome(good)
    free = ("exact.k nan", "exact.v nan", "exact.counts plus one", "exact.counts minus one")
    for told, damaged in changes(tensors):
        save_file(damaged, tmp_path / "damaged", metadata)
        with suppress(KvcompError):
            found = outcome(tmp_path / "damaged")
            assert same(found, expected) or told.endswith(free[: 4 if "snapkv" in metadata["stack"] else 2]), told


VALUES: tuple[Any, ...] = (None, True, -1, 0, 3, 10**9, 10**40, 1.5, "x", [], [[]], {})
ODD: tuple[Any, ...] = (
    *({"$tensor": "layers.0.gone"}, {"$tensor": 3}, {"$dtype": "load"}, {"$dtype": None}, {"$device": "cuda"}),
    *({"$tuple": 3}, {"$dict": [[1]]}, {"$dict": 3}, {"$dict": [[[], 1]]}, {"$other": 1}, {"a": 1, "b": 2}),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ():
        yield value, key
        yield from places(value[key])


def test_plain_values_that_are_none_of_a_store_are_refused(good: Path, tmp_path: Path) -> None:
    """Or they mean the same, such as no state of an index where there is no index."""
    (tensors, metadata), expected = unsigned(content_of(good)), outcome(good)
    count, chance = len(list(places(json.loads(metadata["layers"])))), random.Random(0)
    for place in range(count):
        for value in (*chance.sample(VALUES, 3), chance.choice(ODD)):
            layers = json.loads(metadata["layers"])
            holder, key = list(places(layers))[place]
            if holder[key] == value:
                continue
            holder[key] = value
            save_file(tensors, tmp_path / "damaged", metadata | {"layers": json.dumps(layers)})
            with suppress(KvcompError):
                assert same(outcome(tmp_path / "damaged"), expected), (place, value)


def test_what_is_no_json(good: Path, tmp_path: Path) -> None:
    tensors, metadata = unsigned(content_of(good))
    for word in ("layers", "model"):
        for text in ("", "{", "nul", "7", '"x"', "[" * 100_000, "[" * 150 + "]" * 150, "9" * 5000, "\x00", "{}}"):
            save_file(tensors, tmp_path / "damaged", metadata | {word: text})
            with pytest.raises(KvcompError, match=r"the file is damaged: the (header|layers)"):
                read(tmp_path / "damaged")
    for word in metadata:
        save_file(tensors, tmp_path / "damaged", {name: text for name, text in metadata.items() if name != word})
        with pytest.raises(KvcompError):
            read(tmp_path / "damaged")


LONG = ("y" * 10**5, "\x1b[2Jx", "a\nb", "\u202e", "[bold]x[/nope]", "{0}%s")


def signed(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """A file with the checksum of its content, as a writer that means harm gives it."""
    words = {name: word for name, word in metadata.items() if name != CHECKSUM}
    save_file(tensors, path, words | {CHECKSUM: checksum(words, tensors)})


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_messages_are_short_whatever_a_file_says(text: str, good: Path, tmp_path: Path) -> None:
    tensors, metadata = content_of(good)
    name = next(iter(tensors))
    renamed = {text if other == name else other: x for other, x in tensors.items()}
    cases = [(tensors, metadata | {word: text}) for word in metadata if word not in ("kvcomp", CHECKSUM)]
    for damaged, words in [*cases, (renamed, metadata), (tensors, metadata | {"version": "2", "kvcomp": text})]:
        signed(damaged, words, tmp_path / "bad")
        with pytest.raises(KvcompError) as error:
            read(tmp_path / "bad")
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 700
    save_file(tensors, tmp_path / "bad", unsigned(content_of(good))[1] | {text: "1"})
    with pytest.raises(KvcompError, match="is unknown") as error:
        read(tmp_path / "bad")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


def test_a_checksum_is_of_names_dtypes_shapes_and_bytes() -> None:
    x = torch.arange(6, dtype=torch.int32)
    found = {
        checksum({"a": "b"}, {"x": x}),
        checksum({"a": "c"}, {"x": x}),
        checksum({"ab": ""}, {"x": x}),
        checksum({"a": "b"}, {"y": x}),
        checksum({"a": "b"}, {"x": x.view(2, 3)}),
        checksum({"a": "b"}, {"x": x.view(torch.float32)}),
        checksum({"a": "b"}, {"x": x + 1}),
        checksum({"a": "b"}, {"x": x, "z": x[:0]}),
        checksum({"a": "b"}, {}),
    }
    assert len(found) == 9


def test_a_state_gives_what_was_asked_for_or_says_what_is_wrong() -> None:
    state = State({"t": torch.zeros(2, 3), "i": 3, "b": True, "f": float("inf"), "s": "word", "l": (1, 2)}, "here")
    assert state.integer("i", 0, 3) == 3
    assert state.flag("b")
    assert "t" in state
    assert "x" not in state
    for ask, told in (
        (lambda: state["x"], "here: x is missing"),
        (lambda: state.integer("b", 0), "here: b is True, expected an integer, 0 or more"),
        (lambda: state.integer("i", 0, 2), "here: i is 3, expected an integer, 0 to 2"),
        (lambda: state.tensor("t", (2, None), torch.int64), r"here: t is float32 \[2, 3\], expected int64 \[2, any\]"),
        (lambda: state.tensor("i", (), torch.int64), r"here: i is 3, expected int64 \[\]"),
        (lambda: state.number("f"), "here: f is inf, expected a finite number"),
        (lambda: state.flag("i"), "expected True or False"),
        (lambda: state.text("i"), "expected text"),
        (lambda: state.sequence("l", 3), "expected a list of 3"),
        (lambda: state.part("i"), "here.i is 3, expected named values"),
        (lambda: state.only("t", "i"), "'b', 'f', 's', 'l' is unknown"),
        (lambda: State({1: 2}, "there"), "there is a dict, expected named values"),
    ):
        with pytest.raises(DamagedError, match=told):
            ask()


# -- paths and processes ----------------------------------------------------------------------------------------------


def test_paths_of_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    saved = Saved(Stack.parse("none"), "", {}, [])
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, f"{tmp_path}/a\0b", f"{tmp_path}/a\ud800b"):
        with pytest.raises(KvcompError, match=r"load\("):
            read(path)
        with pytest.raises(KvcompError, match=r"save\(.*it cannot be written"):
            write(path, saved)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    size = 1 << 46
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (tmp_path / "sparse").write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        os.truncate(tmp_path / "sparse", 8 + len(header) + size)
    except OSError:  # a file system of smaller files
        os.truncate(tmp_path / "sparse", 1 << 42)
    with pytest.raises(KvcompError, match="more than the memory of this machine"):
        read(tmp_path / "sparse")


SAVER = """
import sys, torch
from kvcomp import Stack
from kvcomp.cache.saving import Saved, write
saved = Saved(Stack.parse("none"), "", {}, [torch.full((1 << 22,), float(sys.argv[2]))])
print("ready", flush=True)
while True: write(sys.argv[1], saved)
"""


def test_a_save_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "cache.kv"
    write(file, Saved(Stack.parse("none"), "", {}, [torch.zeros(1 << 22)]))
    for i in range(2):
        with subprocess.Popen([sys.executable, "-c", SAVER, str(file), str(i)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.05 + 0.1 * i)
            process.send_signal(signal.SIGKILL)
        (layer,) = read(file).layers
        assert layer.unique().numel() == 1
    write(file, Saved(Stack.parse("none"), "", {}, [7]))
    assert [p.name for p in tmp_path.iterdir()] == ["cache.kv"]
