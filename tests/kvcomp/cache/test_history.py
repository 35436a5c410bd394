"""History: logical lengths and padding are those of a plain list of columns."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp.cache.history import History


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_history_is_a_list_of_columns(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    history, model = History(), [[] for _ in range(rows)]  # per row: was the column a real token?
    history.start(rows)
    assert history.valid() is None
    for _ in range(data.draw(st.integers(1, 10))):
        length = len(model[0])
        match data.draw(st.sampled_from(["append", "append", "crop", "select"])):
            case "append":
                n = data.draw(st.integers(1, 5))
                padded = data.draw(st.booleans())
                mask = [[data.draw(st.booleans()) if padded else True for _ in range(n)] for _ in model]
                history.append(n, torch.tensor(mask) if padded else None)
                model = [row + more for row, more in zip(model, mask, strict=True)]
            case "crop":
                n = data.draw(st.integers(0, length))
                history.crop(n)
                model = [row[: length - n] for row in model]
            case "select":
                chosen = data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=4))
                history.select(torch.tensor(chosen))
                model = [list(model[i]) for i in chosen]
        length = len(model[0])
        assert history.length == length
        assert history.counts.tolist() == [sum(row) for row in model]
        for n in range(length + 1):
            assert history.newest(n).tolist() == [sum(row[length - n :]) for row in model]
        valid = history.valid()
        if valid is None:
            assert all(all(row) for row in model)
        else:
            assert valid.tolist() == model


def test_decoding_stores_nothing_per_step() -> None:
    history = History()
    history.start(2)
    history.append(7, torch.tensor([[False] * 3 + [True] * 4, [True] * 7]))
    before = sum(t.nbytes for t in history.tensors())
    for _ in range(1000):
        history.append(1, None)
    assert sum(t.nbytes for t in history.tensors()) == before
    assert len(history.runs) == 2
    assert history.counts.tolist() == [1004, 1007]
