"""What a method is, and what it may ask of the model it is attached to.

A method is a frozen keyword-only dataclass (its options) whose `attach` asks the host for the places it
acts on. It never registers a hook itself: `dist_reg.attach` is the one place that touches a model.

Torch is imported where it is used, not here: `dist-reg methods` lists every option without waiting for it.

Shapes: B examples of the micro-batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

from dist_reg.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from dist_reg.backbone import Backbone


@dataclass
class Step:
    """One training forward: what its noise is a function of, and what its methods measured."""

    seed: int
    """Run seed, 64 bits."""
    example_keys: Tensor
    """int64 [B]; see `dist_reg.noise.example_keys`."""
    tokens: int
    """T of the inputs."""
    spans: Tensor | None
    """int32 [B, 2], first real token and one past the last one; None when every token is real."""
    measure: bool
    """Whether diagnostics that cost something are taken in this forward."""
    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """Scalars by (metric, site). Keyed, not appended: activation checkpointing runs a layer twice."""


Transform = Callable[["Tensor", Step], "Tensor"]
"""Maps hidden states [B, T, D] to hidden states [B, T, D]."""


class Host(Protocol):
    """What a method may ask for while it is being attached."""

    backbone: Backbone

    def transform_input(self, layer: int, transform: Transform) -> None:
        """Run `transform` on the hidden states entering `layer` (0-based), in training only."""

    def transform_between(self, layer: int, transform: Transform) -> None:
        """Run `transform` on the hidden states between attention and feed-forward of `layer`."""

    def disable_hidden_dropout(self) -> None:
        """Set every dropout on hidden states to 0 while attached; attention dropout is left alone."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method's options. Subclasses are frozen keyword-only dataclasses.

    Raises UserError where an option that is a Literal has none of its values.
    """

    name: ClassVar[str]
    """The name in a run file, and the prefix of the method's metrics."""
    summary: ClassVar[str]
    """One line for `dist-reg methods`."""
    source: ClassVar[str]
    """The paper."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                value = str(getattr(self, name))
                raise UserError(f"{self.name}: {name} cannot be {value!r}; {nearest(value, get_args(kind))}")

    def attach(self, host: Host) -> None:
        """Ask `host` for every place this method acts on. Raises UserError when there is none."""
        raise NotImplementedError

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        """Scalars to add to the task loss, by name; empty for a method without a loss of its own."""
        return {}

    def warning(self, metrics: dict[str, float]) -> str | None:
        """A sentence when `metrics` show that this method does not do what its user expects."""
        return None
