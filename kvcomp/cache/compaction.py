"""Compaction by attention matching: a span of n tokens becomes t << n tokens that attention can hardly tell from it.

Zweiger et al. 2026, "Fast KV Compaction via Attention Matching", arXiv 2602.16284. The compact tokens are keys c_i from
among the span's, biases beta_i = log w_i and new values u_i. With reference queries q, the span's softmax weights
a_j(q) and its output o(q), they are found in three steps:

    keys    greedy orthogonal matching pursuit on the mass: sum_i w_i a_i(q) ~ 1
    bias    min_w  sum_q (sum_i w_i a_i(q) - 1)^2,  least <= w_i <= n
    values  min_u  sum_q |sum_i x_i(q) u_i - o(q)|^2,  x = softmax(scale q . c_i + beta_i)

The mass matters as much as the output: it is the span's share when it merges with other parts (kvcomp.attention).
Everything runs on Gram matrices in float64, gathered over blocks of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomp.attention import MAX_LOGITS, Part, attend
from kvcomp.errors import KvcompError
from kvcomp.finite import saturated
from kvcomp.state import State

CANDIDATES = 2048  # of a longer span, the pursuit looks at so many tokens (or 4 t) with the highest attention
ROUNDS = 64  # of the pursuit, each of which takes t / 64 tokens at once: 1 and 4 a round gave the same error
LEAST = 0.05  # w of a token that is of no use; e^-3 in the authors' code. Above 0, so that every bias is finite
# Pull of each w towards 1, and of each value towards the token's own: 0.03 t / R of the Gram matrix' mean diagonal, so
# less for more evidence. On SmolLM2, 1e-2 of it was best at t / R = 1 / 3 and 1e-3 at 1 / 30, both flat.
RIDGE = 0.03
HELD_OUT = 4  # one query in four, the newest, is held out to measure the error


class Compacted(NamedTuple):
    """Tokens that stand for a span of S streams: attend with `key_bias=bias`.

    keys [S, t, Dk] and values [S, t, Dv] in the span's dtypes, in the span's order; bias [S, t] float32, finite.
    error [S] float32: |out^ - out| / |out| of the attention output over all queries that were held out. lse_error [S]
    float32: the mean of |lse^ - lse|, in nats; e^lse is the weight of the span beside other tokens.
    """

    keys: Tensor
    bias: Tensor
    values: Tensor
    error: Tensor
    lse_error: Tensor


class CompactSpans(NamedTuple):
    """What stands for the compacted spans of S streams: keys [S, t, Dk], bias [S, t] float32 and values [S, t, Dv].

    Never changed in place. columns: (start, end) of the tokens that each span stood at, ascending.
    """

    keys: Tensor
    bias: Tensor
    values: Tensor
    columns: tuple[tuple[int, int], ...]

    def attend(self, queries: Tensor, scale: float, softcap: float | None) -> Part:
        """Attention of queries [S, R, Dk] over all of it."""
        return attend(queries, self.keys, self.values, scale, softcap=softcap, key_bias=self.bias)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.keys, self.bias, self.values]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def select(self, streams: Tensor) -> CompactSpans:
        """Keep, repeat and order streams."""
        keys, bias, values = (t[streams.to(t.device)] for t in self.tensors)
        return CompactSpans(keys, bias, values, self.columns)

    @classmethod
    def restored(cls, state: State, like: tuple[Tensor, Tensor], page_size: int, device: torch.device) -> CompactSpans:
        """The spans whose fields a state has, on `device`, of streams with keys and values `like` [S, n, Dk] and
        [S, n, Dv].

        Raises:
            DamagedError: the state is none of such spans.
        """
        state.only(*cls._fields)
        keys = state.finite("keys", (len(like[0]), None, like[0].shape[2]), like[0].dtype)
        values = state.finite("values", (*keys.shape[:2], like[1].shape[2]), like[1].dtype)
        bias = state.finite("bias", (*keys.shape[:2],), torch.float32)
        columns, end = [], 0
        for i, pair in enumerate(state.sequence("columns")):
            entry = State({"start, end": pair}, f"{state.where}.columns.{i}")
            entry = State(dict(zip(("start", "end"), entry.sequence("start, end", 2), strict=True)), entry.where)
            start = entry.integer("start", end)
            end = entry.integer("end", start + 1)
            entry.require((end - start) % page_size == 0, f"{start} to {end} are no whole pages of {page_size} tokens")
            columns.append((start, end))
        replaced = sum(b - a for a, b in columns)
        state.require(keys.shape[1] <= replaced, f"{keys.shape[1]} tokens stand for {replaced}")
        return cls(keys.to(device), bias.to(device), values.to(device), tuple(columns))

    def extended(self, new: Compacted, columns: tuple[int, int]) -> CompactSpans:
        """With one more span."""
        keys, bias, values = (
            torch.cat(pair, 1) for pair in zip(self.tensors, (new.keys, new.bias, new.values), strict=True)
        )
        return CompactSpans(keys, bias, values, tuple(sorted((*self.columns, columns))))


def match(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, tokens: int, softcap: float | None = None
) -> Compacted:
    """Replace each stream's span, keys [S, N, Dk] and values [S, N, Dv], by `tokens` tokens that serve queries alike.

    queries [S, R, Dk], post-RoPE like the keys, oldest first (the query heads of one KV head side by side:
    "(n g) d"), all after the span; R of some multiples of `tokens` is good. All are finite numbers.

    The errors are those of a trial, fitted to the older three quarters of the queries and measured on the newest: near
    to what later queries will see, where a random split is half too low. What is returned is fitted to all of them, so
    it is slightly better. With fewer than 4 queries the errors are those on the queries themselves, which is no
    evidence. A span of no more than `tokens` tokens comes back as it is, with bias 0 and errors 0.

    Raises:
        KvcompError: no queries, or `tokens` below 1.
    """
    streams, rows, _ = queries.shape
    span = keys.shape[1]
    if tokens < 1:
        raise KvcompError(f"tokens={tokens}: a span is compacted to 1 token or more")
    if span <= tokens:
        none = torch.zeros(streams, device=keys.device, dtype=torch.float32)
        bias = torch.zeros(streams, span, device=keys.device, dtype=torch.float32)
        return Compacted(keys, bias, values, none, none.clone())
    if rows == 0:
        raise KvcompError("queries=[S, 0, Dk]: attention is matched for reference queries, give 1 or more")
    batch = max(MAX_LOGITS // _candidates(tokens, span) ** 2, 1)  # streams whose Gram matrices are held at once
    parts = []
    for at in range(0, streams, batch):
        q, k, v = (x[at : at + batch] for x in (queries, keys, values))
        old = rows - rows // HELD_OUT
        fit = _fit(q, k, v, scale, tokens, softcap)
        trial, later = (fit, q) if old == rows else (_fit(q[:, :old], k, v, scale, tokens, softcap), q[:, old:])
        parts.append(Compacted(*fit, *deviation(*trial, later, k, v, scale, softcap)))
    return Compacted(*(torch.cat(list(field)) for field in zip(*parts, strict=True)))


def deviation(
    compact_keys: Tensor,
    bias: Tensor,
    compact_values: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """How far attention over compact tokens is from attention over the span: (error [S], lse_error [S]).

    As in `Compacted`, for any queries [S, R, Dk]. An output that is 0 and stays 0 has error 0.
    """
    true = attend(queries, keys, values, scale, softcap=softcap)
    ours = attend(queries, compact_keys, compact_values, scale, softcap=softcap, key_bias=bias)
    size = true.out.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return (ours.out - true.out).flatten(1).norm(dim=1) / size, (ours.lse - true.lse).abs().mean(1)


def _fit(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: int, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compact keys [S, t, Dk], bias [S, t] and values [S, t, Dv] for queries q [S, R, Dk]."""
    out, lse, _ = attend(q, k, v, scale, softcap=softcap)
    energy = lse.new_zeros(k.shape[:2], dtype=torch.float64)  # [S, N]: sum over queries of the squared weight
    for _, weights in _weights(q, k, lse, scale, softcap):
        energy += weights.square().sum(1)
    first = energy.topk(_candidates(tokens, k.shape[1])).indices.sort().values  # [S, c]
    gram, mass = _gram(q, k.take_along_dim(first[..., None], 1), lse, scale, softcap)
    chosen = _pursue(gram, mass, tokens, float(k.shape[1]))  # [S, t]
    gram = gram.take_along_dim(chosen[:, :, None], 1).take_along_dim(chosen[:, None], 2)
    ridge = RIDGE * tokens / q.shape[1]
    pull = ridge * _mean_diagonal(gram)
    mass = mass.gather(1, chosen) + pull[:, None]
    w = _bounded(_raised(gram, pull), mass, torch.ones_like(mass), LEAST, float(k.shape[1]), steps=300)
    bias = w.log().float()
    index = first.gather(1, chosen)[..., None]
    ck, cv = k.take_along_dim(index, 1), v.take_along_dim(index, 1).double()
    normal, right = torch.zeros_like(gram), torch.zeros_like(cv)
    for rows, x in _weights(q, ck, lse, scale, softcap):
        x = x * w[:, None]
        x = x / x.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        normal += x.mT @ x
        right += x.mT @ (out[:, rows] - x @ cv)
    # A stream none of whose queries sees a chosen key keeps its values: its matrix is 0, and must not be singular.
    pull = (ridge * _mean_diagonal(normal)).clamp_min(torch.finfo(normal.dtype).tiny)
    cv = cv + torch.cholesky_solve(right, torch.linalg.cholesky(_raised(normal, pull)))
    return ck, bias, saturated(cv, v.dtype)


def _candidates(tokens: int, span: int) -> int:
    return min(max(CANDIDATES, 4 * tokens), span)


def _weights(q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Iterator[tuple[slice, Tensor]]:
    """exp(logit - lse) [S, r, N] float64 of block after block of the queries, with the rows of each block."""
    block = max(MAX_LOGITS // (k.shape[0] * k.shape[1]), 1)
    for at in range(0, q.shape[1], block):
        rows = slice(at, at + block)
        logits = torch.bmm(q[:, rows].float(), k.float().mT) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        yield rows, (logits - lse[:, rows, None]).double().exp()


def _gram(q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Of the weights a [R, c]: a' a [S, c, c] and a' 1 [S, c]."""
    gram = lse.new_zeros(k.shape[0], k.shape[1], k.shape[1], dtype=torch.float64)
    mass = gram.new_zeros(k.shape[:2])
    for _, weights in _weights(q, k, lse, scale, softcap):
        gram += weights.mT @ weights
        mass += weights.sum(1)
    return gram, mass


def _pursue(gram: Tensor, mass: Tensor, tokens: int, most: float) -> Tensor:
    """Greedy choice of `tokens` of c candidates: int64 [S, t], ascending.

    Each round takes those that correlate most with the mass that is still missing, mass - gram w, and fits w anew.
    """
    missing, taken = mass, torch.zeros_like(mass, dtype=torch.bool)
    chosen, w = mass.new_zeros(len(mass), 0, dtype=torch.int64), mass[:, :0]
    while (left := tokens - chosen.shape[1]) > 0:
        missing = missing + 1e-6 * mass  # where nothing is missing any more, attention decides
        new = missing.masked_fill(taken, -torch.inf).topk(min(-(-tokens // ROUNDS), left)).indices
        chosen, taken = torch.cat([chosen, new], 1), taken.scatter(1, new, True)
        rows = gram.take_along_dim(chosen[:, :, None], 1)  # [S, i, c]
        inner = rows.take_along_dim(chosen[:, None], 2)
        w = torch.cat([w, w.new_ones(new.shape)], 1)
        w = _bounded(inner, mass.gather(1, chosen), w, 0.0, most, steps=10)
        missing = mass - (w[:, None] @ rows)[:, 0]
    return chosen.sort().values


def _bounded(gram: Tensor, target: Tensor, w: Tensor, least: float, most: float, steps: int) -> Tensor:
    """min over least <= w <= most of w' gram w / 2 - target' w, from a start w: [S, t].

    Projected gradient with Nesterov's momentum, restarted where it goes uphill (O'Donoghue and Candes 2015). The step
    of each w_i is 1 over the sum of its row: as gram is >= 0 everywhere, diag(gram 1) - gram is positive semidefinite,
    so that no step overshoots.
    """
    curvature = gram.sum(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    ahead, inertia = w, 1.0
    for _ in range(steps):
        slope = (gram @ ahead[..., None])[..., 0] - target
        new = (ahead - slope / curvature).clamp(least, most)
        move, past = new - w, inertia
        inertia = (1 + (1 + 4 * past * past) ** 0.5) / 2
        uphill = (slope * move).sum(1, keepdim=True) > 0
        ahead = torch.where(uphill, new, new + (past - 1) / inertia * move)
        w = new
    return w


def _mean_diagonal(x: Tensor) -> Tensor:
    """[S, t, t] -> [S]."""
    return x.diagonal(dim1=1, dim2=2).mean(1)


def _raised(x: Tensor, by: Tensor) -> Tensor:
    """x [S, t, t] with by [S] added to each diagonal."""
    return x + torch.diag_embed(by[:, None].expand(x.shape[:2]))
