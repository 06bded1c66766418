"""HIRE's modules: a summary and a gate of every layer, and what the head reads in place of the last hidden states.

Shapes: B examples, T tokens, D hidden size, L layers, H GRU units a direction, P real tokens of the batch.

Source: arXiv 1911.01940, section 3; what the paper leaves open is marked "our reading".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dist_reg.model import keyed_generator
from dist_reg.ops import layer_mix

GRU_LAYERS = 2
INITIAL_STD = 0.02


class Packing(NamedTuple):
    """The real tokens of a batch in the order a recurrent network reads them: by time, the longest example first."""

    rows: Tensor
    """int64 [P], where they lie in the flat batch [B * T]."""
    counts: Tensor
    """int64 on the CPU, how many examples have a token at each time."""
    order: Tensor
    """int64 [B], the examples, longest first."""


def pack(real: Tensor) -> Packing:
    """The packing of examples whose real tokens are `real` bool [B, T]; at least one each."""
    lengths = real.sum(1)
    order = lengths.argsort(descending=True, stable=True)
    tokens = real.shape[1]
    # Every example's real positions first, in their order.
    positions = (~real).byte().argsort(dim=1, stable=True)[order].T
    there = torch.arange(tokens, device=real.device)[:, None] < lengths[order]
    rows = (order * tokens + positions)[there]
    counts = there.sum(1).cpu()
    return Packing(rows, counts[counts > 0], order)


def packed_gru(name: str, channels: int, units: int, seed: int) -> nn.GRU:
    """A bidirectional GRU of two layers, U(-1, 1) / sqrt(units) as PyTorch draws it, by (`seed`, `name`, parameter)."""
    gru = nn.GRU(channels, units, GRU_LAYERS, bidirectional=True, device="cpu")
    bound = 1 / math.sqrt(units)
    for own, parameter in gru.named_parameters():
        generator = keyed_generator(seed, f"{name}.{own}")
        parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return gru


class HiddenExtractor(nn.Module):
    """Everything HIRE adds to a model: the extractor of every layer's gate, the fusion, and its GRU.

    The weights of the gate begin at 0 and its bias at 1 / L, so that training begins with the mean of all layers and no
    layer behind a closed ReLU; the fusion begins near ReLU(R), what the head would read without it (our reading: the paper
    says neither). What is random is drawn by (seed, name): alike on every rank and at every ZeRO stage.
    """

    def __init__(
        self,
        channels: int,
        layers: int,
        *,
        extractor: str,
        gru_hidden: int,
        combine: str,
        normalisation: str,
        fusion_rnn: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.combine, self.normalisation = combine, normalisation
        self.gru = packed_gru("hire.gru", channels, gru_hidden, seed) if extractor == "gru" else None
        if self.gru is None:
            self.query = nn.Parameter(_drawn((channels,), seed, "hire.query"))
        summary = channels if self.gru is None else 2 * gru_hidden
        self.gate_weight = nn.Parameter(torch.zeros(summary, device="cpu"))
        self.gate_bias = nn.Parameter(torch.full((1,), 1 / layers, device="cpu"))
        fusion = _drawn((channels, 4 * channels), seed, "hire.fusion_weight")
        fusion[:, :channels] += torch.eye(channels)
        self.fusion_weight = nn.Parameter(fusion)
        self.fusion_bias = nn.Parameter(torch.zeros(channels, device="cpu"))
        self.fusion_gru = packed_gru("hire.fusion_gru", channels, gru_hidden, seed) if fusion_rnn else None
        # A name that Transformers prints among the unexpected ones when its Auto classes load the weights.
        self.register_buffer("load_this_model_with_dist_reg_load", torch.ones(1, device="cpu"))

    def forward(self, states: Sequence[Tensor], real: Tensor | None) -> tuple[Tensor, Tensor]:
        """(what the head reads [B, T, D], gates [L, B]) from L hidden states [B, T, D], of which the head reads the last today.

        `real` bool [B, T] says which tokens are, None for all of them; an example without any counts its first one.
        """
        last = states[-1]
        batch, tokens, channels = last.shape
        if real is None:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=last.device)
        first = torch.arange(tokens, device=last.device) == 0
        real = real | (first & ~real.any(1, keepdim=True))
        packing: Any = pack(real) if self.gru is not None or self.fusion_gru is not None else None
        if self.gru is not None:
            logits = self._summarise(self.gru, states, packing) @ self.gate_weight + self.gate_bias
        else:
            logits = torch.stack([self._attend(state, real) for state in states]) + self.gate_bias
        gates = logits.softmax(0) if self.normalisation == "softmax" else logits.relu()
        gates = gates.to(torch.promote_types(last.dtype, torch.float32))
        fused = self._fuse(last, layer_mix(states, gates))
        if self.fusion_gru is not None:
            data = self._own_dtype(fused).reshape(-1, channels)[packing.rows]
            outputs = self.fusion_gru(PackedSequence(data, packing.counts))[0].data
            whole = outputs.new_zeros(batch * tokens, channels)
            fused = whole.index_copy(0, packing.rows, outputs).view(batch, tokens, channels)
        return fused.to(last.dtype), gates

    def _summarise(self, gru: nn.GRU, states: Sequence[Tensor], packing: Packing) -> Tensor:
        """u_l of every layer [L, B, 2H]: the layers' real tokens go through as one batch of L * B sequences."""
        channels, layers, batch = states[0].shape[2], len(states), packing.order.shape[0]
        real = [self._own_dtype(state).reshape(-1, channels)[packing.rows] for state in states]
        data = torch.stack(real, 1).flatten(0, 1)
        _, states_at_end = gru(PackedSequence(data, packing.counts * layers))
        last = torch.cat((states_at_end[-2], states_at_end[-1]), 1)
        by_example = torch.empty_like(packing.order)
        by_example[packing.order] = torch.arange(batch, device=packing.order.device)
        return last.view(batch, layers, -1)[by_example].transpose(0, 1)

    def _attend(self, state: Tensor, real: Tensor) -> Tensor:
        """w^T u_l [B] with u_l the mean of the real tokens, weighed by softmax(query . h / sqrt(D)).

        u_l itself is never made: what w finds in each token is averaged instead.
        """
        probes = torch.stack((self.query / math.sqrt(state.shape[2]), self.gate_weight))
        scores, found = F.linear(self._own_dtype(state), probes).float().unbind(-1)
        shares = scores.masked_fill(~real, -math.inf).softmax(1)
        return (shares * found.masked_fill(~real, 0.0)).sum(1)

    def _fuse(self, last: Tensor, mixed: Tensor) -> Tensor:
        """ReLU(W [R ; A ; R + A ; R o A] + b), the four products taken as three: W1 R + W3 (R + A) = (W1 + W3) R + W3 A."""
        last, mixed = self._own_dtype(last), self._own_dtype(mixed)
        of_last, of_mixed, of_both, of_product = self.fusion_weight.chunk(4, 1)
        of_mixed = of_mixed + of_both if self.combine == "sum" else of_mixed - of_both
        fused = F.linear(last, of_last + of_both, self.fusion_bias)
        return (fused + F.linear(mixed, of_mixed) + F.linear(last * mixed, of_product)).relu()

    def _own_dtype(self, states: Tensor) -> Tensor:
        """In the parameters' dtype; under autocast, PyTorch sees to that itself."""
        if torch.is_autocast_enabled(states.device.type) and states.is_cuda:
            return states
        return states.to(self.fusion_weight.dtype)


def _drawn(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    return torch.empty(shape, device="cpu").normal_(0.0, INITIAL_STD, generator=keyed_generator(seed, name))
