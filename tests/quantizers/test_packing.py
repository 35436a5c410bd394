"""Codes of any width come back, and take no more than their bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomp import SpecError
from kvcomp.quantizers.packing import code_fields, pack_codes, planes, unpack_codes


@given(
    bits=st.integers(1, 8), tokens=st.integers(1, 40), dim=st.sampled_from([8, 24, 64, 80, 96]), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=60)
def test_codes_of_any_width_come_back(bits: int, tokens: int, dim: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, tokens, dim), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    page = pack_codes("k", codes, bits)
    fields = code_fields("k", bits, tokens, dim)
    assert {f.name: f.shape for f in fields} == {name: tuple(t.shape[1:]) for name, t in page.items()}
    assert 8 * sum(f.nbytes for f in fields) == bits * tokens * dim
    assert unpack_codes("k", page, bits).tolist() == codes.tolist()


def test_planes_add_up() -> None:
    assert [planes(b) for b in (1, 2, 3, 5, 7, 8)] == [[1], [2], [2, 1], [4, 1], [4, 2, 1], [8]]


def test_rows_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(SpecError, match="20 channels, which 3-bit codes"):
        code_fields("v", 3, 16, 20)
