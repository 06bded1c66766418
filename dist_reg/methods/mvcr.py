"""MVCR: random autoencoders between layers, plugged out after training (arXiv 2211.08794, ACL 2023).

    h' = h, or HAE_m(h) for one of M hierarchical autoencoders drawn for every token        section 3
    L  = task loss + weight * sum_l (1/M) sum_m MSE(h^l, HAE_m(h^l))

The reconstruction trains the autoencoders alone. Evaluation and the saved model know nothing of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from dist_reg.errors import UserError
from dist_reg.methods.base import Host, Method

SITE_METHOD = 4
SITE_VIEW, SITE_NOISE, SITE_DROPOUT = 0, 1, 2
MOST = 64
"""Autoencoders an insertion point may have: each takes two of the 256 site numbers of a layer."""


@dataclass(frozen=True, kw_only=True)
class MVCR(Method):
    """Options of MVCR. Raises UserError for a value out of range and for options that contradict each other."""

    name: ClassVar[str] = "mvcr"
    summary: ClassVar[str] = "random autoencoders between layers, plugged out after training"
    source: ClassVar[str] = "Wu et al., ACL 2023, arXiv 2211.08794"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    layers: str | int | list[int | str] | None = None
    """0-based layers behind which the autoencoders stand: all, 0-5, last:4, or a list; none: the second and the last."""
    site: Literal["output", "ffn"] = "output"
    """output of the layer (the paper), or within its feed-forward branch before the residual (the released code)."""
    autoencoders: int = 3
    """M, how many an insertion point has."""
    widths: list[int] | None = None
    """Width of each; none: from a sixth to two thirds of the hidden size, each as many times the one before."""
    inner: int = 2
    """K, inner autoencoders of half the width in each; a token takes one of them or none, each with 1 / (K + 1)."""
    probabilities: list[float] | None = None
    """Of each autoencoder and, last, of none; none: 1 / (2M - 1) each, (M - 1) / (2M - 1) for none."""
    per: Literal["token", "position", "sequence", "batch"] = "token"
    """Who shares a draw: token (the paper), position over the batch (the released code), sequence, or batch."""
    reconstruct: Literal["all", "sampled"] = "all"
    """all: every autoencoder reconstructs every token (the paper); sampled: a token's own alone, weighed to the same mean."""
    weight: float = 1.0
    """Of the reconstruction."""
    dropout: float = 0.2
    """Behind both encoders."""
    input_noise: float = 0.0
    """Standard deviation of normal noise on what enters, whatever the view; the released code adds 0.002."""
    learning_rate_multiple: float = 50.0
    """Of the autoencoders' learning rate over the run's."""
    warmup_epochs: int = 4
    """Epochs before the run's own in which the autoencoders alone learn, from reconstruction; the paper's code has 4, 19 for
    tagging."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.autoencoders <= MOST:
            raise UserError(f"mvcr: autoencoders must be from 1 to {MOST}; it is {self.autoencoders}.")
        for name, low, high in (
            ("inner", 0, math.inf),
            ("weight", 0, math.inf),
            ("input_noise", 0, math.inf),
            ("learning_rate_multiple", 0, math.inf),
            ("warmup_epochs", 0, math.inf),
            ("dropout", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value < high:
                limit = f"and below {high}" if math.isfinite(high) else "and finite"
                raise UserError(f"mvcr: {name} must be at least {low} {limit}; it is {value}.")
        if self.widths is not None:
            if len(self.widths) != self.autoencoders:
                raise UserError(
                    f"mvcr: widths has {len(self.widths)} numbers for autoencoders: {self.autoencoders}; give one each."
                )
            bad = [width for width in self.widths if type(width) is not int or width < 1]
            if bad:
                raise UserError(f"mvcr: widths must be whole numbers of at least 1; one is {bad[0]!r}.")
        if self.probabilities is not None:
            self._check_probabilities(self.probabilities)
        for name in ("weight", "learning_rate_multiple"):
            if self.warmup_epochs and not getattr(self, name):
                raise UserError(f"mvcr: with {name}: 0 nothing trains in the warm-up; set warmup_epochs: 0.")

    def _check_probabilities(self, probabilities: list[float]) -> None:
        number = self.autoencoders + 1
        if len(probabilities) != number:
            raise UserError(
                f"mvcr: probabilities has {len(probabilities)} numbers where autoencoders: {self.autoencoders} needs "
                f"{number}, the last for none of them."
            )
        bad = [p for p in probabilities if not (isinstance(p, (int, float)) and 0 <= p <= 1)]
        if bad:
            raise UserError(f"mvcr: probabilities must be numbers from 0 to 1; one is {bad[0]!r}.")
        total = math.fsum(probabilities)
        if abs(total - 1) > 1e-6:
            raise UserError(f"mvcr: probabilities must sum to 1; they sum to {total:.6g}.")

    def view_probabilities(self) -> tuple[float, ...]:
        """[M + 1], the last of taking none."""
        if self.probabilities is not None:
            return tuple(self.probabilities)
        number = 2 * self.autoencoders - 1
        return (*[1 / number] * self.autoencoders, (self.autoencoders - 1) / number)

    def view_widths(self, hidden_size: int) -> list[int]:
        """[M]. Raises UserError where one is wider than the hidden states."""
        if self.widths is None:
            steps = [i / max(1, self.autoencoders - 1) for i in range(self.autoencoders)]
            exponents = [0.5] if self.autoencoders == 1 else steps
            return [max(1, round(hidden_size / 6 * 4**exponent)) for exponent in exponents]
        if max(self.widths) > hidden_size:
            raise UserError(
                f"mvcr: widths has {max(self.widths)}, more than the hidden size {hidden_size}: nothing would be compressed."
            )
        return self.widths

    def chosen_layers(self, count: int) -> tuple[int, ...]:
        """The layers, 0-based, behind which the autoencoders stand in a model of `count`."""
        from dist_reg.backbone import select_layers

        if self.layers is None:
            return tuple(sorted({min(1, count - 1), count - 1}))
        return select_layers(self.layers, count)

    def attach(self, host: Host) -> None:
        from dist_reg.autoencoders import Insertion, RandomAutoencoders, ViewDraw
        from dist_reg.noise import site_id

        widths = self.view_widths(host.backbone.hidden_size)
        for layer in self.chosen_layers(len(host.backbone.layers)):
            name = f"mvcr_{layer}"
            draw = ViewDraw(
                self.view_probabilities(), self.inner, self.per, site_id(SITE_METHOD, SITE_VIEW, layer)
            )
            module = RandomAutoencoders(
                name,
                host.backbone.hidden_size,
                widths,
                self.inner,
                seed=host.seed,
                site=site_id(SITE_METHOD, SITE_DROPOUT, layer),
                dropout=self.dropout,
                reconstruct=self.reconstruct if self.weight else "none",
            )
            host.add_module(name, module, learning_rate_multiple=self.learning_rate_multiple)
            transform = Insertion(self, layer, draw, module, site_id(SITE_METHOD, SITE_NOISE, layer))
            if self.site == "output":
                host.transform_output(layer, transform)
            else:
                host.transform_feed_forward(layer, transform)

    def warning(self, metrics: dict[str, float]) -> str | None:
        from dist_reg.noise import survival_warning

        return survival_warning(
            self.name,
            self.input_noise,
            metrics,
            "autocast with an fp32 residual stream, or a larger input_noise",
        )

    def epochs_alone(self) -> int:
        return self.warmup_epochs

    def ideal_cost(self, layers: int, hidden_size: int) -> float:
        """By multiplications a token: a layer has 12 D^2, an autoencoder 2 d D and its inner ones d^2 K / (K + 1)."""
        per_view = [
            2 * width * hidden_size + width**2 * self.inner / (self.inner + 1)
            for width in self.view_widths(hidden_size)
        ]
        drawn = sum(p * work for p, work in zip(self.view_probabilities(), per_view))
        work = sum(per_view) if self.reconstruct == "all" and self.weight else drawn
        return 1 + len(self.chosen_layers(layers)) * work / (layers * 12 * hidden_size**2)
