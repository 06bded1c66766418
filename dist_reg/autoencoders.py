"""The autoencoders of one insertion point, and which of them every token takes.

Shapes: B examples of the micro-batch, T tokens, D hidden size, M autoencoders of width d, K inner ones of width h = d / 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_reg.methods.base import Step
from dist_reg.model import keyed_generator
from dist_reg.noise import noise_survival, step_keys, token_keys
from dist_reg.ops import bottleneck, perturb
from dist_reg.streams import mean_over_real_tokens

if TYPE_CHECKING:
    from dist_reg.methods.mvcr import MVCR


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
        if self.per == "position" and step.spans is not None:
            # Counted from an example's first real token, wherever its padding lies.
            counted = (torch.arange(length, device=device) - step.spans[:, :1]).clamp_(min=0)
            return views[0][counted], inner[0][counted]
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


@dataclass(eq=False)
class Insertion:
    """What MVCR does at one place. A copied model's copy follows its own copy of the module."""

    method: MVCR
    layer: int
    draw: ViewDraw
    module: RandomAutoencoders
    noise_site: int
    """Of the noise on what enters, from `dist_reg.noise.site_id`."""

    def __call__(self, hidden_states: Tensor, step: Step) -> Tensor:
        """Hidden states [B, T, D] with every token's own view; the reconstruction goes into `step`."""
        if self.method.input_noise:
            hidden_states = self._noisy(hidden_states, step)
        views, inner = self.draw(step)
        out, error = self.module(hidden_states, views, inner, step)
        if self.method.weight:
            mean = mean_over_real_tokens(self._weighed(error, views), step.spans)
            step.add_term(self.method.name, self.layer, self.method.weight * mean)
        return out

    def _noisy(self, hidden_states: Tensor, step: Step) -> Tensor:
        noisy = perturb(
            hidden_states,
            sigma=self.method.input_noise,
            seed=step.seed,
            example_keys=step.example_keys,
            site=self.noise_site,
            spans=step.spans,
        )
        if step.measure:
            survival = noise_survival(hidden_states, noisy, step.spans)
            step.values[f"{self.method.name}/noise_survival", self.noise_site] = survival
        return noisy

    def _weighed(self, error: Tensor, views: Tensor) -> Tensor:
        """[B, T], the mean over all autoencoders, or with `sampled` what has it as its expectation."""
        if self.method.reconstruct == "all":
            return error
        # One of M, drawn with probability p, counts 1 / (M p).
        shares = [self.method.autoencoders * p for p in self.method.view_probabilities()[:-1]]
        return error * sum((views == m) / share for m, share in enumerate(shares) if share)
