"""HIRE: what all layers know, fused into what the head reads (arXiv 1911.01940).

    a_l = ReLU(w^T u_l + b),  A = sum_l a_l h^l                                 section 3.1, complementary representation
    M   = ReLU(W_m [R ; A ; R + A ; R o A] + b_m), read by a GRU                section 3.2, R = h^L

The head reads M in place of h^L. The method's weights stay in the model: they are exported, and `dist_reg.load` puts them
back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dist_reg.errors import UserError
from dist_reg.methods.base import Host, Method, Step

if TYPE_CHECKING:
    from torch import Tensor

    from dist_reg.extractor import HiddenExtractor


@dataclass(frozen=True, kw_only=True)
class HIRE(Method):
    """Options of HIRE. Raises UserError for a value out of range and for options that contradict each other."""

    name: ClassVar[str] = "hire"
    summary: ClassVar[str] = "fuse what all layers know into what the head reads; stays in the model"
    source: ClassVar[str] = "Chen et al., 2019, arXiv 1911.01940"
    kept: ClassVar[bool] = True
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    extractor: Literal["gru", "attention"] = "gru"
    """What sums up a layer: a bidirectional GRU over its tokens (the paper), or attention by one query, which is cheap."""
    gru_hidden: int | None = None
    """Units a direction of both GRUs; none: half the hidden size, so that summaries and what the head reads keep its width."""
    include_embeddings: bool = False
    """Whether the embeddings, h^0, are mixed in as one more layer."""
    combine: Literal["sum", "difference"] = "sum"
    """The third part of what is fused: R + A or R - A."""
    normalisation: Literal["none", "softmax"] = "none"
    """none: a ReLU opens every gate by itself (the paper); softmax: the gates of an example sum to 1."""
    fusion_rnn: bool = True
    """Whether a bidirectional GRU reads the fused representation before the head does (the paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        units = self.gru_hidden
        if units is not None and (type(units) is not int or units < 1):
            raise UserError(f"hire: gru_hidden must be a whole number of at least 1; it is {units!r}.")
        if units is not None and self.extractor == "attention" and not self.fusion_rnn:
            raise UserError(
                "hire: gru_hidden has no effect without a GRU; leave it out, or set fusion_rnn: true."
            )

    def units(self, hidden_size: int) -> int:
        """H, of a model of `hidden_size`. Raises UserError where what the head reads would have another width."""
        units = self.gru_hidden or max(1, hidden_size // 2)
        if self.fusion_rnn and 2 * units != hidden_size:
            hint = f"gru_hidden: {hidden_size // 2}, or " if hidden_size % 2 == 0 else ""
            raise UserError(
                f"hire: the GRU behind the fusion returns 2 x {units} channels where the head reads {hidden_size}; set "
                f"{hint}fusion_rnn: false."
            )
        return units

    def attach(self, host: Host) -> None:
        from dist_reg.extractor import HiddenExtractor

        size, layers = host.backbone.hidden_size, len(host.backbone.layers)
        module = HiddenExtractor(
            size,
            layers + self.include_embeddings,
            extractor=self.extractor,
            gru_hidden=self.units(size),
            combine=self.combine,
            normalisation=self.normalisation,
            fusion_rnn=self.fusion_rnn,
            seed=host.seed,
        )
        own = host.add_module(self.name, module, learning_rate_multiple=1.0)
        fuse = Fusing(own, first=0 if self.include_embeddings else 1)
        host.replace_readout(fuse, embeddings=self.include_embeddings)

    def ideal_cost(self, layers: int, hidden_size: int) -> float:
        """By multiplications a token: a layer has 12 D^2, the fusion 3 D^2, a GRU of two layers 6 (D + H) H and 18 H^2."""
        units = self.units(hidden_size)
        gru = 6 * units * (hidden_size + units) + 18 * units**2
        read = gru * (layers + self.include_embeddings) if self.extractor == "gru" else 0
        work = read + 3 * hidden_size**2 + (gru if self.fusion_rnn else 0)
        return 1 + work / (layers * 12 * hidden_size**2)


@dataclass(eq=False)
class Fusing:
    """What HIRE does before the head."""

    module: Callable[[], HiddenExtractor]
    """Where it is in the model: a copy of the model, or PEFT, may have put another in its place."""
    first: int
    """The number of the first hidden states it is given."""

    def __call__(self, states: Sequence[Tensor], real: Tensor | None, step: Step | None) -> Any:
        fused, gates = self.module()(states, real)
        if step is not None and step.measure:
            for number, gate in enumerate(gates.detach().mean(1), start=self.first):
                step.values[f"{HIRE.name}/gate_{number}", number] = gate
        return fused
