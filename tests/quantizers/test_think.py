"""ThinK: the channels of the largest query-driven score, exact where kept, zero elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import chunk, write

from kvcomp import SpecError, Stack
from kvcomp.quantizers.think import selection
from kvcomp.stages import PageShape

CPU = torch.device("cpu")
OPEN = "window(sinks=0, recent=0)"


def shape(heads: int, dim: int, page: int = 64, dtype: torch.dtype = torch.float32) -> PageShape:
    return PageShape(page, dim, dim, heads, dtype, CPU, 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("think") / "c.safetensors", "think", 3, 32)


def chosen(channels: int) -> torch.Tensor:
    """bool [3, 32]: by |Q_c|^2 |K_c|^2 (section 3 of the paper), summed with loops over the chunk of the file."""
    q, k, _ = chunk(3, 32)
    mask = torch.zeros(3, 32, dtype=torch.bool)
    for h in range(3):
        score = [float(q[0, 2 * h : 2 * h + 2, :, c].norm() ** 2 * k[0, h, :, c].norm() ** 2) for c in range(32)]
        mask[h, sorted(range(32), key=lambda c: -score[c])[:channels]] = True
    return mask


@pytest.mark.parametrize("channels", [8, 24, 32])
def test_kept_channels_are_exact_and_the_others_zero(channels: int, file: Path) -> None:
    _, k, v = chunk(3, 32)
    k, v = (torch.cat([x, -x]) for x in (k, v))  # two rows
    back_k, back_v = Stack.parse(f"think(keep={channels}, calibration={str(file)!r}) + {OPEN}").roundtrip(k, v)
    assert torch.equal(back_v, v)
    assert torch.equal(back_k, k * chosen(channels)[None, :, None])


def test_with_bits_kept_channels_are_those_of_kivi(file: Path) -> None:
    _, k, v = chunk(3, 32)
    ours = Stack.parse(f"think(keep=16, bits=4, calibration={str(file)!r}) + {OPEN}").roundtrip(k, v)
    kivi = Stack.parse(f"kivi(bits=4) + {OPEN}").roundtrip(k, v)
    mask = chosen(16)[None, :, None]
    torch.testing.assert_close(ours[0], kivi[0] * mask, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[1], kivi[1])


@pytest.mark.parametrize("bits", [None, 4])
def test_pruned_channels_are_not_read_either(bits: int | None, file: Path) -> None:
    codec, _ = Stack.parse(f"think(keep=16, bits={bits}, calibration={str(file)!r})").plan(0, 1).build(shape(3, 32))
    q, k, v = torch.randn(3, 6, 64, 32, generator=torch.Generator().manual_seed(0)).unbind()
    decoded = codec.decode(codec.encode(k, v, torch.arange(6)))
    rotated, bias = codec.read_query(q)
    assert decoded[0].shape[-1] == rotated.shape[-1] == 16
    assert bias is None
    plain = codec.inverse(*decoded, torch.arange(6))[0]
    torch.testing.assert_close(rotated @ decoded[0].mT, q @ plain.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [None, 2, 4])
def test_bytes_are_those_of_the_kept_channels(dim: int, bits: int | None) -> None:
    channels = {64: 40, 80: 48, 96: 56, 128: 80, 256: 152}[dim]
    layout = (
        Stack.parse(f"think(bits={bits}, group=16)").plan(0, 1).layout(shape(1, dim, page=64, dtype=torch.bfloat16))
    )
    assert 8 * layout.bytes_per_page == 64 * (channels + dim) * (16 if bits is None else bits + 32 / 16)


def test_defaults_are_the_authors() -> None:
    stack = Stack.parse("think")
    assert stack.quantizer == Stack.parse("think(keep=0.6, group=32)").quantizer
    assert (stack.window.sinks, stack.window.recent) == (0, 32)
    assert Stack.parse("think(bits=2)").page_size == 32
    with pytest.raises(SpecError, match=r"group=32.*80 channels.*group of 16"):
        Stack.parse("think(bits=2)").plan(0, 1).layout(shape(1, 80))


def test_selection_keeps_the_order_of_channels() -> None:
    basis = selection(torch.tensor([[1.0, 5, 3, 4], [9, 1, 2, 8]]), 2)
    x = torch.arange(4.0).expand(2, 1, 4)
    assert basis.write(x, torch.arange(2)).tolist() == [[[1, 3]], [[0, 3]]]
