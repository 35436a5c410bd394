"""Rules against their definitions, summaries in 16 and 8 bits, and what selectors leave untouched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import save, write
from torch import Tensor

from kvcomp import Stack
from kvcomp.attention import attend
from kvcomp.cache.layer import LayerStore
from kvcomp.cache.reader import choose
from kvcomp.errors import SpecError
from kvcomp.kernels.select import vectors
from kvcomp.sparse.dsa import DSA, Traces
from kvcomp.sparse.moba import MEAN, MoBA
from kvcomp.sparse.nsa import NSA
from kvcomp.sparse.quest import MAX, MIN, Quest
from kvcomp.sparse.ranked import RankedSelector
from kvcomp.sparse.sketch import Sketch
from kvcomp.sparse.summaries import SCALE
from kvcomp.stages import PageShape, Summaries
from kvcomp.stages.plan import held_parts, read_parts

QUANTIZERS = (
    "none",
    "kivi(bits=4)",
    "int(bits=4, basis=hadamard)",
    "turboquant(bits=4)",
    "klt(bits=4)",
)
MORE = ("int8", "fp8", "nvfp4", "mxfp4", "turboquant(bits=2.5)", "int(bits=2, per=channel)", "oscar", "svd", "think")
RULES = ("pages=3", "keep=0.2", "top_p=0.4", "threshold=0.2")
SELECTORS = {"quest": "dense_layers=0, min_pages=0, ", "moba": "", "nsa": "first=0, last=0, ", "sketch": "rank=12, "}
VECTORS = ("quest", "moba", "nsa")
BY_TOKENS = ("sketch", "dsa")
NAMES = (*VECTORS, *BY_TOKENS)
MAGNITUDES = [1e-8, 1e-6, 1e-3, 1.0, 300.0, 5e4]


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Calibrated quantizers, and what `dsa` needs: for the 2 heads of `store_of`, each of 4 query heads."""
    torch.manual_seed(1)
    seen = Traces()
    seen.add(torch.randn(1, 8, 200, 64), torch.randn(1, 2, 200, 64), torch.zeros(0))
    file = save(tmp_path_factory.mktemp("dsa") / "dsa.safetensors", "dsa", [seen])
    SELECTORS["dsa"] = f"calibration={str(file)!r}, "
    folder = tmp_path_factory.mktemp("quantizers")
    return {
        name: f"{name}(calibration={str(write(folder / name, name, 2, 64))!r})" for name in ("oscar", "svd", "think")
    }


def store_of(spec: str, tokens: int = 333, seed: int = 0, lengths: tuple[int, ...] = (333, 301, 23)) -> LayerStore:
    """A store of 3 rows of so many tokens and 2 heads, whose keys lie in clusters as long as a page."""
    torch.manual_seed(seed)
    k, v = (torch.randn(len(lengths), 2, tokens, 64) for _ in range(2))
    k += torch.randn(len(lengths), 2, -(-tokens // 16), 64).repeat_interleave(16, 2)[:, :, :tokens]
    store = LayerStore(Stack.parse(spec).plan(0, 1))
    store.start(k, v)
    q = torch.randn(len(lengths), 8, tokens, 64)
    store.write(k, v, torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None], q)
    return store


def read_pages(store: LayerStore, q: Tensor) -> Tensor:
    """bool [S, longest], times the tokens of a page if single ones are read: what queries [B, Hq, 1, D] choose."""
    grouped = q.view(store.rows * store.heads, -1, q.shape[-1])
    choice, _ = choose(store.records, store.storage.view(), grouped, 0.125)
    assert choice is not None
    positions, valid = choice
    places = torch.arange(positions.shape[1]) < valid[:, None]
    each = store.layout.page_size if store.records.by_tokens else 1
    read = torch.zeros(len(positions), store.table.longest * each, dtype=torch.bool)
    read[torch.arange(len(positions))[:, None].expand_as(positions)[places], positions[places]] = True
    assert bool((read.sum(1) == valid).all())
    return read


# -- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(RankedSelector):
    """Takes its logits [S, n, G] from the summary."""

    name = "given"

    @property
    def default(self) -> tuple[str, float]:
        return "pages", 4

    def logits(self, queries: Tensor, summary: Mapping[str, Tensor]) -> Tensor:
        return summary["logits"].mT


def by_definition(rule: RankedSelector, shares: list[float]) -> tuple[list[int], float]:
    """The pages that a stream reads, and how far the next smaller or larger choice was."""
    n = len(shares)
    forced = [p < rule.first or p >= n - rule.last for p in range(n)]
    order = sorted(range(n), key=lambda p: (not forced[p], -shares[p]))
    sums = [sum(shares[p] for p in order[: i + 1]) for i in range(n)]
    gap = 1.0
    if rule.pages is not None:
        count = rule.pages
    elif rule.keep is not None:
        count = max(round(rule.keep * n), 1)
    elif rule.top_p is not None:
        count = next((i + 1 for i, total in enumerate(sums) if total >= rule.top_p), n)
        gap = min((abs(total - rule.top_p) for total in sums), default=1.0)
    else:
        count = sum(forced[p] or shares[p] >= rule.threshold for p in range(n))
        gap = min((abs(share - rule.threshold) for share in shares), default=1.0)
    count = min(max(count, rule.min_pages, rule.first + rule.last), n)
    if 0 < count < n and forced[order[count - 1]] == forced[order[count]]:
        gap = min(gap, shares[order[count - 1]] - shares[order[count]])
    return sorted(order[:count]), gap


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    rule=st.sampled_from(
        [{"pages": 1}, {"pages": 5}, {"keep": 0.1}, {"keep": 0.5}, {"keep": 1.0}]
        + [{"top_p": p} for p in (0.05, 0.5, 0.95)]
        + [{"threshold": x} for x in (0.01, 0.1, 0.4)]
    ),
    first=st.integers(0, 2),
    last=st.integers(0, 3),
    minimum=st.integers(0, 4),
    heads=st.sampled_from([("own", 1), ("own", 2), ("common", 1), ("common", 2), ("common", 3)]),
    group=st.sampled_from([1, 3]),
    size=st.sampled_from([0.5, 5.0]),
    garbage=st.sampled_from([1e4, float("nan"), float("inf")]),
)
@settings(deadline=None, max_examples=300)
def test_rules_are_their_definitions(
    seed: int,
    counts: list[int],
    rule: dict[str, float],
    first: int,
    last: int,
    minimum: int,
    heads: tuple[str, int],
    group: int,
    size: float,
    garbage: float,
) -> None:
    torch.manual_seed(seed)
    how, per_row = heads
    counts = [c for c in counts for _ in range(per_row)] if seed % 2 else counts * per_row  # alike in a row, or not
    n, scale = max(*counts, 1), 0.7
    logits = size * torch.randn(len(counts), n, group)
    for s, count in enumerate(counts):
        logits[s, count:] = garbage
    ruled = Given(**rule, heads=how, first=first, last=last, min_pages=minimum)
    positions, valid = ruled.select(
        torch.zeros(0), scale, Summaries({"logits": logits}, torch.tensor(counts), per_row, 16)
    )
    assert positions.dtype == torch.int64
    assert positions.shape == (len(counts), max(int(valid.max()), 1))
    assert 0 <= int(positions.min()) <= int(positions.max()) < n
    shares = [(scale * logits[s, :c].double()).softmax(0).mean(-1) for s, c in enumerate(counts)]
    for s, count in enumerate(counts):
        row = range(s - s % per_row, s - s % per_row + per_row)
        common = how == "common" and len({counts[i] for i in row}) == 1
        own = torch.stack([shares[i] for i in row]).mean(0) if common else shares[s]
        expected, gap = by_definition(ruled, own.tolist())
        read = positions[s, : int(valid[s])].tolist()
        assert len(read) <= ruled.reads(count, 16)
        if ruled.top_p is None and ruled.threshold is None:
            assert len(read) == ruled.reads(count, 16)
        if gap > 1e-6:  # closer than float32 can tell
            assert read == expected


def test_one_rule_at_a_time() -> None:
    defaults = ((Quest, "pages=64"), (MoBA, "pages=12"), (NSA, "pages=16"), (Sketch, "keep=0.1"), (DSA, "tokens=2048"))
    for cls, rule in defaults:
        assert str(Stack((cls(),))) == f"{cls.name}({rule})"
        assert Stack((cls(keep=0.1),)) == Stack.parse(str(Stack((cls(keep=0.1),))))
    assert str(Stack.parse("quest(top_p=0.9, heads=common)")) == "quest(top_p=0.9, heads=common)"
    assert Quest() == Quest(pages=64, dense_layers=2, min_pages=3)
    assert MoBA() == MoBA(pages=12, last=1)
    with pytest.raises(SpecError, match=r"quest\(keep=0.1\): keep must be left out where pages is given"):
        Quest(pages=8, keep=0.1)
    for spec, accepted in {
        "moba(pages=0)": "pages must be positive",
        "quest(keep=0)": r"keep must be in \(0, 1\]",
        "quest(top_p=1.1)": r"top_p must be in \(0, 1\]",
        "moba(threshold=-1)": r"threshold must be in \(0, 1\]",
        "moba(heads=all)": "heads must be own or common",
        "moba(first=-1)": "first must be zero or positive",
        "moba(last=-1)": "last must be zero or positive",
        "quest(min_pages=-1)": "min_pages must be zero or positive",
        "quest(summary_bits=4)": "summary_bits must be 8 or 16",
        "quest(share=0)": "share must be positive",
        "quest(tokens=0)": "tokens must be positive",
        "nsa(block=24)": "block must be a divisor of 64",
        "nsa(share=2)": "share must be 1",
        "sketch(rank=3)": "rank must be positive and even",
        "sketch(bits=2)": "bits must be 4 or 8",
        "dsa(rank=18)": "rank must be at most 16",
    }.items():
        with pytest.raises(SpecError, match=accepted):
            Stack.parse(spec)


# -- summaries --------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    dim=st.sampled_from([1, 8, 12, 64, 80]),
    size=st.sampled_from([1, 16]),
    scale=st.sampled_from(MAGNITUDES),
    offset=st.sampled_from([0.0, *MAGNITUDES]),
    bits=st.sampled_from([8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=150)
def test_quest_bounds_every_key(
    seed: int, dim: int, size: int, scale: float, offset: float, bits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    keys = scale * torch.randn(5, size, dim) + offset * torch.randn(5, 1, dim).sign()
    keys = keys.clamp(-6e4, 6e4).to(dtype)
    quest = Quest(summary_bits=bits)
    summary = quest.summarize(keys, keys)
    shape = PageShape(size, dim, dim, 1, dtype, torch.device("cpu"), 2)
    assert {name: (t.dtype, t.shape[1:]) for name, t in summary.items()} == {
        f.name: (f.dtype, f.shape) for f in quest.summary_fields(shape)
    }
    low, high, exact = vectors(summary, MIN, SCALE).double(), vectors(summary, MAX, SCALE).double(), keys.double()
    assert bool((low <= exact.amin(1)).all())
    assert bool((high >= exact.amax(1)).all())
    runs = 8 if dim % 8 == 0 else 4 if dim % 4 == 0 else 1
    largest = exact.abs().amax(1).unflatten(-1, (runs, -1)).amax(-1).repeat_interleave(dim // runs, -1)  # [M, D]
    step = 2**-8 * largest if bits == 16 else largest / 120
    assert bool((exact.amin(1) - low <= step + 1e-6).all())
    assert bool((high - exact.amax(1) <= step + 1e-6).all())
    q = torch.randn(1, 3, dim)
    bound = quest.logits(q, {name: t[None] for name, t in summary.items()})[0].double()
    logits = torch.einsum("gd,mpd->gmp", q[0].double(), exact).amax(-1)
    assert bool((bound >= logits - 1e-5 * torch.einsum("gd,mpd->gmp", q[0].double().abs(), exact.abs()).amax(-1)).all())


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 2**-11), (8, 1 / 250)])
def test_moba_means(bits: int, tolerance: float) -> None:
    torch.manual_seed(0)
    keys, q = torch.randn(4, 64, 32), torch.randn(1, 5, 32)
    moba = MoBA(summary_bits=bits)
    summary = moba.summarize(keys, keys)
    mean = keys.mean(1)
    assert float((vectors(summary, MEAN, SCALE) - mean).abs().max()) <= tolerance * float(mean.abs().max())
    got = moba.logits(q, {name: t[None] for name, t in summary.items()})
    torch.testing.assert_close(got[0], q[0] @ mean.T, atol=0.05, rtol=0)


# -- attention --------------------------------------------------------------------------------------------------------


EVERYTHING = ("pages=999", "tokens=9999", "keep=1.0", "top_p=1.0, min_pages=99", "threshold=0.9, last=99")


@pytest.mark.parametrize(
    ("quantizer", "rule"), [*product(QUANTIZERS, EVERYTHING), *((quantizer, "keep=1.0") for quantizer in MORE)]
)
@pytest.mark.parametrize("name", NAMES)
def test_everything_read_is_dense_attention(files: dict[str, str], name: str, quantizer: str, rule: str) -> None:
    quantizer = files.get(quantizer, quantizer)
    own = SELECTORS[name].replace("min_pages=0, ", "").replace("last=0, ", "")
    store = store_of(f"{quantizer} + {name}({own}{rule}) + window(sinks=2, recent=16)")
    assert store.table.counts.min() == 0 < store.table.counts.max()
    q = torch.randn(3, 8, 1, 64)
    ours = store.attend(q, 0.125)
    for s in range(6):
        keys, values = store._tokens(s)
        part = attend(q.view(6, 4, 64)[s : s + 1], keys[None], values[None], 0.125)
        torch.testing.assert_close(ours.out.view(6, 4, 64)[s], part.out[0], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(ours.lse.view(6, 4)[s], part.lse[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_read_is_never_touched(name: str, quantizer: str, rule: str) -> None:
    if name in BY_TOKENS and "kivi" not in quantizer:
        rule = rule.replace("threshold=0.2", "threshold=0.02")  # a token has less
    store = store_of(f"{quantizer} + {name}({SELECTORS[name]}{rule}) + window(recent=16)")
    q = 2 * torch.randn(3, 8, 1, 64)
    before, read = store.attend(q, 0.125), read_pages(store, q)
    each = store.layout.page_size if store.records.by_tokens else 1
    assert store.records.by_tokens == (name in BY_TOKENS and "kivi" not in quantizer)
    assert 0 < int(read.sum()) < store.table.total * each
    pages = int(read.sum()) // each * store.layout.body_bytes
    if store.records.by_tokens:  # q . centre is added to logits: those of all pages, or of each of fewer tokens
        few = int(read.sum(1).max()) < store.table.longest
        pages += (int(read.sum()) if few else store.table.total) * store.layout.centre_bytes
    assert store.read["pages"] == pages
    unread = (torch.arange(read.shape[1]) < store.table.counts[:, None] * each) & ~read
    if store.records.by_tokens:
        stream, token = unread.nonzero().unbind(1)
        page = store.table.ids()[stream, token // each].long()
        for field in store.layout.token_fields:  # a page may be another stream's, too: there are no such here
            row, at = field.nbytes // each, store.layout.offsets[field.name] + token % each * field.nbytes // each
            store.pool.data[page[:, None], at[:, None] + torch.arange(row)] = 0xFF
    else:
        store.pool.data[store.table.ids()[unread].long(), : store.layout.body_bytes] = 0xFF
    store.pool.data[store.pool.free] = 0xFF
    after = store.attend(q, 0.125)
    assert torch.equal(before.out, after.out)
    assert torch.equal(before.lse, after.lse)


@pytest.mark.parametrize("name", NAMES)
def test_a_common_choice_is_the_same_for_all_heads(name: str) -> None:
    rest = "pages=3, heads={}) + window(recent=16)"
    own, common = (store_of(f"{name}({SELECTORS[name]}{rest.format(how)}") for how in ("own", "common"))
    q = 2 * torch.randn(3, 8, 1, 64)
    read = read_pages(common, q).unflatten(0, (3, 2))
    assert torch.equal(read[:, 0], read[:, 1])
    assert not torch.equal(read.flatten(0, 1), read_pages(own, q))
    if name in BY_TOKENS:
        return
    common.table.drop(torch.arange(common.table.longest)[None] < torch.tensor([[1]] + [[0]] * 5))
    with_gap = replace(common.plan.selector, heads="own")
    common_read = read_pages(common, q)
    common.plan = replace(common.plan, selector=with_gap)
    assert torch.equal(common_read[:2], read_pages(common, q)[:2])  # whose heads differ chooses by head


# -- bytes ------------------------------------------------------------------------------------------------------------

STACKS = [(name, f"{rule}, summary_bits={bits}") for name in VECTORS for rule in RULES for bits in (16, 8)] + [
    (name, f"{rule}, bits={bits}, rank=8") for name in BY_TOKENS for rule in RULES for bits in (4, 8)
]


@pytest.mark.parametrize(("name", "arguments"), STACKS)
@pytest.mark.parametrize("tokens", [1, 70, 777])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_planned(name: str, arguments: str, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = f"{name}({SELECTORS[name].replace('rank=12, ', '')}{arguments})"
    k, v = torch.randn(2, 2, tokens, 64).to(dtype), torch.randn(2, 2, tokens, 32).to(dtype)
    store = LayerStore(Stack.parse(spec + " + int(bits=4) + window(sinks=2, recent=5)").plan(0, 1))
    store.start(k, v)
    store.write(k, v, None)
    given = (store.plan, 64, 32, tokens, dtype)
    held = {part: size for part, size in store.held(set()).items() if size and part not in ("constants", "history")}
    planned = {part: 4 * size for part, size in held_parts(*given).items()}
    adapted = sum(t.nbytes for t in store.codec.adapted())
    if name != "sketch":
        assert planned.pop("constants", 0) == adapted
    elif store.table.total:
        fitted = store.records.index.queries.fitted.nbytes
        shared = sum(t.nbytes for t in store.codec.constants()) - adapted
        assert planned.pop("constants") == store.held(set())["constants"] - fitted - shared
    assert held == planned
    store.append(k[:, :, :1], v[:, :, :1])
    store.attend(torch.randn(2, 8, 1, 64).to(dtype), 0.125)
    planned, read = ({part: size for part, size in x.items() if size} for x in (read_parts(*given), store.read))
    planned = {part: 4 * size for part, size in planned.items()}
    if "top_p" in arguments or "threshold" in arguments:
        assert read.pop("pages", 0) <= planned.pop("pages", 0)
    assert read == planned


def test_eight_bits_scan_about_half() -> None:
    for name, at_most in (("quest", 0.57), ("moba", 0.63)):
        sixteen, eight = (store_of(f"{name}({SELECTORS[name]}summary_bits={bits})") for bits in (16, 8))
        assert eight.layout.summary_bytes <= at_most * sixteen.layout.summary_bytes
