"""R-Drop: two dropout draws of one example must agree (Liang et al., NeurIPS 2021, arXiv 2106.14448).

    1/2 (CE_1 + CE_2) + alpha * 1/2 [KL(p_1 || p_2) + KL(p_2 || p_1)]          regression: alpha * (y_1 - y_2)^2

Both draws run through one forward of the doubled batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from dist_reg.errors import UserError
from dist_reg.methods.base import Host, Method, Step


@dataclass(frozen=True, kw_only=True)
class RDrop(Method):
    """Options of R-Drop. Raises UserError for an alpha that is negative or not a number."""

    name: ClassVar[str] = "rdrop"
    summary: ClassVar[str] = "two dropout draws of an example must predict the same"
    source: ClassVar[str] = "Liang et al., NeurIPS 2021, arXiv 2106.14448"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    alpha: float = 0.5
    """Weight of the term; the paper's GLUE runs choose from 0.1, 0.5 and 1.0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise UserError(
                f"rdrop: alpha must be a finite number >= 0, for example 0.5; it is {self.alpha}."
            )

    def attach(self, host: Host) -> None:
        if self.alpha > 0:
            host.double_inputs(second_labels=True)

    def ideal_cost(self, layers: int, hidden_size: int) -> float:
        return 2.0 if self.alpha > 0 else 1.0

    def finish(self, step: Step) -> None:
        from dist_reg.agreement import disagreement

        if self.alpha > 0:
            scale = self.alpha if step.regression else self.alpha / 2
            step.add_term(self.name, 0, scale * disagreement(step, self.name))
