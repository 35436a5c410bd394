"""Pages: fields that do not touch, a pool that grows cheaply and reuses, a table that stays ragged."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp.cache.pool import PagePool, PageTable
from kvcomp.layout import Field, PageLayout

SETTINGS = settings(deadline=None, max_examples=25)
CPU = torch.device("cpu")
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn]


@st.composite
def layouts(draw: st.DrawFn) -> PageLayout:
    fields = []
    for i in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        summary = draw(st.booleans())
        fields.append(Field(f"{'summary.' if summary else ''}f{i}", shape, draw(st.sampled_from(DTYPES))))
    return PageLayout(16, tuple(sorted(fields, key=lambda f: f.name.startswith("summary."))))  # summaries come last


def random_fields(layout: PageLayout, pages: int) -> dict[str, torch.Tensor]:
    """Random bytes as the fields of some pages."""
    return {
        f.name: torch.randint(0, 256, (pages, prod(f.shape) * f.dtype.itemsize), dtype=torch.uint8)
        .view(f.dtype)
        .view(pages, *f.shape)
        for f in layout.fields
    }


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.numel() == 0 or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@given(layouts())
@settings(deadline=None, max_examples=50)
def test_fields_lie_aligned_apart_and_inside_the_record(layout: PageLayout) -> None:
    owner = [""] * layout.bytes_per_page
    for f in layout.fields:
        start = layout.offsets[f.name]
        assert start % 16 == 0
        for at in range(start, start + prod(f.shape) * f.dtype.itemsize):
            assert owner[at] == ""
            owner[at] = f.name
    assert layout.bytes_per_page % 16 == 0
    assert owner.count("") < 16 * len(layout.fields)  # nothing but alignment is wasted
    assert layout.body_bytes + layout.summary_bytes == layout.bytes_per_page
    for part, summary in ((layout.summary_bytes, True), (layout.body_bytes, False)):
        inside = sum(bool(name) and name.startswith("summary.") == summary for name in owner)
        assert inside <= part


@given(layouts(), st.integers(1, 5), st.data())
@SETTINGS
def test_written_fields_are_read_back_in_place(layout: PageLayout, pages: int, data: st.DataObject) -> None:
    pool = PagePool(layout, CPU)
    pool.allocate(pages + 2)
    ids = torch.tensor(data.draw(st.permutations(range(pages + 2)))[:pages])
    others = [i for i in range(pages + 2) if i not in ids]
    pool.data.fill_(77)
    written = random_fields(layout, pages)
    pool.write(ids, written)
    for summary in (False, True):
        views = layout.views(pool.data, summary)
        assert set(views) == {f.name for f in layout.fields if f.name.startswith("summary.") == summary}
        for name, view in views.items():
            assert view.untyped_storage().data_ptr() == pool.data.untyped_storage().data_ptr()  # a view, no copy
            assert same_bytes(view[ids], written[name])
    assert bool((pool.data[others] == 77).all())


@given(layouts(), st.booleans(), st.data())
@SETTINGS
def test_gathered_fields_are_those_written_and_nothing_else_is_touched(
    layout: PageLayout, summary: bool, data: st.DataObject
) -> None:
    pool = PagePool(layout, CPU)
    written = random_fields(layout, 5)
    pool.write(pool.allocate(5), written)
    shape = data.draw(st.sampled_from([(4,), (2, 3), (1,), (0,), (2, 0)]))
    ids = torch.randint(0, 5, shape, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    gathered = layout.gather(pool.data, ids, summary)
    assert set(gathered) == {f.name for f in layout.fields if f.name.startswith("summary.") == summary}
    for name, field in gathered.items():
        assert same_bytes(field, written[name][ids.long()])
        assert field.untyped_storage().data_ptr() != pool.data.untyped_storage().data_ptr()


def test_summaries_come_last() -> None:
    body, summary = Field("k", (4,), torch.uint8), Field("summary.min", (4,), torch.uint8)
    assert PageLayout(16, (body, summary)).body_bytes == PageLayout(16, (body, summary)).offsets["summary.min"]
    with pytest.raises(AssertionError, match="summaries"):
        PageLayout(16, (summary, body))


# -- pool -------------------------------------------------------------------------------------------------------------

PLAIN = PageLayout(16, (Field("x", (16,), torch.uint8),))


def test_the_first_allocation_is_exact() -> None:
    pool = PagePool(PLAIN, CPU)
    assert pool.allocate(1000).tolist() == list(range(1000))
    assert pool.capacity == 1000
    assert pool.free == []


@pytest.mark.parametrize("step", [1, 3, 8])
def test_growth_copies_a_constant_number_of_bytes_a_page(step: int) -> None:
    def copied(pages: int) -> int:
        pool, total = PagePool(PLAIN, CPU), 0
        pool.allocate(100)
        for _ in range(0, pages, step):
            before, old = pool.data.data_ptr(), pool.capacity
            pool.allocate(step)
            if pool.data.data_ptr() != before:
                total += old
            assert len(pool.free) < 0.07 * pool.capacity
        return total

    small, large = copied(2000), copied(16000)
    assert large < 20 * 16000
    assert large < 10 * small  # eight times the pages: linear, where copying at every step would be 64 times


def test_growth_keeps_what_was_written() -> None:
    pool, seen = PagePool(PLAIN, CPU), {}
    for i in range(300):
        (page,) = pool.allocate(1).tolist()
        assert page not in seen
        seen[page] = i % 251
        pool.write(torch.tensor([page]), {"x": torch.full((1, 16), i % 251, dtype=torch.uint8)})
    for page, value in seen.items():
        assert bool((pool.data[page] == value).all())


def test_freed_pages_are_used_again_before_the_pool_grows() -> None:
    pool = PagePool(PLAIN, CPU)
    pool.allocate(10)
    before = pool.data.data_ptr()
    pool.free = [3, 7]
    assert sorted(pool.allocate(2).tolist()) == [3, 7]
    assert pool.data.data_ptr() == before
    assert pool.allocate(0).tolist() == []
    pool.free = [5]
    assert 5 in (ids := pool.allocate(3).tolist())
    assert len(set(ids)) == 3
    assert sorted(set(ids) - {5})[0] >= 10


# -- table ------------------------------------------------------------------------------------------------------------


def listed(table: PageTable) -> list[list[int]]:
    ids, counts = table.ids(), table.counts.tolist()
    assert ids.dtype == torch.int32
    assert ids.shape == (len(counts), max(counts, default=0))
    for row, count in zip(ids, counts, strict=True):
        assert bool((row[count:] == 0).all())
    return [row[:count].tolist() for row, count in zip(ids, counts, strict=True)]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_the_table_is_a_list_of_lists(data: st.DataObject) -> None:
    table, model, fresh = PageTable(3, CPU, watched=True), [[], [], []], iter(range(1, 10**6))
    received: dict[int, float] = {}  # per page: its id over the two queries that every watch counts
    for _ in range(data.draw(st.integers(1, 12))):
        streams = len(model)
        amounts = [data.draw(st.integers(0, len(row))) for row in model]
        match data.draw(st.sampled_from(["append", "append", "drop", "newest", "select", "watch"])):
            case "append":
                chosen = data.draw(st.lists(st.integers(0, streams - 1), min_size=1, unique=True))
                m = data.draw(st.integers(0, 4))
                ids = [[next(fresh) for _ in range(m)] for _ in chosen]
                table.append(torch.tensor(chosen), torch.tensor(ids, dtype=torch.int64).view(len(chosen), m))
                for stream, row in zip(chosen, ids, strict=True):
                    model[stream] = model[stream] + row
            case "drop":
                gone = [[data.draw(st.booleans()) for _ in row] for row in model]
                mask = torch.zeros(streams, table.longest, dtype=torch.bool)
                for stream, row in enumerate(gone):
                    mask[stream, : len(row)] = torch.tensor(row, dtype=torch.bool)
                table.drop(mask)
                model = [
                    [x for x, g in zip(row, g_, strict=True) if not g] for row, g_ in zip(model, gone, strict=True)
                ]
            case "watch":
                mass = torch.full((streams, table.longest), 99.0)
                for stream, row in enumerate(model):
                    mass[stream, : len(row)] = torch.tensor([float(page) for page in row])
                table.watch(mass, 2)
                received |= {page: page / 2 for row in model for page in row}
            case "newest":
                table.drop_newest(torch.tensor(amounts))
                model = [row[: len(row) - a] for row, a in zip(model, amounts, strict=True)]
            case "select":
                chosen = data.draw(st.lists(st.integers(0, streams - 1), min_size=1, max_size=4))
                table.select(torch.tensor(chosen))
                model = [list(model[i]) for i in chosen]
        assert listed(table) == model
        watched = table.attention()
        assert watched is not None
        attention, queries = watched
        assert torch.equal(queries > 0, attention > 0)
        for stream, row in enumerate(model):
            assert attention[stream, : len(row)].tolist() == [received.get(page, 0.0) for page in row]
            assert not bool(attention[stream, len(row) :].any())
        assert table.total == sum(map(len, model))
        assert table.longest == max(map(len, model))
        assert table.owned().tolist() == sorted({page for row in model for page in row})


def test_appending_one_page_at_a_time_is_amortised() -> None:
    table, moves = PageTable(2, CPU), 0
    for i in range(4000):
        before = table.rows.data_ptr(), table.rows.shape[1]
        table.append(torch.tensor([0, 1]), torch.tensor([[i], [i]]))
        moves += before[1] if table.rows.data_ptr() != before[0] else 0
        assert table.rows.shape[1] <= table.longest * 17 / 16 + 1
    assert moves < 20 * 4000


# -- reclaim ----------------------------------------------------------------------------------------------------------


@given(st.data())
@SETTINGS
def test_reclaim_keeps_every_owned_page_and_frees_every_other(data: st.DataObject) -> None:
    pool, table = PagePool(PLAIN, CPU), PageTable(2, CPU, watched=True)
    pool.join(table)
    n = data.draw(st.integers(1, 30))
    ids = pool.allocate(2 * n).view(2, n)
    pool.free = pool.allocate(data.draw(st.integers(0, 3))).tolist()  # pages that were never given out
    pool.write(ids.flatten(), {"x": torch.arange(2 * n, dtype=torch.uint8)[:, None].expand(-1, 16)})
    table.append(torch.tensor([0, 1]), ids)
    if data.draw(st.booleans()):
        table.select(torch.tensor([1, 1, 0] if data.draw(st.booleans()) else [1]))  # shared pages; a dropped stream
    drop = torch.tensor([data.draw(st.integers(0, n)) for _ in table.counts])
    if data.draw(st.booleans()):
        table.drop_newest(drop)
    else:
        table.drop(torch.arange(table.longest) < drop[:, None])

    before = [[int(pool.data[page, 0]) for page in row] for row in listed(table)]
    pool.reclaim()
    after = listed(table)
    assert [[int(pool.data[page, 0]) for page in row] for row in after] == before
    owned = {page for row in after for page in row}
    assert owned | set(pool.free) == set(range(pool.capacity))
    assert not owned & set(pool.free)
    assert len(pool.free) == len(set(pool.free))
    assert len(pool.free) * 4 <= pool.capacity  # memory is given back

    fresh = pool.allocate(3)
    assert not owned & set(fresh.tolist())
    pool.write(fresh, {"x": torch.full((3, 16), 255, dtype=torch.uint8)})
    assert [[int(pool.data[page, 0]) for page in row] for row in listed(table)] == before
    table.drop_newest(torch.zeros_like(table.counts))  # what pages received is as wide as the table
    assert [[int(pool.data[page, 0]) for page in row] for row in listed(table)] == before
