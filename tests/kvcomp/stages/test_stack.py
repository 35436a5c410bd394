"""Stacks: the spec is a faithful name, bad specs say what to change, and the bits promised are the bits allocated."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from dataclasses import dataclass
from math import lcm

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcomp
from kvcomp import KvcompWarning, SpecError, Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.stages import Quantizer, arg
from kvcomp.stages import registry as reg

SETTINGS = settings(deadline=None, max_examples=25)


def parse(spec: str) -> Stack:
    """A stack, without the warning that drop + select gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KvcompWarning)
        return Stack.parse(spec)


def call(draw: st.DrawFn, name: str, **arguments: st.SearchStrategy[str]) -> str:
    """A stage with some of its arguments, in any order."""
    chosen = draw(st.lists(st.sampled_from(sorted(arguments)), unique=True)) if arguments else []
    inside = ", ".join(f"{key}={draw(arguments[key])}" for key in chosen)
    return f"{name}({inside})" if inside else name


def ints(low: int, high: int) -> st.SearchStrategy[str]:
    return st.integers(low, high).map(str)


@st.composite
def specs(draw: st.DrawFn) -> str:
    group = st.integers(1, 8).map(lambda x: str(16 * x))
    word = st.sampled_from(["identity", "hadamard", "'hadamard'", '"identity"'])
    quantizer = draw(st.sampled_from(["", "none", "kivi", "int"]))
    parts = []
    if quantizer == "kivi":
        parts.append(call(draw, "kivi", bits=st.sampled_from("24"), group=group))
    elif quantizer == "int":
        parts.append(call(draw, "int", bits=st.sampled_from("48"), basis=word, group=st.sampled_from(["None", "32"])))
    elif quantizer:
        parts.append(quantizer)
    for _ in range(draw(st.integers(0, 2))):
        size = draw(st.sampled_from(["keep", "budget"]))
        amount = {"keep": st.floats(0.001, 1).map(repr), "budget": ints(1, 5000)}[size]
        odd = st.integers(0, 5).map(lambda x: str(2 * x + 1))
        parts.append(
            call(
                draw,
                "snapkv",
                **{size: amount},
                window=ints(1, 99),
                kernel=odd,
                pooling=st.sampled_from(["avg", "max"]),
            )
        )
    sinks = draw(st.integers(0, 9))
    if draw(st.booleans()):
        parts.append(call(draw, "streaming", sinks=st.just(str(sinks)), recent=ints(1, 5000)))
    if draw(st.booleans()):
        parts.append(call(draw, "quest", pages=ints(1, 99), dense_layers=ints(0, 5), min_pages=ints(0, 9)))
    if draw(st.booleans()) or not parts:
        parts.append(f"window(sinks={sinks + 9}, recent={draw(st.integers(0, 300))})")
    return draw(st.sampled_from([" + ", "+", "  +\t "])).join(draw(st.permutations(parts)))


@given(specs())
@settings(deadline=None, max_examples=60)
def test_a_stack_prints_as_a_spec_that_parses_back(spec: str) -> None:
    stack = parse(spec)
    again = parse(str(stack))
    assert again == stack
    assert str(again) == str(stack)
    assert again.hash == stack.hash
    assert stack.page_size == again.page_size
    assert stack.window == again.window


def test_words_that_mean_something_to_the_parser_survive_a_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reg, "_stages", dict(reg.stages()))

    @reg.register("worded")
    @dataclass(frozen=True)
    class Worded(Quantizer):
        mode: str = arg("plain", "any word")
        level: str | None = arg(None, "any word or nothing")

    for value in ("none", "True", "class", "lambda", "a b", "it's", 'a"b', "ok"):
        stack = Stack((Worded(mode=value),))
        assert parse(str(stack)) == stack


def test_a_spec_says_what_it_is_without_its_defaults() -> None:
    for spec, shown in {
        "kivi": "kivi(bits=2)",
        "int(basis='hadamard', group=None)": "int(bits=4, basis=hadamard)",
        "snapkv": "snapkv(budget=320)",
        "none+window(sinks=0)": "none + window(sinks=0)",
    }.items():
        assert str(parse(spec)) == shown


def test_a_default_that_changes_between_versions_changes_the_hash() -> None:
    @dataclass(frozen=True)
    class Before(Quantizer):
        bits: int = arg(4, "the first argument")
        clip: float = arg(0.9, "another")

    @dataclass(frozen=True)
    class After(Quantizer):
        bits: int = arg(4, "the first argument")
        clip: float = arg(0.95, "another")

    Before.name = After.name = "same"
    assert str(Stack((Before(),))) == str(Stack((After(),)))
    assert Stack((Before(),)).hash != Stack((After(),)).hash


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("kivi", "kivi(bits=2)"),
        ("kivi", "kivi(group=32, bits=2)"),
        ("int(basis=hadamard)", "int(bits=4, basis='hadamard', group=None)"),
        ("snapkv", "snapkv(budget=320, window=64, kernel=5, pooling=avg, keep=None)"),
        ("snapkv(keep=1)", "snapkv(keep=1.0)"),
        ("quest+kivi", "quest(pages=64, dense_layers=2, min_pages=3) + kivi()"),
    ],
)
def test_a_default_spelled_out_is_the_same_stack(short: str, long: str) -> None:
    assert parse(short) == parse(long)
    assert parse(short).hash == parse(long).hash


def test_hashes_differ_where_stacks_do_and_are_the_same_in_every_process() -> None:
    different = [
        "none",
        "kivi(bits=2)",
        "kivi(bits=4)",
        "kivi(group=64)",
        "int(bits=4)",
        "int(bits=8)",
        "int(basis=hadamard)",
        "int(group=64)",
        "snapkv(keep=0.25)",
        "snapkv(keep=0.5)",
        "snapkv(budget=320, pooling=max)",
        "snapkv + kivi",
        "kivi + window(recent=64)",
        "kivi + window(recent=64, sinks=4)",
        "snapkv + streaming",
        "streaming + snapkv",
    ]
    assert len({parse(s).hash for s in different}) == len(different)
    code = "from kvcomp import Stack; print(Stack.parse('snapkv(keep=0.25) + kivi').hash)"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert parse("snapkv(keep=0.25) + kivi").hash == fresh
    assert len(fresh) == 12
    assert int(fresh, 16) >= 0


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("", ["empty"]),
        ("   ", ["empty"]),
        ("kivi(bits=2", ["kivi(bits=2", "does not parse"]),
        ("kivi +", ["kivi +", "does not parse"]),
        ("kivi - none", ["kivi - none", "no stage"]),
        ("2", ["'2'", "no stage"]),
        ("a.kivi(bits=2)", ["a.kivi(bits=2)", "no stage"]),
        ("kivvi", ["kivvi", "'kivi'"]),
        ("snapvk(keep=0.5)", ["snapvk", "'snapkv'"]),
        ("qest", ["qest", "'quest'"]),
        ("zzzzzz", ["zzzzzz", "int", "kivi", "none", "quest", "snapkv", "streaming", "window"]),
        ("kivi(2)", ["kivi(2)", "kivi(bits=2)"]),
        ("none(2)", ["none(2)", "takes no arguments"]),
        ("kivi(bit=2)", ["kivi", "'bit'", "'bits'"]),
        ("kivi(qwerty=2)", ["'qwerty'", "bits, k, v, group"]),
        ("none(bits=2)", ["none", "'bits'"]),
        ("kivi(**{'bits': 2})", ["kivi", "bits, k, v, group"]),
        ("kivi(bits=2, bits=4)", ["bits"]),
        ("kivi(bits=3)", ["bits=3", "2 or 4"]),
        ("kivi(bits=2.5)", ["bits=2.5", "2 or 4"]),
        ("kivi(bits=True)", ["bits=True", "int", "bool"]),
        ("kivi(bits=two)", ["bits='two'", "int", "str"]),
        ("kivi(bits=1+1)", ["kivi", "bits", "1 + 1"]),
        ("kivi(bits=None)", ["k=None", "2 or 4"]),
        ("kivi(k=3)", ["k=3", "2 or 4"]),
        ("kivi(group=24)", ["group=24", "multiple of 16"]),
        ("kivi(group=0)", ["group=0", "multiple of 16"]),
        ("int(bits=9)", ["int(bits=9)", "7 or 8"]),
        ("int(basis=hadamrd)", ["basis='hadamrd'", "identity, hadamard, random"]),
        ("int(group=-1)", ["group=-1", "positive"]),
        ("int(per=page)", ["per='page'", "token or channel"]),
        ("int(clip=0)", ["clip=0.0", "more than 0"]),
        ("int(clip=1.1)", ["clip=1.1", "at most 1"]),
        ("snapkv(keep=0)", ["keep=0.0", "(0, 1]"]),
        ("snapkv(keep=1.5)", ["keep=1.5", "(0, 1]"]),
        ("snapkv(keep=nan)", ["keep='nan'", "float"]),
        ("snapkv(keep=1e999)", ["keep=inf", "(0, 1]"]),
        ("snapkv(keep=0.5, budget=10)", ["budget=10", "keep"]),
        ("snapkv(budget=0)", ["budget=0", "positive"]),
        ("snapkv(window=0)", ["window=0", "positive"]),
        ("snapkv(kernel=4)", ["kernel=4", "odd"]),
        ("snapkv(pooling=mean)", ["pooling='mean'", "avg or max"]),
        ("streaming(recent=0)", ["recent=0", "positive"]),
        ("streaming(sinks=-1)", ["sinks=-1", "zero or positive"]),
        ("quest(pages=0)", ["pages=0", "positive"]),
        ("window(recent=-1)", ["recent=-1", "zero or positive"]),
        ("kivi + int", ["at most one quantizer", "kivi(bits=2)", "int(bits=4)"]),
        ("none + kivi", ["at most one quantizer", "none", "kivi"]),
        ("quest + quest", ["at most one selector", "quest"]),
        ("window + window(recent=1)", ["at most one window"]),
        ("window(sinks=2) + streaming", ["window(sinks=2)", "streaming", "window(sinks=4, recent=0)"]),
    ],
)
def test_a_bad_spec_names_the_culprit_and_what_to_write(spec: str, named: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        Stack.parse(spec)
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize("spec", [None, 3, ["kivi"], "kivi\0", "kivi(\ud800=1)"])
def test_what_is_no_spec_is_a_spec_error(spec: object) -> None:
    with pytest.raises(SpecError):
        Stack.parse(spec)  # type: ignore[arg-type]


@given(st.text(alphabet="kivsnap(=2,)+ 'quest.\n[*", max_size=20))
@settings(deadline=None, max_examples=100)
def test_any_text_parses_or_is_a_spec_error(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(SpecError):
            Stack.parse(text)


def test_the_window_is_the_explicit_one_or_the_largest_published() -> None:
    def window(spec: str) -> tuple[int, int]:
        own = parse(spec).window
        return own.sinks, own.recent

    assert window("none") == (0, 0)
    assert window("kivi") == (0, 128)  # KIVI's residual length
    assert window("streaming(sinks=7)") == (7, 0)
    assert window("kivi + streaming(sinks=7)") == (7, 128)
    assert window("kivi + window(recent=16)") == (0, 16)
    assert window("window + kivi") == (0, 0)
    assert window("streaming(sinks=4) + window(sinks=4, recent=9)") == (4, 9)


def test_dropping_and_selecting_together_warns_and_neither_alone_does() -> None:
    with pytest.warns(KvcompWarning, match=r"snapkv.*quest"):
        Stack.parse("snapkv + kivi + quest")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Stack.parse("snapkv + kivi")
        Stack.parse("kivi + quest")


@given(group=st.integers(1, 12), quest=st.booleans())
@SETTINGS
def test_the_page_is_the_smallest_that_every_stage_accepts(group: int, quest: bool) -> None:
    stack = parse(f"kivi(group={16 * group})" + (" + quest" if quest else ""))
    assert stack.page_size == next(p for p in range(16, 10**4, 16) if p % (16 * group) == 0)


def test_page_sizes_where_stages_are_easy_going(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("none").page_size == parse("int").page_size == parse("snapkv").page_size == 64
    assert parse("quest").page_size == 16
    monkeypatch.setattr(reg, "_stages", dict(reg.stages()))

    @reg.register("odd")
    @dataclass(frozen=True)
    class Odd(Quantizer):
        multiple: int = arg(1, "what a page must be a multiple of")

        @property
        def page_multiple(self) -> int:
            return self.multiple

    for multiple in (1, 6, 16, 24, 40, 80):
        size = parse(f"odd(multiple={multiple}) + quest").page_size
        assert size % 16 == 0
        assert size == lcm(16, multiple)


def test_a_stage_of_another_package_comes_in_through_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcomp.quantizers.none import NoQuantizer

    @dataclass(frozen=True)
    class Theirs(NoQuantizer):
        strength: float = arg(1.5, "something of theirs")

    class Point:
        name = "theirs"

        def load(self) -> type:
            return Theirs

    groups = []

    def entry_points(group: str) -> list[Point]:
        groups.append(group)
        return [Point()]

    monkeypatch.setattr(reg, "_stages", dict(reg.stages()))
    monkeypatch.setattr(reg, "entry_points", entry_points)
    reg._load_all.cache_clear()
    try:
        stack = parse("theirs(strength=2) + quest")
        assert groups == ["kvcomp.stages"]
        assert stack.quantizer == Theirs(strength=2.0)
        assert parse(str(stack)) == stack
        k = torch.randn(1, 2, 70, 32)
        torch.testing.assert_close(stack.roundtrip(k, k)[0], k, rtol=0, atol=0)
        with pytest.raises(SpecError, match="strength"):
            parse("theirs(strenght=2)")
    finally:
        reg._load_all.cache_clear()


# -- what a stack holds -----------------------------------------------------------------------------------------------


def storages(store: LayerStore) -> int:
    """Bytes of the tensors that hold tokens and say where they are, listed by hand; constants shared by layers are
    not the stream's."""
    held = [store.exact.k, store.exact.v, store.pool.data, store.table.rows, store.table.counts, store.exact.counts]
    held += store.codec.adapted()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t.numel()}.values())


STACKS = [
    "none",
    "kivi",
    "kivi(bits=4, group=16) + window(recent=0)",
    "int(bits=8, basis=hadamard)",
    "int(bits=4, group=16) + window(sinks=4, recent=32)",
    "snapkv(keep=0.25) + kivi",
    "snapkv(budget=100, window=16)",
    "streaming(recent=200) + int",
    "snapkv(keep=0.5) + snapkv(keep=0.5, window=16)",
    "streaming(recent=256, sinks=4) + snapkv(keep=0.25, window=16)",
    "quest(dense_layers=0) + kivi(bits=4)",
]


@pytest.mark.parametrize("spec", STACKS)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("tokens", [1, 100, 1000, 3000])
def test_effective_bits_are_the_bits_that_a_layer_allocates(spec: str, dim: int, tokens: int) -> None:
    stack, heads = parse(spec), 2
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, heads, tokens, dim, dtype=torch.bfloat16).unbind()
    store = LayerStore(stack.plan(0, 1))
    store.start(k, v)
    store.write(k, v, None, torch.randn(1, heads, tokens, dim, dtype=torch.bfloat16), dim**-0.5)
    promised = stack.effective_bits(dim, tokens, torch.bfloat16, layers=1)
    assert promised == pytest.approx(8 * storages(store) / (heads * tokens * 2 * dim), rel=0.005)


def test_effective_bits_of_known_formats() -> None:
    """In the limit of a long context: bits + 32 / group where scales are shared by `group`, plus a table entry,
    and 16 bits for each channel of a page's centre of K."""
    long = 10**6
    table, centre = 8 * 4 / (2 * 128 * 64), 16 / (2 * 64)
    assert parse("none").effective_bits(128, long) == pytest.approx(16 + table, rel=1e-3)
    assert parse("int(bits=4)").effective_bits(128, long) == pytest.approx(4.25 + centre + table, rel=1e-3)
    assert parse("int(bits=8)").effective_bits(128, long) == pytest.approx(8.25 + centre + table, rel=1e-3)
    assert parse("kivi").effective_bits(128, long) == pytest.approx(3 + 2 * table, rel=1e-2)
    assert parse("snapkv(keep=0.25) + kivi").effective_bits(128, long) == pytest.approx(0.75 + table / 2, rel=1e-2)


@pytest.mark.parametrize("spec", ["none", "kivi", "int", "snapkv + kivi", "quest"])
def test_a_context_shorter_than_the_window_costs_more_than_dense(spec: str) -> None:
    """The exact buffer grows with what it holds, in powers of two from 16 tokens."""
    assert parse(spec).effective_bits(128, 1) > 16 * 16
    assert 16 < parse(spec).effective_bits(128, 10) < 2 * 16


def test_effective_bits_mean_over_layers_that_differ() -> None:
    stack = parse("quest(dense_layers=2)")
    plain, selective = parse("none + window(recent=0)"), parse("quest(dense_layers=0)")
    # 2 of 4 layers store summaries: 2 * 16 bits a channel of K, per page of 16 tokens, over the 2 * 16 elements
    extra = 2 * 16 / (2 * 16)
    assert selective.effective_bits(64, 16000, layers=4) - extra / 2 == pytest.approx(
        stack.effective_bits(64, 16000, layers=4), rel=1e-3
    )
    assert plain.effective_bits(64, 16000) < stack.effective_bits(64, 16000, layers=4)


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"head_dim": 0}, {"tokens": 1.5}, {"tokens": 10, "layers": 0}])
def test_effective_bits_refuse_what_is_no_count(bad: dict) -> None:
    with pytest.raises(SpecError, match=next(reversed(bad))):
        parse("kivi").effective_bits(**{"head_dim": 64, "tokens": 10, **bad})


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 15, 16, 63, 64, 65, 300])
def test_roundtrip_without_loss(n: int) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 3, n, 64), torch.randn(2, 3, n, 80)
    for spec in ("none", "quest(dense_layers=0)", "window(sinks=4, recent=17)", "snapkv(keep=1) + none"):
        back = parse(spec).roundtrip(k, v, queries=torch.randn(2, 6, n, 64))
        assert torch.equal(back[0], k)
        assert torch.equal(back[1], v)


def test_roundtrip_keeps_the_window_and_says_what_is_missing() -> None:
    torch.manual_seed(0)
    k, v = torch.randn(1, 2, 300, 64, dtype=torch.float16), torch.randn(1, 2, 300, 64, dtype=torch.float16)
    ours = parse("kivi + window(sinks=3, recent=40)").roundtrip(k, v)
    for back, x in zip(ours, (k, v), strict=True):
        assert back.dtype == x.dtype
        assert torch.equal(back[..., :3, :], x[..., :3, :])
        assert torch.equal(back[..., -40:, :], x[..., -40:, :])
        assert 0 < (back - x).abs().max() < 2
    with pytest.raises(SpecError, match=r"\(1, 2, 300, 64\).*\(1, 2, 299, 64\)"):
        parse("kivi").roundtrip(k, v[:, :, :-1])
    with pytest.raises(kvcomp.KvcompError, match=r"snapkv.*queries"):
        parse("snapkv").roundtrip(k, v)


def test_a_spec_may_span_lines() -> None:
    assert parse("snapkv(keep=0.5)\n  + kivi(bits=4)\n") == parse("snapkv(keep=0.5) + kivi(bits=4)")


def test_no_stage_at_all_is_refused() -> None:
    with pytest.raises(SpecError, match="at least one stage"):
        Stack(())
