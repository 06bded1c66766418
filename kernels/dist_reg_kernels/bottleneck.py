"""Random autoencoders on the tokens of a batch: each takes one view of itself, or passes as it is.

M hierarchical autoencoders of widths d_m, each with K inner ones of width h_m. For a token x [D] that visits m:

    r = Drop(tanh(W_e x + b_e))                                       [d_m]
    z = r, or tanh(V_k Drop(tanh(U_k r + a_k)) + c_k)                 [d_m], inner choice k, or none (k = K)
    y = W_d z + b_d                                                   [D]

hidden [B, T, D]; views int64 [B, T] from 0 to M, where M leaves the token as it is; inner int64 [B, T, M] from 0 to K, the
inner choice a token makes in each of them. Tokens outside `spans` are left as they are. Two results:

    out[b, t]   = y of the token's own view, or x
    error[b, t] = mean over D of (y - x)^2 in fp32: of its own view (`sampled`; 0 where it takes none), the mean over
                  all M (`all`), or 0 (`none`)

The error reaches the autoencoders alone: with g the gradient of `out` and e that of `error`,

    weights from   g + 2 e (y - x) / D        hidden from g

through one forward; the two gradients go through the layers as rows of one matrix. Nothing of a token's inside is kept on a
GPU: the backward computes it again. On the CPU, where arithmetic costs more than memory, it is kept. A token costs its own view (`sampled`): tokens are sorted by view and inner choice, and every
weight meets one matrix of them.

`weights` holds eight tensors a view: W_e [d, D], b_e [d], U [K, h, d], a [K, h], V [K, d, h], c [K, d], W_d [D, d], b_d [D].
Products are taken in their dtype. Drop keeps a channel where a uniform number of philox.py (key of the token, channel)
lies in the lower 1 - p of its range, and divides by 1 - p.

Source: MVCR, arXiv 2211.08794, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dist_reg_kernels.autoencoders import Weights, inner_site, outer_site, views_of
from dist_reg_kernels.bottleneck_backward import bottleneck_backward_triton
from dist_reg_kernels.bottleneck_triton import bottleneck_triton, triton
from dist_reg_kernels.philox import inside_spans, noise_reference

__all__ = [
    "RECONSTRUCT",
    "Inside",
    "Uniform",
    "Visit",
    "Weights",
    "backward",
    "bottleneck_backward_torch",
    "bottleneck_backward_triton",
    "bottleneck_reference",
    "bottleneck_torch",
    "bottleneck_triton",
    "come_back",
    "drop_factor",
    "forward",
    "go_through",
    "inner_site",
    "outer_site",
    "triton",
    "uniform_torch",
    "views_of",
    "visits",
]

RECONSTRUCT = ("all", "sampled", "none")

Uniform = Callable[[Tensor, int, int, int], Tensor]
"""(keys [n], channels, seed, site) to U(-1, 1) in fp32 [n, channels]."""


def bottleneck_reference(
    x: Tensor, own: Weights, inner: int, outer_drop: Tensor | None, inner_drop: Tensor | None
) -> Tensor:
    """The formula for one token x [D] (or rows [n, D]) in plain autograd; drops are factors [d] and [h], None for none."""
    code = torch.tanh(x @ own.encoder.T + own.encoder_bias)
    code = code if outer_drop is None else code * outer_drop
    if inner < own.inner_encoder.shape[0]:
        narrow = torch.tanh(code @ own.inner_encoder[inner].T + own.inner_encoder_bias[inner])
        narrow = narrow if inner_drop is None else narrow * inner_drop
        code = torch.tanh(narrow @ own.inner_decoder[inner].T + own.inner_decoder_bias[inner])
    return code @ own.decoder.T + own.decoder_bias


def drop_factor(uniform: Tensor, dropout: float) -> Tensor:
    """0 or 1 / (1 - dropout), from numbers of U(-1, 1)."""
    return (uniform < 1 - 2 * dropout).to(uniform.dtype).mul_(1 / (1 - dropout))


@dataclass
class Visit:
    """The tokens that go through one autoencoder, sorted by their inner choice: 0 to K - 1, then none."""

    view: int
    rows: Tensor
    """int64 [n], their rows in the flat batch."""
    bounds: list[int]
    """[K + 2], where each inner choice begins and ends among them."""
    taken: Tensor | None = None
    """int64 [s], those among them that take this view, sorted likewise; None for all."""
    taken_bounds: list[int] | None = None


class Inside(NamedTuple):
    """What one visit computes on the way; n tokens."""

    x: Tensor
    """[n, D]."""
    code: Tensor
    """tanh behind the outer encoder [n, d]."""
    drop: Tensor | None
    """Its factor."""
    dropped: Tensor
    """[n, d]."""
    narrow: list[Tensor]
    """By inner choice, tanh behind the inner encoder [n_k, h]."""
    narrow_drop: Tensor | None
    """[n - those without one, h]."""
    decoded: Tensor
    """What the outer decoder reads [n, d]."""
    y: Tensor
    """[n, D]."""


def visits(
    views: Tensor, inner: Tensor, spans: Tensor | None, choices: int, number: int, every: bool
) -> list[Visit]:
    """Who visits which of the `number` autoencoders with `choices` inner ones: those that take it, or all (`every`)."""
    batch, tokens = views.shape
    real = torch.ones_like(views, dtype=torch.bool) if spans is None else inside_spans(spans, tokens)
    views, real = torch.where(real, views, number).flatten(), real.flatten()
    inner = inner.reshape(batch * tokens, number)
    if every:
        return [_visit_of_all(m, views, inner[:, m], real, choices) for m in range(number)]
    own = inner.gather(1, views.clamp(max=number - 1)[:, None])[:, 0]
    groups = number * (choices + 1)
    bounds, order = _sorted(torch.where(views < number, views * (choices + 1) + own, groups), groups)
    found = []
    for m in range(number):
        ends = bounds[m * (choices + 1) : (m + 1) * (choices + 1) + 1]
        found.append(Visit(m, order[ends[0] : ends[-1]], [end - ends[0] for end in ends]))
    return found


def _visit_of_all(m: int, views: Tensor, inner: Tensor, real: Tensor, choices: int) -> Visit:
    groups = 2 * (choices + 1)
    bounds, order = _sorted(torch.where(real, 2 * inner + (views != m), groups), groups)
    taken, ends = [], [0]
    for k in range(choices + 1):
        begin, end = bounds[2 * k : 2 * k + 2]
        taken.append(torch.arange(begin, end, device=order.device))
        ends.append(ends[-1] + end - begin)
    return Visit(m, order[: bounds[-1]], bounds[::2], torch.cat(taken), ends)


def _sorted(groups: Tensor, number: int) -> tuple[list[int], Tensor]:
    """Where each of `number` groups begins, with the end of the last, and the order that sorts by group."""
    counts = torch.bincount(groups, minlength=number + 1).cumsum(0)[:number]
    return [0, *counts.tolist()], groups.argsort(stable=True)


def bottleneck_torch(
    hidden: Tensor,
    weights: Sequence[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, D], error fp32 [B, T]) in grouped matrix products of torch. `keys` int64 [B, T] is a token's own."""
    return forward(
        hidden, weights, views, inner, keys, spans, seed, site, dropout, reconstruct, uniform_torch
    )


def bottleneck_backward_torch(
    gradient: Tensor,
    error_gradient: Tensor,
    hidden: Tensor,
    weights: Sequence[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient [B, T, D] of `hidden` and those of the weights."""
    options = (seed, site, dropout, reconstruct, uniform_torch)
    return backward(gradient, error_gradient, hidden, weights, views, inner, keys, spans, *options)


def uniform_torch(keys: Tensor, channels: int, seed: int, site: int) -> Tensor:
    spans = keys.new_tensor([[0, 1]]).expand(keys.shape[0], 2)
    return noise_reference(keys, spans, 1, channels, seed=seed, site=site, distribution="uniform")[:, 0]


def forward(
    hidden: Tensor,
    weights: Sequence[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
    uniform: Uniform,
    kept: list[tuple[Visit, Inside]] | None = None,
) -> tuple[Tensor, Tensor]:
    """`bottleneck_torch` with the random numbers of `uniform`; what it computes on the way goes into `kept`, if given."""
    batch, tokens, channels = hidden.shape
    flat = hidden.reshape(-1, channels)
    out = flat.clone()
    error = torch.zeros(batch * tokens, dtype=torch.float32, device=hidden.device)
    own = views_of(weights)
    for visit in visits(views, inner, spans, own[0].inner_encoder.shape[0], len(own), reconstruct == "all"):
        if not visit.rows.numel():
            continue
        inside = go_through(flat, own[visit.view], visit, keys.flatten(), seed, site, dropout, uniform)
        if kept is not None:
            kept.append((visit, inside))
        y = inside.y.to(out.dtype)
        if visit.taken is None:
            out[visit.rows] = y
        else:
            out[visit.rows[visit.taken]] = y[visit.taken]
        if reconstruct != "none":
            apart = torch.linalg.vector_norm(inside.y.float() - inside.x.float(), dim=-1)
            part = apart.square_() / channels
            error[visit.rows] += part / len(own) if reconstruct == "all" else part
    return out.view(hidden.shape), error.view(batch, tokens)


def go_through(
    flat: Tensor,
    own: Weights,
    visit: Visit,
    keys: Tensor,
    seed: int,
    site: int,
    dropout: float,
    uniform: Uniform,
) -> Inside:
    """One visit from the rows `flat` [B * T, D]."""
    x = flat[visit.rows].to(own.encoder.dtype)
    code = torch.addmm(own.encoder_bias, x, own.encoder.T).tanh_()
    with_inner = visit.bounds[-2]
    drop = narrow_drop = None
    if dropout:
        token_keys = keys[visit.rows]
        drop = drop_factor(uniform(token_keys, code.shape[1], seed, outer_site(site, visit.view)), dropout)
        drop = drop.to(code.dtype)
        width, place = own.inner_encoder.shape[1], inner_site(site, visit.view)
        narrow_drop = drop_factor(uniform(token_keys[:with_inner], width, seed, place), dropout).to(
            code.dtype
        )
    dropped = code if drop is None else code * drop
    decoded, narrow = dropped.clone() if with_inner else dropped, []
    for k in range(own.inner_encoder.shape[0]):
        begin, end = visit.bounds[k : k + 2]
        value = torch.addmm(own.inner_encoder_bias[k], dropped[begin:end], own.inner_encoder[k].T).tanh_()
        narrow.append(value)
        value = value if narrow_drop is None else value * narrow_drop[begin:end]
        decoded[begin:end] = torch.addmm(own.inner_decoder_bias[k], value, own.inner_decoder[k].T).tanh_()
    y = torch.addmm(own.decoder_bias, decoded, own.decoder.T)
    return Inside(x, code, drop, dropped, narrow, narrow_drop, decoded, y)


def backward(
    gradient: Tensor,
    error_gradient: Tensor,
    hidden: Tensor,
    weights: Sequence[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
    uniform: Uniform,
) -> tuple[Tensor, list[Tensor]]:
    """`bottleneck_backward_torch` with the random numbers of `uniform`."""
    flat, number = hidden.reshape(-1, hidden.shape[-1]), len(weights) // len(Weights._fields)
    own = views_of(weights)
    found = [
        (visit, go_through(flat, own[visit.view], visit, keys.flatten(), seed, site, dropout, uniform))
        for visit in visits(views, inner, spans, own[0].inner_encoder.shape[0], number, reconstruct == "all")
        if visit.rows.numel()
    ]
    return come_back(gradient, error_gradient, hidden, weights, found, reconstruct)


def come_back(
    gradient: Tensor,
    error_gradient: Tensor,
    hidden: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[tuple[Visit, Inside]],
    reconstruct: str,
) -> tuple[Tensor, list[Tensor]]:
    """The backward from what the forward computed on the way in every visit that was made."""
    flat, flat_gradient = hidden.reshape(-1, hidden.shape[-1]), gradient.reshape(-1, hidden.shape[-1])
    upstream = error_gradient.flatten()
    own = views_of(weights)
    hidden_gradient = flat_gradient.clone()
    made = {visit.view: (visit, inside) for visit, inside in kept}
    gradients = []
    for number, autoencoder in enumerate(own):
        if number not in made:
            gradients.extend(torch.zeros_like(tensor) for tensor in autoencoder)
            continue
        visit, inside = made[number]
        taken = visit.rows if visit.taken is None else visit.rows[visit.taken]
        pull = None
        if reconstruct != "none":
            pull = upstream[visit.rows] * (2 / flat.shape[1] / (len(own) if reconstruct == "all" else 1))
            pull = pull.to(inside.y.dtype)
        from_out, found = _come_back(
            flat_gradient[taken].to(inside.y.dtype), pull, own[visit.view], visit, inside
        )
        hidden_gradient[taken] = from_out.to(hidden_gradient.dtype)
        gradients.extend(found)
    return hidden_gradient.view(hidden.shape), gradients


def _come_back(
    from_out: Tensor, pull: Tensor | None, own: Weights, visit: Visit, inside: Inside
) -> tuple[Tensor, Weights]:
    """The gradients of x [s, D], from that of `out` alone, and of the weights, from both.

    `from_out` [s, D] is the gradient of `out` at the tokens that take this view; `pull` [n] times y - x is that of the
    error at all that visit it.
    """
    n, taken = visit.rows.shape[0], visit.taken
    if pull is None:
        both, taken_bounds = from_out, visit.bounds  # one gradient: nothing tells the weights from hidden
    else:
        both, taken_bounds = from_out.new_empty(n + len(from_out), from_out.shape[1]), visit.taken_bounds
        total = torch.sub(inside.y, inside.x, out=both[:n]).mul_(pull[:, None])
        both[n:] = from_out
        if taken is None:
            total += from_out
            taken_bounds = visit.bounds
        else:
            total.index_add_(0, taken, from_out)

    def times(rows: Tensor, factor: Tensor, begin: int, end: int, first: int, last: int) -> None:
        """Multiply the rows begin..end of the n, and those of them taken (first..last), by `factor` [end - begin, .]."""
        rows[: end - begin] *= factor
        if pull is not None:
            rows[end - begin :] *= factor if taken is None else factor[taken[first:last] - begin]

    found = {
        "decoder": both[:n].T @ inside.decoded,
        "decoder_bias": both[:n].sum(0),
        "inner_encoder": torch.zeros_like(own.inner_encoder),
        "inner_encoder_bias": torch.zeros_like(own.inner_encoder_bias),
        "inner_decoder": torch.zeros_like(own.inner_decoder),
        "inner_decoder_bias": torch.zeros_like(own.inner_decoder_bias),
    }
    rows = both @ own.decoder
    for k, narrow in enumerate(inside.narrow):
        begin, end = visit.bounds[k : k + 2]
        first, last = taken_bounds[k : k + 2]
        size = end - begin
        part = rows[begin:end] if pull is None else torch.cat((rows[begin:end], rows[n + first : n + last]))
        times(part, 1 - inside.decoded[begin:end].square(), begin, end, first, last)
        drop = None if inside.narrow_drop is None else inside.narrow_drop[begin:end]
        found["inner_decoder"][k] = part[:size].T @ (narrow if drop is None else narrow * drop)
        found["inner_decoder_bias"][k] = part[:size].sum(0)
        part = part @ own.inner_decoder[k]
        slope = 1 - narrow.square()
        times(part, slope if drop is None else slope * drop, begin, end, first, last)
        found["inner_encoder"][k] = part[:size].T @ inside.dropped[begin:end]
        found["inner_encoder_bias"][k] = part[:size].sum(0)
        part = part @ own.inner_encoder[k]
        rows[begin:end] = part[:size]
        if pull is not None:
            rows[n + first : n + last] = part[size:]
    slope = 1 - inside.code.square()
    times(rows, slope if inside.drop is None else slope * inside.drop, 0, n, 0, taken_bounds[-1])
    found["encoder"] = rows[:n].T @ inside.x
    found["encoder_bias"] = rows[:n].sum(0)
    return rows[n if pull is not None else 0 :] @ own.encoder, Weights(**found)
