"""What a method is, and what it may ask of the model it is attached to.

A method is a frozen keyword-only dataclass (its options) whose `attach` asks the host for the places it
acts on. It never registers a hook itself: `dist_reg.attach` does.

Torch is imported where it is used, not here: `dist-reg methods` lists every option without waiting for it.

Shapes: B examples of the micro-batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

from dist_reg.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dist_reg.backbone import Backbone
    from dist_reg.layer_noise import LayerNoise
    from dist_reg.readout import Fuse


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
    weights: Tensor
    """fp32 [B], what an example counts for in the loss: 1 / B, or its share of what `num_items_in_batch` counts."""
    labels: Tensor | None = None
    """The labels the model was given."""
    next_token: bool = False
    """Whether position t of the logits predicts label t + 1."""
    regression: bool = False
    """Whether the labels are numbers to come close to, and the model's loss a mean of squares."""
    several_labels: bool = False
    """Whether an example may have several labels at once."""
    number: int = 0
    """Of the optimizer step that this forward is a part of, or of the forward where nobody says."""
    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """Diagnostics, scalars by (metric, site). Keyed, not appended: activation checkpointing runs a layer twice."""
    terms: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """What is added to the loss, [B] by (name, layer), each example's own; the host weighs and sums them."""
    logits: Tensor | None = None
    """[2B, ...] once a forward with doubled inputs is through, clean half first."""
    span_logits: tuple[Tensor, Tensor] | None = None
    """[2B, T] each, of the first and the last token of an answer, where that is what the model predicts."""
    sequence_lengths: Tensor | None = None
    """int64 [B, T], tokens of the example that a token belongs to, where rows hold several; else None."""
    task_weight: Tensor | None = None
    """What the task's loss counts for, where a mean over labels must not depend on how they are cut into micro-batches."""
    task_loss: Tensor | None = None
    """Replaces the model's own loss where a method sets it."""
    twin: Step | None = None
    """The same forward as seen by a layer that runs both streams: every key and span twice."""
    doubled: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Arguments of layers and their doubled form, by identity."""
    held: dict[str, Tensor] = field(default_factory=dict)
    """What a method keeps from one place of the forward for another."""
    fused: dict[int, tuple[Tensor, int] | None] = field(default_factory=dict)
    """By layer whose noise the norm before it added: what that norm wrote and its version, until it arrives."""
    under_way: bool = True
    """False once the forward is through: what a recomputation adds after that is not kept."""

    @property
    def batch(self) -> int:
        """B."""
        return self.example_keys.shape[0]

    def of(self, hidden_states: Tensor) -> Step:
        """This step for hidden states [B, T, D], its twin for both streams [2B, T, D]."""
        return self.twin if self.twin is not None and hidden_states.shape[0] == 2 * self.batch else self

    def add_term(self, name: str, layer: int, per_example: Tensor) -> None:
        """Add [B] numbers, one an example, to the loss as part of the term `name`; of [2B], the means of both streams."""
        if not self.under_way:
            return
        examples = self.weights.shape[0]
        self.terms[name, layer] = (
            per_example if per_example.shape[0] == examples else per_example.view(2, examples).mean(0)
        )

    def finish(self) -> None:
        """Let go of everything that belongs to the forward alone."""
        self.under_way = self.measure = False
        for held in (self.values, self.terms, self.doubled):
            held.clear()
        self.labels = self.logits = self.span_logits = self.task_loss = None
        if self.twin is not None:
            self.twin.under_way = self.twin.measure = False
            self.twin.labels = None


Transform = Callable[["Tensor", Step], "Tensor"]
"""Maps hidden states [B, T, D] to hidden states [B, T, D]."""


class Host(Protocol):
    """What a method may ask for while it is being attached."""

    backbone: Backbone
    seed: int
    """Of the run."""

    def add_module(self, name: str, module: nn.Module, *, learning_rate_multiple: float) -> Callable[[], Any]:
        """Make `module` a part of the model while attached, trained at so many times the run's learning rate.

        It is then sharded, clipped and checkpointed with the model. An exported model has it where the method is `kept`.
        Returns what finds it in the model, or the copy that a copied model has of it.
        """

    def replace_readout(self, fuse: Fuse, *, embeddings: bool) -> None:
        """Let the head read `fuse(hidden states, real tokens, step)` in place of the last hidden states, in training and in eval.

        The hidden states are those of every layer, and of the embeddings where asked for, the last ones at the end; they are
        given without other methods' noise. Raises UserError for a model without a head that reads them.
        """

    def transform_output(self, layer: int, transform: Transform) -> None:
        """Run `transform` on the hidden states that `layer` (0-based) returns, in training only."""

    def transform_feed_forward(self, layer: int, transform: Transform) -> None:
        """Run `transform` on what the feed-forward of `layer` adds to the stream, before the residual and any norm.

        Raises UserError for a layer without a recognised feed-forward.
        """

    def transform_input(self, layer: int, transform: Transform) -> None:
        """Run `transform` on the hidden states entering `layer` (0-based), in training only."""

    def add_noise(self, layer: int, noise: LayerNoise) -> None:
        """Add `noise` to the hidden states entering `layer`, in training only; by the norm beside it where that
        pays, and then the output of the layer before has it already (see `reads_outputs`)."""

    def reads_outputs(self) -> None:
        """Say that this method reads what layers return: no noise is then in it before the next layer begins."""

    def transform_between(self, layer: int, transform: Transform) -> None:
        """Run `transform` on the hidden states between attention and feed-forward of `layer`."""

    def fork(self, layer: int, make_twin: Transform, *, same_dropout: bool) -> None:
        """Run two streams from the entry of `layer` on: `make_twin` maps its hidden states [B, T, D] to [2B, T, D].

        The clean half comes first and alone leaves the last layer. `same_dropout` gives both halves the masks that
        the clean one would have alone. Raises UserError when another method runs a second stream already.
        """

    def compare(self, state: int, weight: float, *, detach_clean: bool) -> None:
        """Add to the loss, under the method's name, `weight` times the squared distance of the streams at h^state.

        Every example counts with the mean over its real tokens. `state` lies above the forked layer and is at most L.
        """

    def double_inputs(self, *, second_labels: bool) -> None:
        """Run the whole model on every example twice; `Step.logits` then holds both halves.

        The model's own loss is that of both halves together, or of the first where not `second_labels`.
        """

    def watch_embeddings(self, watch: Callable[[Tensor, Tensor, Tensor, Step], Tensor]) -> None:
        """Run `watch` on (word embeddings, ids, their table, step) before positions are added, in training only.

        Returns the embeddings to go on with. A model that is then given inputs_embeds raises UserError.
        """

    def reparametrise(self, linear: nn.Linear, function: Callable[[Tensor], Tensor]) -> None:
        """Let `linear` compute with function(weight), in training and in eval; `Handle.bake` makes it its weight."""

    def disable_hidden_dropout(self) -> None:
        """Set every dropout on hidden states to 0 while attached; attention dropout is left alone."""


KINDS: dict[type, tuple[type, ...]] = {float: (int, float), int: (int,), bool: (bool,)}
WORDS: dict[type, str] = {float: "a number", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method's options. Subclasses are frozen keyword-only dataclasses.

    Raises UserError where an option that is a Literal has none of its values, or a number is none.
    """

    name: ClassVar[str]
    """The name in a run file, and the prefix of the method's metrics."""
    summary: ClassVar[str]
    """One line for `dist-reg methods`."""
    source: ClassVar[str]
    """The paper."""
    kept: ClassVar[bool] = False
    """Whether it is a part of the model at inference too: it acts in eval, and is exported with the weights."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in (option.name for option in fields(self)):
            kind, value = hints[name], getattr(self, name)
            if kind in WORDS and (
                not isinstance(value, KINDS[kind]) or isinstance(value, bool) != (kind is bool)
            ):
                raise UserError(f"{self.name}: {name} must be {WORDS[kind]}; it is {value!r}.")
            if get_origin(kind) is Literal and value not in get_args(kind):
                text = str(value)
                raise UserError(f"{self.name}: {name} cannot be {text!r}; {nearest(text, get_args(kind))}")

    def attach(self, host: Host) -> None:
        """Ask `host` for every place this method acts on. Raises UserError when there is none."""
        raise NotImplementedError

    def epochs_alone(self) -> int:
        """Epochs before the run's own in which the modules that this method adds learn alone."""
        return 0

    def ideal_cost(self, layers: int, hidden_size: int) -> float:
        """What a step must cost at least, as a multiple of the plain step, in a model of `layers` layers."""
        return 1.0

    def finish(self, step: Step) -> None:
        """Add what is known only when the model's forward is through, `step.add_term`."""

    def warning(self, metrics: dict[str, float]) -> str | None:
        """A sentence when `metrics` show that this method does not do what its user expects."""
        return None
