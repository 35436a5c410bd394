"""Every quantizer at every width: hard inputs, caches shorter than a page, head dimensions, and the bits declared."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from synthetic import chunk, save
from torch import Tensor

from kvcomp import KvcompWarning, SpecError, Stack
from kvcomp.cache.layer import LayerStore
from kvcomp.calibration.stage import Calibrated
from kvcomp.calibration.statistics import Moments
from kvcomp.ledger import storage_bytes
from kvcomp.quantizers.int import Int
from kvcomp.quantizers.widths import WidthQuantizer
from kvcomp.stages import Quantizer
from kvcomp.stages.plan import held_parts
from kvcomp.stages.registry import find, stages
from kvcomp.stages.window import Window

D, HEADS, TOKENS, LOUD = 32, 2, 128, 7
DIMS = (64, 80, 96, 128, 256)
CALIBRATED = [name for name, stage in stages().items() if issubclass(stage, Calibrated)]


def of(name: str, *arguments: str) -> list[str]:
    return [f"{name}({given})" for given in arguments]


def bits(low: int, high: int) -> list[str]:
    return [f"bits={n}" for n in range(low, high + 1)]


KIVI = ("bits=2", "bits=4", "k=4, v=2")
INT = [f"{width}, per={per}" for width in bits(2, 8) for per in ("token", "channel")]
INT += [
    f"bits={n}, per={per}, basis={basis}, symmetric={symmetric}"
    for n, per, (basis, symmetric) in product(
        (2, 4),
        ("token", "channel"),
        [("hadamard", "false"), ("random", "false"), ("identity", "true"), ("hadamard", "true")],
    )
]
INT += ["bits=8, symmetric=true", "bits=3, per=channel, basis=random, symmetric=true"]
KLT = [*(f"bits={n / 2:g}" for n in range(2, 13)), "k=4, v=2"]
KLT += [f"{given}, calibration=FILE" for given in ("bits=1", "bits=3.5", "bits=6")]
WIDTHS = [f"{width}, calibration=FILE" for width in ["bits=none", *bits(2, 8)]]
PRESETS = {
    "none": ["none"],
    "kivi": of("kivi", *KIVI),
    "int": of("int", *INT),
    "int8": ["int8"],
    "fp8": of("fp8", "format=e4m3", "format=e5m2"),
    "nvfp4": ["nvfp4"],
    "mxfp4": ["mxfp4", "mxfp4(basis=hadamard)", "mxfp4(basis=random)"],
    "turboquant": of(
        "turboquant", *(f"bits={n}, variant={v}" for n in (1, 2, 2.5, 3, 3.5, 4) for v in ("mse", "prod"))
    ),
    "klt": of("klt", *KLT),
    "oscar": of("oscar", *(f"{width}, calibration=FILE" for width in bits(2, 4))),
    "svd": of("svd", *WIDTHS),
    "think": of("think", *WIDTHS),
}
SPECS = [spec for specs in PRESETS.values() for spec in specs]
every = pytest.mark.parametrize("spec", SPECS)

Inputs = tuple[Tensor, Tensor, Tensor]  # queries [1, 4, n, D], keys and values [1, 2, n, D]


def inputs(kind: str) -> Inputs:
    q, k, v = chunk(HEADS, D, tokens=TOKENS)
    k, v = (x / x.square().mean().sqrt() for x in (k, v))
    if kind == "loud":
        k[..., LOUD] *= 100 / k[..., LOUD].square().mean().sqrt()
    elif kind == "constant":
        k, v = (x[:, :, :1].expand_as(x).clone() for x in (k, v))
    elif kind == "even":  # a norm of 1.7e5, which is one coordinate in a Hadamard basis
        k, v = torch.full_like(k, -3e4), torch.full_like(v, -3e4)
    elif kind == "half":
        q, k, v = q.half(), *((x * (65504 / x.abs().amax())).half() for x in (k, v))
    elif kind != "plain":
        k, v = (x * {"zero": 0, "3e4": 3e4, "1e5": 1e5}[kind] for x in (k, v))
    return q, k, v


class Lab:
    """Layers of one quantizer, without a window; methods that need a file are calibrated on what they are to hold."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Inputs] = {}
        self.plain: dict[str, tuple[float, float]] = {}

    def inputs(self, kind: str) -> Inputs:
        if kind not in self.made:
            self.made[kind] = inputs(kind)
        return self.made[kind]

    def quantizer(self, spec: str, kind: str, given: Inputs) -> Quantizer:
        """The quantizer of `spec`, with a file for FILE that was calibrated on `given`, which `kind` names. think
        takes a usual chunk in place of zeros."""
        quantizer = Stack.parse(spec).quantizer
        if not isinstance(quantizer, Calibrated) or quantizer.calibration is None:
            return quantizer
        file = self.folder / f"{quantizer.name} {kind}"
        if not file.exists():
            if quantizer.name == "think" and not given[1].any():  # scores of keys that are all 0 are refused
                given = chunk(given[1].shape[1], given[1].shape[-1])
            moments = Moments()
            moments.add(*given)
            save(file, quantizer.name, [moments.result()])
        return replace(quantizer, calibration=str(file))

    def store(self, spec: str, kind: str = "plain", given: Inputs | None = None, **window: int) -> LayerStore:
        """A layer that holds inputs of a kind; those that are `given`, in a method that was calibrated on the kind."""
        q, k, v = given or self.inputs(kind)
        store = LayerStore(Stack((self.quantizer(spec, kind, self.inputs(kind)), Window(**window))).plan(0, 1))
        store.start(k, v)
        store.write(k, v, None, q, D**-0.5)
        return store

    def errors(self, spec: str, kind: str) -> tuple[float, float]:
        """|x^ - x| / |x| of keys and of values."""
        _, *given = self.inputs(kind)
        k, v = (error(back, x) for back, x in zip(self.store(spec, kind).dense(), given, strict=True))
        return k, v

    def usual(self, spec: str) -> tuple[float, float]:
        if spec not in self.plain:
            self.plain[spec] = self.errors(spec, "plain")
        return self.plain[spec]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("calibrations"))


def error(back: Tensor, x: Tensor) -> float:
    return float((back - x).norm() / x.norm())


def allocated(store: LayerStore) -> int:
    """Bytes that belong to the streams: pages, table and counters, exact tokens, and constants made for them."""
    held = store.held(set())
    own = ("pages", "summaries", "slack", "sinks", "window", "table")
    return sum(held[part] for part in own) + storage_bytes(store.codec.adapted())


def test_no_quantizer_and_no_width_is_forgotten() -> None:
    assert set(PRESETS) == {name for name, stage in stages().items() if issubclass(stage, Quantizer)}
    for name, specs in PRESETS.items():
        stage = find(name)
        if issubclass(stage, WidthQuantizer):
            parsed = [Stack.parse(spec).quantizer for spec in specs]
            assert {q.k_bits for q in parsed if isinstance(q, WidthQuantizer)} == set(stage.widths)
        assert issubclass(stage, Calibrated) == any("calibration" in spec for spec in specs)


@every
def test_a_loud_key_channel_costs_its_share_and_no_value(lab: Lab, spec: str) -> None:
    """100 times the norm of the others: the error of K in relation to K may double. oscar calibrates V with K."""
    (loud_k, loud_v), (usual_k, usual_v) = lab.errors(spec, "loud"), lab.usual(spec)
    assert loud_k <= 2 * usual_k
    assert loud_v == pytest.approx(usual_v, rel=0.1 if spec.startswith("oscar") else 0)


@every
def test_a_loud_head_is_no_matter_of_the_other(lab: Lab, spec: str) -> None:
    """Bit for bit."""
    q, k, v = lab.inputs("plain")
    loud_k, loud_v = k.clone(), v.clone()
    loud_k[:, 0, :, LOUD] *= 100
    loud_v[:, 0] *= 100
    for loud, usual in zip(lab.store(spec, given=(q, loud_k, loud_v)).dense(), lab.store(spec).dense(), strict=True):
        assert torch.equal(loud[:, 1], usual[:, 1])


@every
def test_a_row_does_not_depend_on_the_rows_beside_it(lab: Lab, spec: str) -> None:
    """Beside a row of other channels, and one whose tokens are all the same."""
    q, k, v = lab.inputs("plain")
    loud = k.clone()
    loud[..., LOUD] *= 100
    rows = [torch.cat([a, b, c]) for a, b, c in ((q, q, q), (k, loud, k[:, :, :1].expand_as(k)), (v, v.flip(-1), v))]
    for found, alone in zip(lab.store(spec, given=tuple(rows)).dense(), lab.store(spec).dense(), strict=True):
        torch.testing.assert_close(found[:1], alone, rtol=1e-5, atol=1e-5)


@every
def test_constant_channels_come_back(lab: Lab, spec: str) -> None:
    """As well as any other, and exactly, to float16, where a scale or a mean is a channel's own."""
    k_exact = spec.startswith(("klt", "svd", "kivi")) or "per=channel" in spec
    v_exact = spec.startswith("svd") or "per=channel" in spec
    for found, usual, exact in zip(lab.errors(spec, "constant"), lab.usual(spec), (k_exact, v_exact), strict=True):
        assert found <= (0 if exact else 1.5 * usual) + 1e-3


@every
def test_zeros_stay_zeros(lab: Lab, spec: str) -> None:
    store = lab.store(spec, "zero")
    for back in (*store.dense(), store.attend(lab.inputs("plain")[0], 0.1).out):
        assert not back.any()


@every
def test_what_is_not_finite_is_stored_as_zero(lab: Lab, spec: str) -> None:
    """Nothing but the number itself is touched, and a warning tells; `none` holds it, as any other number."""
    q, k, v = lab.inputs("plain")
    holes = [torch.rand(x.shape, generator=torch.Generator().manual_seed(i)) < 0.001 for i, x in enumerate((q, k, v))]
    broken = [x.clone() for x in (q, k, v)]
    for x, hole in zip(broken, holes, strict=True):
        x[hole] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(100)[: int(hole.sum())]
    if spec == "none":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for back, x in zip(lab.store(spec, given=tuple(broken)).dense(), broken[1:], strict=True):
                torch.testing.assert_close(back, x, rtol=0, atol=0, equal_nan=True)
        return
    with pytest.warns(KvcompWarning) as told:
        ours = lab.store(spec, given=tuple(broken))
    asked = ["queries"] if ours.plan.needs_queries else []
    assert [str(w.message).split(" of layer 0 are not finite")[0] for w in told] == [*asked, "keys", "values"]
    zeroed = lab.store(spec, given=tuple(x.masked_fill(hole, 0) for x, hole in zip((q, k, v), holes, strict=True)))
    for a, b in zip(ours.dense(), zeroed.dense(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.attend(q, 0.1).out, zeroed.attend(q, 0.1).out)


def reaches(spec: str) -> bool:
    """Whether a method has a scale for numbers beyond float16; the others saturate."""
    quantizer = Stack.parse(spec).quantizer
    if isinstance(quantizer, Int):
        return quantizer.symmetric and quantizer.k_bits >= 5
    return spec.startswith(("none", "int8", "fp8", "nvfp4", "mxfp4", "svd(bits=none", "think(bits=none"))


@pytest.mark.parametrize("kinds", [("3e4", "even"), ("1e5",)])
@every
def test_huge_numbers_are_finite_and_no_larger(lab: Lab, spec: str, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        q, *given = lab.inputs(kind)
        store = lab.store(spec, kind)
        assert bool(store.attend(q, 1e-6).out.isfinite().all())
        for back, x, usual in zip(store.dense(), given, lab.usual(spec), strict=True):
            assert bool(back.isfinite().all())
            assert error(back, x) <= (1.1 * usual + 1e-3 if reaches(spec) and kind != "even" else max(usual, 1))


@every
def test_the_largest_halves_do_not_overflow(lab: Lab, spec: str) -> None:
    q, k, v = lab.inputs("half")
    store = lab.store(spec, "half")
    for back, x in zip(store.dense(), (k, v), strict=True):
        assert bool(back.isfinite().all())
        assert back.abs().max() > 0.1 * x.abs().max()
    assert bool(store.attend(q, 1e-6).out.isfinite().all())


@every
def test_attention_is_over_what_is_held_and_decoded(lab: Lab, spec: str) -> None:
    """A window of 2 + 5 tokens, with fewer than a page after it, or with one: a prompt, then three steps."""
    q, k, v = lab.inputs("plain")
    for tokens in (1, 15, 90):
        store = lab.store(spec, given=(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens]), sinks=2, recent=5)
        for at in range(tokens, tokens + 3):
            store.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
            store.settle()
        held = store.dense()
        assert (store.table.longest > 0) == (tokens == 90)
        for back, x in zip(held, (k, v), strict=True):
            assert back.shape[2] == tokens + 3
            assert torch.equal(back, x[:, :, : tokens + 3]) or store.table.longest
        held_k, held_v = (x.double().repeat_interleave(2, 1) for x in held)
        logits = 0.2 * q[:, :, -1:].double() @ held_k.mT
        ours = store.attend(q[:, :, -1:], 0.2)
        torch.testing.assert_close(ours.out.double(), logits.softmax(-1) @ held_v, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.lse.double(), logits.logsumexp(-1), rtol=1e-4, atol=1e-4)


def refused(spec: str) -> tuple[str, str] | None:
    """What the error says of a head dimension of 80, and the method that it proposes; None where 80 channels can be."""
    if spec.startswith(("kivi", "think(bits")) and "bits=none" not in spec:
        bare = spec.replace(", calibration=FILE", "")
        return r"\(group=32\).*80 channels.*use a group of 16", f"{bare[:-1]}, group=16)"
    if spec.startswith("turboquant(bits=3.5") or spec == "turboquant(bits=2.5, variant=prod)":
        return r"turboquant\(bits=.\.5.*80 channels.*use whole bits", spec.replace(".5", "")
    return None


@every
def test_the_bits_declared_are_the_bytes_of_a_page(lab: Lab, spec: str) -> None:
    declared = Stack((Stack.parse(spec).quantizer, Window()))
    tokens = declared.page_size
    for dim in DIMS:
        no = refused(spec) if dim == 80 else None
        if no:
            message, instead = no
            with pytest.raises(SpecError, match=message):
                declared.effective_bits(dim, tokens)
            assert Stack.parse(instead).effective_bits(dim, tokens) > 0
            continue
        x = torch.zeros(1, 1, tokens, dim, dtype=torch.bfloat16)
        store = LayerStore(Stack((lab.quantizer(spec, f"of {dim}", (x, x, x)), Window())).plan(0, 1))
        store.start(x, x)
        store.write(x, x, None, x)
        assert store.table.total == 1
        assert declared.effective_bits(dim, tokens, layers=1) == 8 * allocated(store) / (2 * dim * tokens)


@every
def test_what_a_file_says_is_no_state(lab: Lab, spec: str) -> None:
    """A saved cache need not hold it, and engines that cannot keep state serve it."""
    assert "FILE" not in spec or not lab.store(spec).codec.state()


@pytest.mark.parametrize("empty", ["k", "v"])
@pytest.mark.parametrize("spec", dict.fromkeys(s[at] for s in PRESETS.values() for at in (0, len(s) // 2, -1)))
def test_keys_or_values_of_no_channels(lab: Lab, spec: str, empty: str) -> None:
    """Latents without a rotary key: the other side is stored as it always is, and the bytes are its own alone."""
    q, k, v = lab.inputs("plain")
    given = (q[..., :0], k[..., :0], v) if empty == "k" else (q, k, v[..., :0])
    store = lab.store(spec, given=given, sinks=2, recent=5)
    usual = lab.store(spec, given=(q, k, v), sinks=2, recent=5)
    other = int(empty == "k")
    back, whole = store.dense(), usual.dense()
    assert back[1 - other].shape == (1, HEADS, TOKENS, 0)
    assert torch.equal(back[other], whole[other])
    part = store.attend(given[0][:, :, -1:], 0.2)
    logits = 0.2 * given[0][:, :, -1:].double() @ back[0].double().repeat_interleave(2, 1).mT
    expected = logits.softmax(-1) @ back[1].double().repeat_interleave(2, 1)
    torch.testing.assert_close(part.out.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.lse.double(), logits.logsumexp(-1), rtol=1e-4, atol=1e-4)
    declared = held_parts(store.plan, given[1].shape[-1], given[2].shape[-1], TOKENS, k.dtype)
    assert declared["pages"] * HEADS == store.held(set())["pages"] < usual.held(set())["pages"]
    twin = store.fork({})
    twin.select_rows(torch.tensor([0, 0]))
    assert torch.equal(twin.dense()[other][1:], back[other])
    again = LayerStore(store.plan)
    again.restore(store.state(), torch.device("cpu"))
    assert torch.equal(again.dense()[other], back[other])
