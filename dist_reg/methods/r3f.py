"""R3F and R4F: noise on the word embeddings must not change the prediction (Aghajanyan et al., ICLR 2021, arXiv 2008.03156).

    CE(p) + weight * [KL(p || p~) + KL(p~ || p)],   p~ from embeddings + z,  z ~ U(-sigma, sigma) or N(0, sigma^2)

Regression: weight * (y - y~)^2. R4F divides the head's output projection by its largest singular value as well. Both
passes are halves of one forward, with dropout of their own, as in the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dist_reg.errors import UserError
from dist_reg.methods.base import Host, Method, Step

if TYPE_CHECKING:
    from torch import Tensor, nn

SITE_METHOD = 3
MOST_CLASSES = 4096
"""Outputs up to which the largest singular value is computed exactly, every step."""


@dataclass(frozen=True, kw_only=True)
class R3F(Method):
    """Options of R3F. Raises UserError for an unknown choice or a number out of range."""

    name: ClassVar[str] = "r3f"
    summary: ClassVar[str] = "noise on word embeddings must not change the prediction"
    source: ClassVar[str] = "Aghajanyan et al., ICLR 2021, arXiv 2008.03156"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    weight: float = 1.0
    """Weight of the term, lambda in the paper, which takes 1.0, and 0.7 on RTE."""
    sigma: float = 1e-5
    """Half width of uniform noise, standard deviation of normal noise; 1e-5 in the paper."""
    distribution: Literal["uniform", "normal"] = "uniform"
    """Distribution of the noise."""
    spectral_norm: bool = False
    """R4F: the head's output projection divided by its largest singular value, in training, evaluation and export."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "sigma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"r3f: {name} must be a finite number >= 0; it is {value}.")

    def attach(self, host: Host) -> None:
        if self.spectral_norm:
            host.reparametrise(output_projection(host), divided_by_largest_singular_value)
        if self.weight > 0 and self.sigma > 0:
            host.double_inputs(second_labels=False)
            host.watch_embeddings(self._perturb_second_half)

    def _perturb_second_half(self, embedded: Tensor, ids: Tensor, table: Tensor, step: Step) -> Tensor:
        import torch

        from dist_reg.noise import noise_survival, site_id
        from dist_reg.ops import perturb

        clean, second = embedded.chunk(2)
        noisy = perturb(
            second,
            sigma=self.sigma,
            seed=step.seed,
            example_keys=step.example_keys,
            site=site_id(SITE_METHOD, 0, 0),
            spans=step.spans,
            distribution=self.distribution,
        )
        if step.measure:
            step.values["r3f/noise_survival", 0] = noise_survival(second, noisy, step.spans)
        return torch.cat((clean, noisy))

    def ideal_cost(self, layers: int, hidden_size: int) -> float:
        return 2.0 if self.weight > 0 and self.sigma > 0 else 1.0

    def finish(self, step: Step) -> None:
        from dist_reg.agreement import clean_regression_loss, disagreement

        if self.weight == 0 or self.sigma == 0:
            return
        step.add_term(self.name, 0, self.weight * disagreement(step, self.name))
        if step.regression:
            step.task_loss = clean_regression_loss(step)

    def warning(self, metrics: dict[str, float]) -> str | None:
        from dist_reg.noise import survival_warning

        return survival_warning(
            self.name, self.sigma, metrics, "a larger sigma, or autocast with fp32 weights"
        )


def output_projection(host: Host) -> nn.Linear:
    """The last linear layer of the model's head. Raises UserError where there is none or it is a vocabulary wide."""
    from torch import nn

    head = host.backbone.head
    linear = (
        [module for module in head.modules() if isinstance(module, nn.Linear)] if head is not None else []
    )
    if not linear:
        raise UserError("r3f: spectral_norm needs a model with a classification head.")
    base: Any = host.backbone.base
    if linear[-1].weight is base.get_input_embeddings().weight:
        raise UserError(
            "r3f: spectral_norm is for classification heads; this one is tied to the word embeddings."
        )
    if linear[-1].out_features > MOST_CLASSES:
        raise UserError(
            f"r3f: spectral_norm is for classification heads; this one has {linear[-1].out_features} outputs."
        )
    return linear[-1]


def divided_by_largest_singular_value(weight: Tensor) -> Tensor:
    """`weight` [C, D] with spectral norm 1."""
    import torch

    return weight / torch.linalg.matrix_norm(weight.float(), 2).to(weight.dtype)
