"""DSA: a lightning indexer, distilled from the model's attention, tells which tokens to read (arXiv 2512.02556)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from kvcomp.calibration.stage import FILE, Calibrated
from kvcomp.calibration.statistics import weighted_directions
from kvcomp.stages import Alias, Choice, Index, PageShape, Summaries, arg
from kvcomp.stages.registry import register
from kvcomp.state import State

from .codes import TokenSelector, encode, step

CONTEXTS = 8  # that are kept to distil from
MOST = 16  # coordinates in a file
QUERIES = 32  # of each, from its second half
DAMPING = 0.1


class Traces:
    """Queries and keys of a few contexts of one layer, evenly spread over all that were seen."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor, Tensor]] = []  # positions [m], queries [H, G, m, D], keys [H, n, D]
        self.count, self.every = 0, 1

    def add(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """A context, B = 1: queries [1, Hq, n, D], keys [1, H, n, D]."""
        if self.count % self.every == 0:
            n = keys.shape[2]
            at = torch.linspace(n // 2, n - 1, min(QUERIES, n - n // 2), dtype=torch.float32, device="cpu").long()
            q = rearrange(queries[0, :, at.to(queries.device)], "(h g) m d -> h g m d", h=keys.shape[1])
            self.kept.append((at, q.cpu().half(), keys[0].cpu().half()))
        self.count += 1
        if len(self.kept) > CONTEXTS:
            self.kept, self.every = self.kept[::2], 2 * self.every

    def result(self, output: Tensor | None) -> Traces:
        return self


class Indexer(Index):
    """The indexer of a layer: k [H, D, r] and offset [H, r] give the index keys in steps, q [H, G, D, r] the index
    queries of each query head, times the steps, weight [H, G, D] and bias [H, G] how much each of them counts."""

    def __init__(self, selector: DSA, shape: PageShape) -> None:
        super().__init__(selector)
        file, dim, rank = selector.load(), shape.k_dim, selector.rank
        self.bits, self.heads = selector.bits, shape.heads
        steps = step(file.tensor("deviation", shape, None)[:, :rank], self.bits)
        self.key = file.tensor("k", shape, dim, None)[..., :rank] / steps[:, None]
        self.offset = file.tensor("mean", shape, None)[:, :rank] / steps
        self.query = file.tensor("q", shape, None, dim, None)[..., :rank] * steps[:, None, None]
        self.weight, self.bias = file.tensor("weight", shape, None, dim), file.tensor("bias", shape, None)

    def summarize(self, keys: Tensor, values: Tensor, streams: Tensor) -> dict[str, Tensor]:
        head = streams % self.heads
        return encode(torch.bmm(keys.float(), self.key[head]) - self.offset[head][:, None], self.bits)

    def choose(self, queries: Tensor, scale: float, held: Summaries) -> Choice:
        q = rearrange(queries.float(), "(b h) g d -> b h g d", h=self.heads)
        index = torch.einsum("bhgd,hgdr->bhgr", q, self.query).flatten(0, 1)
        weight = (torch.einsum("bhgd,hgd->bhg", q, self.weight) + self.bias).flatten(0, 1)[:, None]
        assert isinstance(self.selector, DSA)
        scores = torch.bmm(weight, self.selector.logits(index, held.fields).relu())  # [S, 1, n * P]
        return self.selector.best(scores, 1.0, held)

    def constants(self) -> list[Tensor]:
        return [self.key, self.offset, self.query, self.weight, self.bias]


@register("dsa")
@dataclass(frozen=True)
class DSA(TokenSelector, Calibrated):
    """DSA: a decode query reads the tokens with the highest index scores, sum_g w_g relu(q_g . k).

    The lightning indexer of DeepSeek-V3.2, distilled for models that have none, by `kvcomp calibrate --method dsa`: per
    KV head, index keys of 16 coordinates and an index query and weight per query head, linear in the post-RoPE keys and
    queries, trained until softmax(score) is the attention of the group (the KL divergence of the published warm-up).
    Published are 64 heads of 128 channels in FP8 over a model trained for them, and one choice for all heads. Tokens
    are read one by one where the quantizer's fields are per token, else pages by the sum of their tokens' shares.

    Paper: arXiv 2512.02556.
    """

    paper: ClassVar[str] = "arXiv:2512.02556"
    aliases: ClassVar[Mapping[str, str | Alias]] = {"index_topk": "tokens"}
    seen: ClassVar[type[Traces]] = Traces

    tokens: int | None = arg(None, "tokens that a query reads, in full pages (none of the five: 2048)")
    rank: int = arg(16, "coordinates of an index key, even, at most 16: the first of the file")
    bits: int = arg(8, "bits of a coordinate, 4 or 8")
    calibration: str | None = arg(None, FILE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank <= MOST, "rank", f"at most {MOST}")

    @property
    def default(self) -> tuple[str, float]:
        return "tokens", 2048

    @classmethod
    def calibrate(cls, seen: Traces, *, steps: int = 100, rate: float = 0.02) -> dict[str, Tensor]:
        """k [H, D, 16], mean and deviation [H, 16] of the index keys; q [H, G, D, 16], weight [H, G, D], bias [H, G].

        steps, rate: of Adam, each step over one context.
        """
        contexts = [(at, q.float(), k.float()) for at, q, k in seen.kept]
        first, keys = contexts[0][1], torch.cat([k for _, _, k in contexts], 1)
        scale, mean = first.shape[-1] ** -0.5, keys.mean(1)
        centred = (keys - mean[:, None]).double()
        q = torch.cat([q.flatten(1, 2) for _, q, _ in contexts], 1).double()
        write, read = weighted_directions(centred.mT @ centred / keys.shape[1], q.mT @ q / q.shape[1], DAMPING)
        rank, group = min(MOST, keys.shape[-1]), first.shape[1]
        key = write[..., :rank].float().requires_grad_()
        query = (scale * read[:, None, :, :rank].float()).repeat(1, group, 1, 1).requires_grad_()
        weight = torch.zeros(len(keys), group, keys.shape[-1], requires_grad=True, dtype=torch.float32, device="cpu")
        bias = torch.full((len(keys), group), 1.0, requires_grad=True, dtype=torch.float32, device="cpu")
        adam = torch.optim.Adam(
            [
                {"params": [key, query], "lr": rate * float(key.detach().square().mean().sqrt())},
                {"params": [weight], "lr": rate / keys.shape[-1] ** 0.5},
                {"params": [bias], "lr": rate},
            ]
        )
        slow = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        with torch.enable_grad():
            for i in range(steps):
                at, q, k = contexts[i % len(contexts)]
                hidden = torch.arange(k.shape[1], device="cpu") > at[:, None]  # [m, n]
                logits = torch.einsum("hgmd,hnd->hgmn", q, k) * scale
                target = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)  # [H, m, n]
                index = torch.einsum("hgmd,hgdr->hgmr", q, query)
                each = torch.einsum("hgmr,hnr->hgmn", index, (k - mean[:, None]) @ key).relu()
                share = torch.einsum("hgmd,hgd->hgm", q, weight) + bias[..., None]
                score = torch.einsum("hgm,hgmn->hmn", share, each).masked_fill(hidden, -torch.inf)
                loss = F.kl_div(score.log_softmax(-1).masked_fill(hidden, 0), target, reduction="sum")
                adam.zero_grad()
                (loss / target.shape[0] / target.shape[1]).backward()
                adam.step()
                slow.step()
        key = key.detach()
        return {
            "k": key,
            "mean": torch.einsum("hd,hdr->hr", mean, key),
            "deviation": (centred.float() @ key).std(1),
            "q": query.detach(),
            "weight": weight.detach(),
            "bias": bias.detach(),
        }

    @classmethod
    def check_layer(cls, layer: State) -> None:
        key = layer.finite("k", (None, None, None), torch.float32)
        heads, dim, rank = key.shape
        query = layer.finite("q", (heads, None, dim, rank), torch.float32)
        for name, shape in (
            ("mean", (heads, rank)),
            ("deviation", (heads, rank)),
            ("weight", (heads, query.shape[1], dim)),
            ("bias", (heads, query.shape[1])),
        ):
            layer.finite(name, shape, torch.float32)
        layer.require(bool((layer["deviation"] >= 0).all()), "deviation is negative")
        layer.require(bool(key.any()), "k is 0")

    def index(self, shape: PageShape) -> Indexer:
        return Indexer(self, shape)
