"""LNSR: layerwise noise stability regularisation (Hua et al., NAACL 2021, arXiv 2107.04835; TNNLS, arXiv 2206.05658).

    h~^b = h^b + eps,   h~^r = g_r(h~^{r-1})
    R = weight * sum_{r=b+1..L} lambda_r * mean over an example's real tokens of || h~^r - h^r ||_2^2

b is the layer that reads the noise, h^0 the embedding output; h^r is the output of layer r, which layer r+1 reads. Both
streams run through one forward (`dist_reg.streams`), so only the layers from b on run twice. The papers' code is not
public: options marked "our reading" have no source but their abstracts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dist_reg.errors import UserError
from dist_reg.methods.base import Host, Method, Step, Transform

if TYPE_CHECKING:
    from torch import Tensor

SITE_METHOD = 2
SITE_NOISE, SITE_NEIGHBOUR = 0, 1
NEIGHBOUR = "lnsr/neighbour"


@dataclass(frozen=True, kw_only=True)
class LNSR(Method):
    """Options of LNSR. Raises UserError for an unknown choice or a number out of range."""

    name: ClassVar[str] = "lnsr"
    summary: ClassVar[str] = "penalise how far noise at one layer moves every layer above"
    source: ClassVar[str] = "Hua et al., NAACL 2021, arXiv 2107.04835; TNNLS 2023, arXiv 2206.05658"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    weight: float = 0.1
    """What the whole term is multiplied by; at 1.0 MiniLM on SST-2 learnt nothing. Our reading."""
    layer: int = 0
    """b, the layer (0-based) whose input takes the noise; 0 is the embedding output."""
    noise: Literal["gaussian", "secant", "neighbour", "tangent"] = "gaussian"
    """gaussian; or in-manifold, our reading: secant, towards the next example of the batch; neighbour, towards one of
    the nearest vocabulary embeddings (layer 0 only); tangent, in the main directions of the example's tokens."""
    scale: Literal["relative", "absolute"] = "relative"
    """relative: a token's noise has the norm sigma times the token's; absolute: N(0, sigma^2), gaussian only."""
    sigma: float = 0.05
    """Size of the noise; the paper's diagnostic uses 5 % of the token's norm."""
    neighbours: int = 8
    """Nearest vocabulary embeddings that noise: neighbour chooses from."""
    directions: int = 8
    """Principal directions that noise: tangent keeps."""
    layers: str | int | list[int | str] = "all"
    """0-based layers whose outputs are compared, none below `layer`; all: those from `layer` on."""
    layer_weights: Literal["constant", "linear"] | list[float] = "constant"
    """lambda of each compared layer, in order: constant 1, linear from 1/n to 1, or a list. Our reading."""
    detach_clean: bool = False
    """Keep the term's gradient from the clean stream."""
    same_dropout: bool = True
    """Both streams see the same dropout, so that the term measures the noise and not dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("weight", 0), ("sigma", 0), ("layer", 0), ("neighbours", 1), ("directions", 1)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= low):
                raise UserError(f"lnsr: {name} must be a finite number >= {low}; it is {value}.")
        if self.noise != "gaussian" and self.scale != "relative":
            raise UserError(
                f"lnsr: scale: absolute goes with noise: gaussian; {self.noise} needs scale: relative."
            )
        if self.noise == "neighbour" and self.layer != 0:
            raise UserError(
                f"lnsr: noise: neighbour moves word embeddings, so layer must be 0; it is {self.layer}."
            )
        if isinstance(self.layer_weights, list):
            bad = [
                value
                for value in self.layer_weights
                if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0)
            ]
            if bad:
                raise UserError(f"lnsr: layer_weights must be finite numbers >= 0; one is {bad[0]}.")
        elif self.layer_weights not in ("constant", "linear"):
            raise UserError(
                f"lnsr: layer_weights must be constant, linear or a list; it is {self.layer_weights!r}."
            )

    def attach(self, host: Host) -> None:
        count = len(host.backbone.layers)
        if self.layer >= count:
            raise UserError(
                f"lnsr: layer is {self.layer}, but the model's layers are numbered 0 to {count - 1}."
            )
        weights = self.state_weights(count)
        if self.sigma == 0 or self.weight == 0:
            return
        host.fork(self.layer, self._fork(host), same_dropout=self.same_dropout)
        for state, weight in weights.items():
            if weight > 0:
                host.compare(state, self.weight * weight, detach_clean=self.detach_clean)

    def ideal_cost(self, layers: int, hidden_size: int) -> float:
        return (2 * layers - self.layer) / layers if self.weight > 0 and self.sigma > 0 else 1.0

    def state_weights(self, count: int) -> dict[int, float]:
        """lambda_r by state r (the output of layer r - 1, 0-based) in a model of `count` layers."""
        from dist_reg.backbone import select_layers

        chosen = range(self.layer, count) if self.layers == "all" else select_layers(self.layers, count)
        if chosen[0] < self.layer:
            raise UserError(
                f"lnsr: layers has {chosen[0]}, below layer: {self.layer}, where the noise enters; nothing moves there."
            )
        number = len(chosen)
        if isinstance(self.layer_weights, list):
            weights = self.layer_weights
            if len(weights) != number:
                raise UserError(
                    f"lnsr: layer_weights has {len(weights)} numbers for {number} compared layers "
                    f"({chosen[0]} to {chosen[-1]}); give one each."
                )
        else:
            weights = [1.0 if self.layer_weights == "constant" else (i + 1) / number for i in range(number)]
        if not any(weights):
            raise UserError(
                "lnsr: layer_weights are all 0, so nothing is compared; give one a weight above 0."
            )
        return {layer + 1: weight for layer, weight in zip(chosen, weights)}

    def _fork(self, host: Host) -> Transform:
        from dist_reg import directions
        from dist_reg.noise import noise_survival, site_id
        from dist_reg.ops import fork

        site = site_id(SITE_METHOD, SITE_NOISE, self.layer)
        if self.noise == "neighbour":
            host.watch_embeddings(self._look_up)

        def direction(hidden_states: Tensor, step: Step) -> Tensor:
            match self.noise:
                case "secant":
                    return directions.secant(hidden_states, step.spans)
                case "neighbour":
                    return _of_one_size(step.held[NEIGHBOUR], hidden_states)
                case "tangent":
                    noise = directions.gaussian(hidden_states, step, site)
                    return directions.tangent(noise, hidden_states, step.spans, self.directions)
                case _:
                    return directions.gaussian(hidden_states, step, site)

        def make_twin(hidden_states: Tensor, step: Step) -> Tensor:
            if self.scale == "absolute":
                twin = fork(
                    hidden_states,
                    sigma=self.sigma,
                    seed=step.seed,
                    example_keys=step.example_keys,
                    site=site,
                    spans=step.spans,
                )
            else:
                noise = directions.rescaled(
                    direction(hidden_states.detach(), step), hidden_states, self.sigma
                )
                twin = directions.twin(hidden_states, noise)
            if step.measure:
                step.values["lnsr/noise_survival", site] = noise_survival(
                    hidden_states, twin[step.batch :], step.spans
                )
            return twin

        return make_twin

    def warning(self, metrics: dict[str, float]) -> str | None:
        from dist_reg.noise import survival_warning

        return survival_warning(
            self.name, self.sigma, metrics, "a larger sigma, or scale: relative where it is absolute"
        )

    def _look_up(self, embedded: Tensor, ids: Tensor, table: Tensor, step: Step) -> Tensor:
        from dist_reg import directions
        from dist_reg.noise import site_id

        site = site_id(SITE_METHOD, SITE_NEIGHBOUR, self.layer)
        step.held[NEIGHBOUR] = directions.neighbour(ids, table.detach(), self.neighbours, step, site)
        return embedded


def _of_one_size(direction: Tensor, hidden_states: Tensor) -> Tensor:
    if direction.shape != hidden_states.shape:
        raise UserError(
            f"lnsr: noise: neighbour needs word embeddings as wide as the hidden states; they are {direction.shape[2]} "
            f"and {hidden_states.shape[2]} in this model."
        )
    return direction
