"""Noise on hidden states as a value, so that whoever adds it may choose the operation; the numbers are the same.

Shapes: B examples of the micro-batch, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_reg.noise import noise_survival
from dist_reg.ops import layer_norm_perturb, perturb, perturb_rms_norm, perturb_stability

if TYPE_CHECKING:
    from dist_reg.methods.base import Step


@dataclass(frozen=True, kw_only=True)
class LayerNoise:
    """Which noise, at which site. Called with hidden states [B, T, D] and their step, it adds itself."""

    site: int
    """From `dist_reg.noise.site_id`."""
    sigma: float
    distribution: str
    scale: str
    survival: str
    """The metric that says which fraction of the activations the noise changed, see `noise_survival`."""

    def __call__(self, hidden_states: Tensor, step: Step) -> Tensor:
        noisy = perturb(hidden_states, **self._options(step))
        if step.measure:
            self._measure(hidden_states, noisy, step)
        return noisy

    def after_layer_norm(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor, epsilon: float, step: Step
    ) -> Tensor:
        """The noise added to LayerNorm(hidden_states) [B, T, D], in the norm's own pass."""
        noisy = layer_norm_perturb(hidden_states, weight, bias, epsilon=epsilon, **self._options(step))
        if step.measure:
            # Beside the step, for the first example alone: what is measured must not change the run.
            with torch.no_grad():
                first = self._options(step, sigma=0.0, examples=1)
                clean = layer_norm_perturb(hidden_states[:1], weight, bias, epsilon=epsilon, **first)
            self._measure(clean, noisy, step)
        return noisy

    def before_rms_norm(
        self, hidden_states: Tensor, weight: Tensor, epsilon: float, step: Step
    ) -> tuple[Tensor, Tensor]:
        """The noise added to `hidden_states`, and RMSNorm of the sum: (stream, normed), each [B, T, D]."""
        stream, normed = perturb_rms_norm(hidden_states, weight, epsilon=epsilon, **self._options(step))
        if step.measure:
            self._measure(hidden_states, stream, step)
        return stream, normed

    def after_comparison(self, twin: Tensor, step: Step, detach_clean: bool) -> tuple[Tensor, Tensor]:
        """The noise added to both halves of `twin` [2B, T, D], and how far apart they lay before it: [B, T]."""
        noisy, distance = perturb_stability(twin, detach_clean=detach_clean, **self._options(step))
        if step.measure:
            self._measure(twin, noisy, step)
        return noisy, distance

    def _options(self, step: Step, sigma: float | None = None, examples: int | None = None) -> dict[str, Any]:
        return {
            "sigma": self.sigma if sigma is None else sigma,
            "seed": step.seed,
            "example_keys": step.example_keys[:examples],
            "site": self.site,
            "spans": None if step.spans is None else step.spans[:examples],
            "distribution": self.distribution,
            "scale": self.scale,
        }

    def _measure(self, before: Tensor, after: Tensor, step: Step) -> None:
        step.values[self.survival, self.site] = noise_survival(before, after, step.spans)
