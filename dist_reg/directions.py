"""Where LNSR's noise points, before it is brought to its norm.

Every direction of an example is a function of (run seed, epoch, example, site) and hidden states that no cut of
the batch separates, so a run is the same on any topology. Shapes: hidden states [B, T, D], spans int32 [B, 2] or None.
All directions are fp32 [B, T, D], 0 at padding, and constants to the gradient.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_reg.errors import UserError
from dist_reg.noise import token_spans
from dist_reg.ops import perturb

if TYPE_CHECKING:
    from dist_reg.methods.base import Step

logger = logging.getLogger(__name__)

WORDS_AT_ONCE = 256
"""Rows of a distance matrix as wide as the vocabulary."""


def gaussian(hidden_states: Tensor, step: Step, site: int) -> Tensor:
    """Standard normal numbers."""
    nothing = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    return perturb(
        nothing, sigma=1.0, seed=step.seed, example_keys=step.example_keys, site=site, spans=step.spans
    )


def secant(hidden_states: Tensor, spans: Tensor | None) -> Tensor:
    """From each example to its neighbour in the batch: rows 2i and 2i + 1 are a pair.

    A micro-batch of an even size holds whole pairs of the global batch however that is cut, and the order of examples
    is new every epoch. The last row of an odd batch takes the row before it. Token t of an example goes with token
    t modulo n of a neighbour of n real tokens. Raises UserError for a batch of one example.
    """
    batch, tokens, _ = hidden_states.shape
    if batch == 1:
        raise UserError(
            "lnsr: noise: secant needs two examples in a micro-batch, and this one has 1; use a larger micro-batch."
        )
    if batch % 2:
        _warn_odd(batch)
    device = hidden_states.device
    spans = token_spans(None, batch, tokens, device) if spans is None else spans.long()
    partner = (torch.arange(batch, device=device) ^ 1).clamp(max=batch - 1)
    partner[-1] = batch - 2
    first, count = spans[:, :1], (spans[:, 1:] - spans[:, :1]).clamp(min=1)
    position = torch.arange(tokens, device=device)
    matching = first[partner] + (position - first) % count[partner]
    states = hidden_states.float()
    other = states[partner[:, None], matching.clamp(0, tokens - 1)]
    return (other - states) * _real(spans, tokens)


_warned: set[str] = set()


def _warn_odd(batch: int) -> None:
    if "odd" not in _warned:
        _warned.add("odd")
        logger.warning(
            "lnsr: a micro-batch of %d examples cannot be paired off, so the run depends on how batches are cut; use an "
            "even micro-batch.",
            batch,
        )


def tangent(noise: Tensor, hidden_states: Tensor, spans: Tensor | None, count: int) -> Tensor:
    """`noise` projected on the `count` main directions of the example's own real tokens, about their mean.

    The example's and not the batch's: those would depend on how the batch is cut.
    """
    batch, tokens, _ = hidden_states.shape
    spans = token_spans(None, batch, tokens, hidden_states.device) if spans is None else spans.long()
    real = _real(spans, tokens)
    states = hidden_states.float() * real
    states = (states - states.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)) * real
    # The main directions are V = S^T U / s with S S^T = U s^2 U^T: a matrix of T x T, not D x D.
    with torch.autocast(states.device.type, enabled=False):
        squares, left = torch.linalg.eigh(states @ states.transpose(1, 2))
    squares, left = squares[:, -count:], left[:, :, -count:]
    kept = squares > squares[:, -1:] * 1e-6
    scaled = left * torch.where(kept, squares.clamp(min=1e-30).rsqrt(), 0.0)[:, None]
    with torch.autocast(states.device.type, enabled=False):
        basis = states.transpose(1, 2) @ scaled
        return noise @ basis @ basis.transpose(1, 2) * real


def neighbour(ids: Tensor, table: Tensor, count: int, step: Step, site: int) -> Tensor:
    """From the word embedding of every token to one of the `count` nearest others, chosen by the example's key.

    `ids` [B, T], `table` [V, D] as it is in this step, so nothing has to be kept for a resume. Distances are Euclidean.
    """
    count = min(count, table.shape[0] - 1)
    words, which = ids.unique(return_inverse=True)
    with torch.autocast(ids.device.type, enabled=False):
        squares = table.float().square().sum(1)
        nearest = torch.cat([_nearest(chunk, table, squares, count) for chunk in words.split(WORDS_AT_ONCE)])
    nothing = torch.zeros(*ids.shape, 1, device=ids.device)
    drawn = perturb(
        nothing,
        sigma=1.0,
        seed=step.seed,
        example_keys=step.example_keys,
        site=site,
        distribution="uniform_released",
        spans=step.spans,
    )
    choice = (drawn * count).long().clamp(max=count - 1)
    chosen = nearest[which].gather(2, choice)[..., 0]
    direction = table[chosen].float() - table[ids].float()
    if step.spans is not None:
        direction = direction * _real(step.spans.long(), ids.shape[1])
    return direction


def _nearest(words: Tensor, table: Tensor, squares: Tensor, count: int) -> Tensor:
    """The `count` rows of `table` nearest to each of the rows `words`, themselves left out: [len(words), count]."""
    own = table[words].float()
    distance = squares - 2 * own @ table.float().T
    distance.scatter_(1, words[:, None], torch.inf)
    return distance.topk(count, largest=False).indices


def rescaled(direction: Tensor, hidden_states: Tensor, size: float) -> Tensor:
    """`direction` [B, T, D] with `size` times the norm of each token of `hidden_states`; 0 stays 0."""
    norm = hidden_states.detach().float().norm(dim=-1, keepdim=True)
    length = direction.norm(dim=-1, keepdim=True)
    return direction * (size * norm / torch.where(length > 0, length, 1.0))


def twin(hidden_states: Tensor, noise: Tensor) -> Tensor:
    """[2B, T, D]: `hidden_states`, and behind them the same plus `noise`, rounded once."""
    return torch.cat((hidden_states, (hidden_states.float() + noise).to(hidden_states.dtype)))


def _real(spans: Tensor, tokens: int) -> Tensor:
    """fp32 [B, T, 1]: 1 at real tokens."""
    position = torch.arange(tokens, device=spans.device)
    return ((position >= spans[:, :1]) & (position < spans[:, 1:])).float()[..., None]
