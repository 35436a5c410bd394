"""Latents of K and V: the best coordinates of all heads together, exact at full rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import MODEL, chunk
from torch import Tensor

from kvcomp import KvcompError, SpecError, Stack
from kvcomp.cache.blocks.pages import Pages
from kvcomp.cache.blocks.setup import Setup
from kvcomp.calibration.file import Calibration
from kvcomp.quantizers.latent import SINKS, JointMoments, Latent
from kvcomp.stages.joint import JointMaps

HEADS, K_DIM, V_DIM, GROUP = 3, 32, 48, 2
CHANNELS = HEADS * (K_DIM + V_DIM)
OPEN = "window(sinks=0, recent=0)"


def alike(tokens: int = 600, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of heads that mix the same 60 numbers of a token, each in its own way."""
    generator = torch.Generator().manual_seed(seed)
    q, _, _ = chunk(HEADS, K_DIM, V_DIM, tokens, GROUP, seed)
    hidden = torch.randn(1, 1, tokens, 60, generator=generator) * torch.linspace(2, -3, 60).exp()
    mixes = torch.randn(2, HEADS, 60, V_DIM, generator=torch.Generator().manual_seed(9)) / 60**0.5
    k, v = hidden @ mixes[0, :, :, :K_DIM] + 3.0, hidden @ mixes[1]
    return q, k, v


def calibrated(
    path: Path, *seen: tuple[Tensor, Tensor, Tensor], output: Tensor | None = None, **settings: float
) -> str:
    moments = JointMoments()
    for one in seen:
        moments.add(*one)
    tensors = {f"0.{name}": x for name, x in Latent.calibrate(moments.result(output), **settings).items()}
    Calibration("latent", settings, MODEL, (("a.txt", "0" * 64),), 512, 512, tensors).save(path)
    return str(path)


def maps_of(file: str) -> JointMaps:
    return Latent(calibration=file).maps(0, HEADS, K_DIM, V_DIM, torch.device("cpu"))


@pytest.mark.parametrize("quantizer", ["none", "kivi(bits=4, group=16)", "int(bits=8)", "klt(bits=4)"])
def test_the_round_trip(quantizer: str, tmp_path: Path) -> None:
    _, k, v = alike()
    file = calibrated(tmp_path / "c.safetensors", alike())
    back = Stack.parse(f"latent(rank=1.0, calibration={file!r}) + {quantizer} + {OPEN}").roundtrip(k, v)
    for one, other in zip(back, (k, v), strict=True):
        assert one.shape == other.shape
        lost = float((one - other)[:, :, SINKS:].norm() / other.norm())
        assert lost < (1e-5 if quantizer == "none" else 0.3)  # what queries do not look at may be lost


def test_attention_over_latents_is_that_over_what_they_stand_for(tmp_path: Path) -> None:
    q, k, v = alike()
    maps = maps_of(calibrated(tmp_path / "c.safetensors", alike()))
    c = maps.latents(k, v)
    c[..., 100:] = 0
    keys, values = maps.expanded(c)
    logits = q.unflatten(1, (HEADS, GROUP)) @ keys[:, :, None].mT
    ours = maps.absorbed(q) @ c.mT
    constant = (q.unflatten(1, (HEADS, GROUP)) @ maps.mean[: HEADS * K_DIM].view(HEADS, 1, K_DIM, 1)).flatten(1, 2)
    torch.testing.assert_close(ours + constant, logits.flatten(1, 2), atol=2e-3, rtol=1e-4)
    out = logits.softmax(-1) @ values[:, :, None]
    torch.testing.assert_close(maps.output(ours.softmax(-1) @ c), out.flatten(1, 2), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rank", [16, 32, 64, 120])
def test_no_other_map_of_that_rank_loses_less(rank: int, tmp_path: Path) -> None:
    """Of what weighs: errors of q . k, and of outputs after a projection; checked against the spectrum itself."""
    seen = alike(SINKS + 9 * 64)  # so that all that counts is in pages
    q, k, v = (x[:, :, SINKS:] for x in seen)
    output = torch.randn(HEADS, V_DIM, V_DIM, generator=torch.Generator().manual_seed(3)).double()
    output = output.mT @ output
    file = calibrated(tmp_path / "c.safetensors", seen, output=output, damping=1e-9, key_weight=1.0)
    stack = Stack.parse(f"latent(rank={rank}, calibration={file!r}) + none + {OPEN}")
    keys, values = stack.roundtrip(k, v)

    queries, centred = q.unflatten(1, (HEADS, GROUP)).double(), [x - x.mean(2, keepdim=True) for x in (k, v)]

    def logits(x: Tensor) -> float:
        return float((queries @ x[:, :, None].double().mT).square().mean((-1, -2)).sum())

    def outputs(x: Tensor) -> float:
        return float(((x[0].double() @ output) * x[0].double()).sum())

    lost = logits(keys - k) / logits(centred[0]) + outputs(values - v) / outputs(centred[1])
    x = torch.cat([side[0].transpose(0, 1).flatten(1) for side in (k, v)], 1).double()
    x = x - x.mean(0)
    by_head = queries[0].flatten(1, 2)
    s_q = by_head.mT @ by_head / by_head.shape[1]
    weight = torch.block_diag(*s_q, *output)
    size = HEADS * K_DIM
    covariance = x.mT @ x / len(x)
    for part in (slice(0, size), slice(size, None)):
        weight[part, part] /= (weight[part, part] * covariance[part, part]).sum()
    values_, vectors = torch.linalg.eigh(weight)
    root = vectors * values_.clamp_min(0).sqrt() @ vectors.mT
    spectrum = torch.linalg.eigvalsh(root @ covariance @ root).flip(0)
    assert lost == pytest.approx(float(spectrum[rank:].sum()), rel=0.02, abs=1e-4)


def test_heads_that_are_alike_need_fewer_numbers_than_each_alone(tmp_path: Path) -> None:
    _, k, v = alike(seed=1)
    file = calibrated(tmp_path / "c.safetensors", alike())
    half = Stack.parse(f"latent(rank=0.25, calibration={file!r}) + none + {OPEN}").roundtrip(k, v)
    centre = k.mean(2, keepdim=True)
    each = torch.linalg.svd((k - centre)[0], full_matrices=False)
    best = centre + (each.U[..., :8] * each.S[:, None, :8] @ each.Vh[:, :8])[None]  # of each head, on these very tokens
    assert float((half[0] - k)[:, :, SINKS:].norm()) < 0.5 * float((best - k)[:, :, SINKS:].norm())


def test_first_tokens_of_contexts_weigh_nothing(tmp_path: Path) -> None:
    plain, loud = alike(), alike()
    for x in loud:
        x[:, :, :SINKS] *= 1e4
    files = [calibrated(tmp_path / f"{i}.safetensors", one, alike(seed=2)) for i, one in enumerate((plain, loud))]
    one, other = map(maps_of, files)
    assert torch.equal(one.write, other.write)
    with pytest.raises(KvcompError, match=r"1 KV heads of 240 channels in layer 0, and the cache 1 of 144"):
        Latent(calibration=files[0]).maps(0, HEADS, 16, 32, torch.device("cpu"))


def test_caches_of_a_model_share_the_maps(tmp_path: Path) -> None:
    file = calibrated(tmp_path / "c.safetensors", alike())
    assert maps_of(file) is maps_of(file)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("latent(rank=0)", "rank must be a positive whole number"),
        ("latent(rank=1.5)", "rank must be a positive whole number"),
        ("latent + latent(rank=8)", "at most one latent, got latent"),
    ],
)
def test_bad_stacks(spec: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Stack.parse(spec)


def test_what_is_refused_later(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"latent\(rank=300\): there are 240 channels: use at most 240"):
        Latent(rank=300).kept(CHANNELS)
    with pytest.raises(KvcompError, match="one latent: leave it out, or use Hugging Face's cache"):
        Pages(Setup("latent + int(bits=4)", 4, 64, torch.float32), 0, 1)


def test_bits_count_the_coordinates_that_are_kept() -> None:
    whole, half = (Stack.parse(f"latent(rank={r}) + none + {OPEN}").effective_bits(64, 64000) for r in (1.0, 0.5))
    assert half == pytest.approx(whole / 2, rel=0.01)
