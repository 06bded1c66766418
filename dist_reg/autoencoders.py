"""The autoencoders of one insertion point, and which of them every token takes.

Shapes: B examples of the micro-batch, T tokens, D hidden size, M autoencoders of width d, K inner ones of width h = d / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from dist_reg.methods.base import Step
from dist_reg.model import keyed_generator
from dist_reg.noise import step_keys, token_keys
from dist_reg.ops import bottleneck, perturb


@dataclass(frozen=True)
class ViewDraw:
    """Draws the view of every token, and the inner choice it makes in each autoencoder."""

    probabilities: tuple[float, ...]
    """[M + 1], of the autoencoders and of taking none."""
    choices: int
    """K; an inner one or none, each with probability 1 / (K + 1)."""
    per: str
    """Who shares a draw: token, position, sequence or batch."""
    site: int
    """From `dist_reg.noise.site_id`."""

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        """(views int64 [B, T] in 0..M, inner int64 [B, T, M] in 0..K), a function of the keys of `step` alone.

        A draw for an example is keyed by it. One shared by the batch is keyed by the number of the optimizer step, so
        that every process and micro-batch of the step draws the same.
        """
        batch, number = step.batch, len(self.probabilities) - 1
        device = step.example_keys.device
        alone = self.per in ("token", "sequence")
        keys = step.example_keys if alone else step_keys(step.number, device)
        length = step.tokens if self.per in ("token", "position") else 1
        uniform = perturb(
            torch.zeros(keys.shape[0], length, number + 1, device=device),
            sigma=1.0,
            seed=step.seed,
            example_keys=keys,
            site=self.site,
            spans=step.spans if self.per == "token" else None,
            distribution="uniform",
        )
        uniform = (uniform + 1) / 2
        edges = accumulate(self.probabilities[:-1])
        views = torch.stack([uniform[..., 0] >= edge for edge in edges]).sum(0)
        inner = (uniform[..., 1:] * (self.choices + 1)).long().clamp_(max=self.choices)
        return views.expand(batch, step.tokens), inner.expand(batch, step.tokens, number)


class RandomAutoencoders(nn.Module):
    """All autoencoders of one insertion point, as one module that runs in every training forward.

    ZeRO-3 gathers the parameters of a module when it is called, and ranks whose tokens take other views must gather the
    same. Every parameter gets a gradient in every step, zero where no token came.
    """

    def __init__(
        self,
        name: str,
        channels: int,
        widths: Sequence[int],
        choices: int,
        *,
        seed: int,
        site: int,
        dropout: float,
        reconstruct: str,
    ) -> None:
        """Weights and biases are U(-1, 1) / sqrt(inputs), drawn by (`seed`, `name`, parameter): alike on every rank."""
        super().__init__()
        self.channels, self.widths, self.choices = channels, tuple(widths), choices
        self.site, self.dropout, self.reconstruct = site, dropout, reconstruct
        self._names: list[str] = []
        for view, width in enumerate(widths):
            narrow = max(1, width // 2)
            for kind, shape, inputs in (
                ("encoder", (width, channels), channels),
                ("encoder_bias", (width,), channels),
                ("inner_encoder", (choices, narrow, width), width),
                ("inner_encoder_bias", (choices, narrow), width),
                ("inner_decoder", (choices, width, narrow), narrow),
                ("inner_decoder_bias", (choices, width), narrow),
                ("decoder", (channels, width), width),
                ("decoder_bias", (channels,), width),
            ):
                own = f"{kind}_{view}"
                bound = 1 / math.sqrt(inputs)
                generator = keyed_generator(seed, f"{name}.{own}")
                value = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
                self.register_parameter(own, nn.Parameter(value))
                self._names.append(own)

    def forward(
        self, hidden_states: Tensor, views: Tensor, inner: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """(hidden states [B, T, D], reconstruction error fp32 [B, T]); see `dist_reg.ops.bottleneck`."""
        weights = [getattr(self, name) for name in self._names]
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            weights = [weight.to(torch.get_autocast_dtype(device)) for weight in weights]
        return bottleneck(
            hidden_states,
            weights,
            views=views,
            inner=inner,
            token_keys=token_keys(step.example_keys, step.tokens, step.spans),
            seed=step.seed,
            site=self.site,
            spans=step.spans,
            dropout=self.dropout,
            reconstruct=self.reconstruct,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, widths={self.widths}, inner={self.choices}, reconstruct={self.reconstruct!r}"
        )
