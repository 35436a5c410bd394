"""The ledger counts storages: once each, in full, whatever the views."""

from __future__ import annotations

from math import isnan

import pytest
import torch
from far_device import FAR

from kvcomp.ledger import Memory, ReadPlan, Traffic, add_parts, storage_bytes


def test_a_storage_counts_once_and_in_full() -> None:
    base = torch.zeros(100, dtype=torch.float32)
    assert storage_bytes([base]) == 400
    assert storage_bytes([base, base, base[3:7], base.view(10, 10).T]) == 400
    assert storage_bytes([base[3:7]]) == 400  # a small view keeps all of it alive
    assert storage_bytes([base.expand(50, 100)]) == 400  # and a large one owns no more
    assert storage_bytes([base, base.clone()]) == 800
    assert storage_bytes([torch.zeros(0), torch.zeros(3, 0)]) == 0
    assert storage_bytes([]) == 0


def test_what_was_seen_is_not_counted_again() -> None:
    a, b, seen = torch.zeros(10, dtype=torch.uint8), torch.zeros(7, dtype=torch.uint8), set()
    assert storage_bytes([a], seen) == 10
    assert storage_bytes([a[2:], b], seen) == 7
    assert storage_bytes([a, b], seen) == 0


def test_parts_add_up_without_empty_entries() -> None:
    assert add_parts([{"a": 1, "b": 2}, {"a": 3, "c": 0}, {}]) == {"a": 4, "b": 2}


def test_what_was_read_is_summed_when_somebody_asks() -> None:
    plan, count = ReadPlan(), torch.tensor([1, 2, 3])
    plan.add("pages", 10, count)
    plan.add("table", 7)
    plan.add("pages", 2, 5)
    count += 100  # the host's numbers are taken at once
    assert plan.bytes() == {"pages": 70, "table": 7}
    assert plan.tensors == []
    plan.add("pages", 10, torch.zeros(3, dtype=torch.int64, device=FAR))
    assert [x.device for x in plan.tensors] == [FAR]
    with pytest.raises(RuntimeError, match="item"):
        plan.bytes()


def test_ratios() -> None:
    assert Memory(held=50, dense=200, effective_bits=4.0, parts={}).ratio == 4
    assert Traffic(read=400, dense=200, parts={}).ratio == 0.5
    assert isnan(Memory(0, 0, 0.0, {}).ratio)
    assert isnan(Traffic(0, 0, {}).ratio)
