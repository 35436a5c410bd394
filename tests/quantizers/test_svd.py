"""Low rank: the best directions for q . k, exact at full rank, in as many bytes as the rank says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic import chunk, statistics, write
from torch import Tensor

from kvcomp import SpecError, Stack
from kvcomp.quantizers.svd import SVD, kept
from kvcomp.stages import PageShape

CPU = torch.device("cpu")
DIMS = [64, 80, 96, 128, 256]
OPEN = "window(sinks=0, recent=0)"


def shape(heads: int, k_dim: int, v_dim: int | None = None, dtype: torch.dtype = torch.float32) -> PageShape:
    return PageShape(64, k_dim, v_dim or k_dim, heads, dtype, CPU, 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("svd") / "c.safetensors", "svd", 3, 32, 48)


def logit_error(k: Tensor, back: Tensor, q: Tensor) -> Tensor:
    """Mean squared error of q . k over all queries of a KV head and all its keys, [H]."""
    lost = q.unflatten(1, (k.shape[1], -1)) @ (back - k)[:, :, None].mT
    return lost.square().mean((0, 2, 3, 4))


def test_full_rank_is_exact(file: Path) -> None:
    _, k, v = chunk(3, 32, 48)
    back = Stack.parse(f"svd(rank=1.0, calibration={str(file)!r}) + {OPEN}").roundtrip(k, v)
    torch.testing.assert_close(back[0], k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back[1], v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [4, 8, 16, 24])
def test_logits_are_better_than_of_plain_channels_and_of_a_plain_basis(rank: int, file: Path) -> None:
    q, k, v = chunk(3, 32, 48)
    back = Stack.parse(f"svd(rank={rank}, calibration={str(file)!r}) + {OPEN}").roundtrip(k, v)
    ours = logit_error(k, back[0], q)
    mean = k.mean(2, keepdim=True)
    score = q.unflatten(1, (3, 2)).square().mean((2, 3)) * (k - mean).square().mean(2)  # [1, H, D]
    channels = torch.zeros_like(score).scatter_(-1, score.topk(rank).indices, 1)[:, :, None]
    assert bool((ours < logit_error(k, (k - mean) * channels + mean, q)).all())
    basis = torch.linalg.svd((k - mean)[0], full_matrices=False).Vh[:, :rank]  # [H, r, D]
    assert bool((ours < logit_error(k, (k - mean) @ basis.mT @ basis + mean, q)).all())
    best = torch.linalg.svd((v - v.mean(2, keepdim=True))[0], full_matrices=False).S
    lost = (back[1] - v)[0].square().sum((1, 2))
    torch.testing.assert_close(lost, best[:, rank:].square().sum(-1), rtol=1e-3, atol=1e-3)


def test_values_are_weighted_by_the_output_projection() -> None:
    """An output projection that reads three channels only: the first three directions keep all that it sees."""
    stats = statistics(2, 16)
    seen = torch.zeros(2, 16, 16).double()
    seen[:, [2, 5, 11], [2, 5, 11]] = 1
    found = SVD.calibrate(replace(stats, output=seen), damping=1e-8)
    left = (found["v_dual"][..., :3] @ found["v"][..., :3].mT)[:, [2, 5, 11]][:, :, [2, 5, 11]]
    torch.testing.assert_close(left, torch.eye(3).double().expand(2, -1, -1), rtol=0, atol=1e-5)
    plain = SVD.calibrate(stats)
    assert (plain["v_dual"] - plain["v"]).abs().max() < 1e-9  # without one: orthonormal


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_every_row_uses_its_heads_matrix_and_nothing_is_mapped_back_to_attend(bits: int | None, file: Path) -> None:
    codec, _ = Stack.parse(f"svd(rank=16, bits={bits}, calibration={str(file)!r})").plan(0, 1).build(shape(3, 32, 48))
    _, k, v = chunk(3, 32, 48, tokens=64)
    k, v = (torch.cat([x, 1.5 * x])[:, :, :64].flatten(0, 1) for x in (k, v))  # two rows of three heads
    decoded = codec.decode(codec.encode(k, v, torch.arange(6)))
    assert [x.shape[-1] for x in decoded] == [16, 16]
    plain_k, plain_v = codec.inverse(*decoded, torch.arange(6))
    found = SVD.calibrate(statistics(3, 32, 48))
    for stream in range(6):
        h = stream % 3
        for x, back, name in ((k, plain_k, "k"), (v, plain_v, "v")):
            write, read = (found[n][h, :, :16].float() for n in (name, f"{name}_dual"))
            mean = found[f"{name}_mean"][h].float()
            expected = (x[stream] - mean) @ write @ read.T + mean
            tolerance = {None: 1e-4, 8: 0.03, 4: 0.3}[bits]
            assert (back[stream] - expected).norm() <= tolerance * (expected - mean).norm()
    q, weights = torch.randn(6, 4, 32), torch.rand(6, 4, 64).softmax(-1)
    rotated, bias = codec.read_query(q)
    assert bias is not None
    torch.testing.assert_close(rotated @ decoded[0].mT + bias[..., None], q @ plain_k.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.read_output(weights @ decoded[1]), weights @ plain_v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
def test_bytes_are_the_ranks(dim: int, bits: int | None) -> None:
    for rank, given in ((dim // 2, 0.5), (16, 16), (dim, 1.0)):
        layout = Stack.parse(f"svd(rank={given}, bits={bits})").plan(0, 1).layout(shape(1, dim, dtype=torch.bfloat16))
        per_token = 16 * rank if bits is None else bits * rank + 32
        assert 8 * layout.bytes_per_page == 64 * 2 * per_token


def test_values_may_keep_more_than_keys(file: Path) -> None:
    _, k, v = chunk(3, 32, 48)
    back = Stack.parse(f"svd(rank=8, v_rank=1.0, calibration={str(file)!r}) + {OPEN}").roundtrip(k, v)
    torch.testing.assert_close(back[1], v, rtol=1e-4, atol=1e-4)
    assert (back[0] - k).norm() > 0.1 * k.norm()
    layout = Stack.parse("svd(rank=0.25, v_rank=48, bits=4)").plan(0, 1).layout(shape(1, 64))
    assert 8 * layout.bytes_per_page == 64 * (4 * (16 + 48) + 2 * 32)
    assert str(Stack.parse("svd(rank=0.5, v_rank=0.5)")) == "svd(rank=0.5)"
    assert Stack.parse("svd(rank=1, v_rank=1.0)").quantizer == SVD(rank=1, v_rank=1.0)
    with pytest.raises(SpecError, match=r"svd\(v_rank=65\): there are 64 channels"):
        Stack.parse("svd(v_rank=65)").plan(0, 1).layout(shape(1, 64))
    with pytest.raises(SpecError, match=r"svd\(v_rank=2.0\)"):
        Stack.parse("svd(v_rank=2.0)")


def test_a_layer_holds_its_own_directions_and_no_more(file: Path) -> None:
    codec, _ = Stack.parse(f"svd(rank=8, calibration={str(file)!r})").plan(0, 1).build(shape(3, 32, 48))
    held = sum(t.untyped_storage().nbytes() for t in codec.constants())
    assert held == 4 * 3 * (2 * 8 * (32 + 48) + 32 + 48)


@pytest.mark.parametrize(
    ("amount", "dim", "channels"),
    [(0.5, 64, 32), (0.6, 64, 40), (0.5, 80, 40), (0.01, 64, 8), (1.0, 100, 100), (0.99, 4, 4), (13, 64, 13)],
)
def test_shares_are_multiples_of_eight_and_numbers_are_themselves(amount: float, dim: int, channels: int) -> None:
    assert kept(amount, dim, "svd", "rank") == channels


def test_more_directions_than_channels() -> None:
    with pytest.raises(SpecError, match=r"svd\(rank=65\): there are 64 channels: use at most 64"):
        Stack.parse("svd(rank=65)").plan(0, 1).layout(shape(1, 64))
