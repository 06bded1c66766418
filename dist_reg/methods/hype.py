"""HyPe: noise on the hidden states that enter every layer (Yuan et al., ACL 2023, arXiv 2212.08853).

    h^l = g_l(h^{l-1} + eps_l),  l = 1..L          equations 1-4

eps_l is drawn anew for every example, epoch, layer, token and channel, in training only. Noise never
follows the last layer, nothing is added to the loss and nothing is left in the saved model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dist_reg.errors import UserError
from dist_reg.methods.base import Host, Method

if TYPE_CHECKING:
    from dist_reg.layer_noise import LayerNoise

SITE_METHOD = 1
SITE_INPUT, SITE_WITHIN = 0, 1


@dataclass(frozen=True, kw_only=True)
class HyPe(Method):
    """Options of HyPe. Raises UserError for an unknown choice, or a sigma that is negative or not a number."""

    name: ClassVar[str] = "hype"
    summary: ClassVar[str] = "noise on the hidden states entering every layer"
    source: ClassVar[str] = "Yuan et al., ACL 2023, arXiv 2212.08853"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    sigma: float = 1e-5
    """Standard deviation of normal noise, half width of uniform noise; the paper uses 1e-5 and 1e-4."""
    distribution: Literal["normal", "uniform", "uniform_released"] = "normal"
    """normal N(0, sigma^2), uniform U(-sigma, sigma), or the U(0, sigma) that the released code draws."""
    scale: Literal["absolute", "relative"] = "absolute"
    """relative multiplies sigma by the root mean square of the token it is added to."""
    layers: str | int | list[int | str] = "all"
    """0-based layers: all, 0-5, first:4, last:4, or a list."""
    site: Literal["input", "within", "both"] = "input"
    """input of a layer (the paper), within it between attention and feed-forward (its ablation), or both."""
    dropout: Literal["off", "keep"] = "off"
    """off sets hidden dropout to 0 as in the paper and leaves attention dropout; keep leaves both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise UserError(
                f"hype: sigma must be a finite number >= 0, for example 1e-5; it is {self.sigma}."
            )

    def attach(self, host: Host) -> None:
        from dist_reg.backbone import select_layers

        if self.dropout == "off":
            host.disable_hidden_dropout()
        layers = select_layers(self.layers, len(host.backbone.layers))
        if self.sigma == 0:
            return
        for layer in layers:
            if self.site in ("input", "both"):
                host.add_noise(layer, self._noise(SITE_INPUT, layer))
            if self.site in ("within", "both"):
                host.transform_between(layer, self._noise(SITE_WITHIN, layer))

    def _noise(self, point: int, layer: int) -> LayerNoise:
        from dist_reg.layer_noise import LayerNoise
        from dist_reg.noise import site_id

        return LayerNoise(
            site=site_id(SITE_METHOD, point, layer),
            sigma=self.sigma,
            distribution=self.distribution,
            scale=self.scale,
            survival="hype/noise_survival",
        )

    def warning(self, metrics: dict[str, float]) -> str | None:
        from dist_reg.noise import survival_warning

        fixes = "scale: relative, autocast with an fp32 residual stream, or a larger sigma"
        return survival_warning(self.name, self.sigma, metrics, fixes)
