"""NEFTune: noise on the word embeddings, smaller the longer the example (Jain et al., ICLR 2024, arXiv 2310.05914).

    e + alpha / sqrt(L D) * U(-1, 1)          section 2, algorithm 1

L is the example's number of real tokens (of rows that hold several, each one's own), D the width of the embeddings; in
training only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dist_reg.errors import UserError
from dist_reg.methods.base import Host, Method, Step

if TYPE_CHECKING:
    from torch import Tensor

SITE_METHOD = 5


@dataclass(frozen=True, kw_only=True)
class NEFTune(Method):
    """Options of NEFTune. Raises UserError for an alpha that is negative or not a number."""

    name: ClassVar[str] = "neftune"
    summary: ClassVar[str] = "uniform noise on word embeddings, smaller the longer the example"
    source: ClassVar[str] = "Jain et al., ICLR 2024, arXiv 2310.05914"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    alpha: float = 5.0
    """Size of the noise; the paper takes 5, 10 and 15."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise UserError(
                f"neftune: alpha must be a finite number >= 0, for example 5; it is {self.alpha}."
            )

    def attach(self, host: Host) -> None:
        config: Any = getattr(host.backbone.base, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(
                "neftune: an encoder-decoder looks up its two inputs in one table, of which one alone takes noise; use an "
                "encoder or a decoder."
            )
        if self.alpha > 0:
            host.watch_embeddings(self._perturb)

    def _perturb(self, embedded: Tensor, ids: Tensor, table: Tensor, step: Step) -> Tensor:
        import torch

        from dist_reg.noise import noise_survival, site_id
        from dist_reg.ops import perturb

        step = step.of(embedded)
        batch, tokens, channels = embedded.shape
        unit = perturb(
            torch.zeros(embedded.shape, device=embedded.device),
            sigma=1.0,
            seed=step.seed,
            example_keys=step.example_keys,
            site=site_id(SITE_METHOD, 0, 0),
            spans=step.spans,
            distribution="uniform",
        )
        if step.sequence_lengths is not None:
            lengths = step.sequence_lengths
        elif step.spans is None:
            lengths = torch.full((batch, 1), tokens, device=embedded.device)
        else:
            lengths = (step.spans[:, 1:] - step.spans[:, :1]).clamp(min=1)
        scale = self.alpha / (lengths * channels).float().sqrt()
        noisy = (embedded + scale[..., None] * unit).to(embedded.dtype)
        if step.measure:
            step.values["neftune/noise_survival", 0] = noise_survival(embedded, noisy, step.spans)
        return noisy

    def warning(self, metrics: dict[str, float]) -> str | None:
        from dist_reg.noise import survival_warning

        return survival_warning(
            self.name, self.alpha, metrics, "a larger alpha, or autocast with fp32 weights"
        )
