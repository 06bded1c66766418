"""Two streams of one batch through one forward: [2B, T, D], the clean half first, the other behind it.

A method forks the stream at a layer (LNSR) or doubles the model's inputs (R-Drop, R3F). Whatever else a layer is
called with must then hold every example twice as well; these functions double it, share dropout between the halves, and
take the clean half out again. One forward gathers each layer of ZeRO-3 once.

A batch-sized argument is told by its name and its first dimension; what cannot be doubled safely is refused.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dist_reg.errors import UserError
from dist_reg.layer_noise import LayerNoise
from dist_reg.methods.base import Step, Transform
from dist_reg.noise import mix64
from dist_reg.ops import stability

logger = logging.getLogger(__name__)


@dataclass
class TwinStream:
    """A second stream that a method asked for."""

    owner: str
    """The method's name."""
    layer: int | None = None
    """The layer at whose entry the stream forks; None: at the model's inputs."""
    make_twin: Transform | None = None
    """Maps the hidden states [B, T, D] that enter `layer` to both streams."""
    same_dropout: bool = False
    """Whether both halves see the clean one's dropout."""
    counts_second: bool = True
    """With doubled inputs: whether the model's loss counts the second half, as a pass of its own."""
    compared: dict[int, tuple[float, bool]] = field(default_factory=dict)
    """(weight, whether the clean half takes no gradient) of every h^state whose halves are compared, by state."""

    def keys_of_both(self, example_keys: Tensor) -> Tensor:
        """int64 [2B]: the halves of R-Drop are two draws, so other methods' noise differs as well; else it is the same."""
        apart = self.layer is None and self.counts_second
        return torch.cat((example_keys, mix64(example_keys) if apart else example_keys))

    def compare(self, state: int, twin: Tensor, step: Step, noise: LayerNoise | None) -> Tensor:
        """Add the distance of the halves of `twin` [2B, T, D] to the loss; returns it to go on with, `noise` added."""
        weight, detach_clean = self.compared[state]
        if noise is None:
            twin, distance = stability(twin, spans=step.spans, detach_clean=detach_clean)
        else:
            twin, distance = noise.after_comparison(twin, step, detach_clean)
        step.add_term(self.owner, state - 1, weight * mean_over_real_tokens(distance, step.spans))
        return twin


def mean_over_real_tokens(distance: Tensor, spans: Tensor | None) -> Tensor:
    """[B] from `distance` [B, T], which is 0 outside `spans` int32 [B, 2]; every example's own mean."""
    if spans is None:
        return distance.mean(1)
    return distance.sum(1) / (spans[:, 1] - spans[:, 0]).clamp(min=1)


BATCHED = frozenset(
    {
        "attention_mask", "encoder_attention_mask", "encoder_decoder_position_bias", "encoder_hidden_states",
        "end_positions", "input_ids", "inputs_embeds", "labels", "position_bias", "position_embeddings", "position_ids",
        "query_states", "start_positions", "token_type_ids",
    }
)  # fmt: skip
"""Arguments whose first dimension is the batch, or the batch times the heads, or 1 for all."""

SHARED = frozenset({"cache_position", "head_mask", "layer_head_mask", "rel_embeddings", "relative_pos"})
"""Arguments that belong to no example, whatever their first dimension happens to be."""

ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
"""What configurations call the rate of dropout on attention probabilities."""

IGNORED = -100
"""The label that Transformers' losses leave out."""

SPAN = ("start_positions", "end_positions")
"""What models for question answering call their labels [B]; those past the last token count in no loss."""

_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))


def double_arguments(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int,
    tokens: int,
    known: dict[int, tuple[Tensor, Tensor]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `module`'s forward with everything that belongs to B examples there twice.

    Hidden states that hold both halves already stay as they are. `known` remembers what was doubled by identity, so
    that layers share one doubled mask. Raises UserError, naming the argument, for one that cannot be doubled safely.
    """
    names = _positional_names(type(module).forward)
    doubler = functools.partial(_double, batch=batch, tokens=tokens, known=known, where=type(module).__name__)
    doubled = [doubler(name, value) for name, value in zip(names + ("",) * len(args), args)]
    return tuple(doubled), {name: doubler(name, value) for name, value in kwargs.items()}


def _positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a method's positional parameters after self, from the function that decorators went around."""
    code = inspect.unwrap(forward).__code__
    return code.co_varnames[1 : code.co_argcount]


def _double(
    name: str, value: Any, *, batch: int, tokens: int, known: dict[int, tuple[Tensor, Tensor]], where: str
) -> Any:
    again = functools.partial(_double, name, batch=batch, tokens=tokens, known=known, where=where)
    if isinstance(value, Tensor):
        if not _holds_the_batch(name, value, batch, tokens, where):
            return value
        if id(value) not in known:
            known[id(value)] = value, torch.cat((value, value))
        return known[id(value)][1]
    if type(value) in (tuple, list):
        return type(value)(again(item) for item in value)
    if type(value) is dict:
        return {key: again(item) for key, item in value.items()}
    if isinstance(value, _PLAIN) or callable(value):
        return value
    if hasattr(value, "get_seq_length"):
        if value.get_seq_length() == 0:
            return value
        raise UserError(
            f"{where} was called with {name} that hold earlier tokens; a second stream needs a forward without a cache."
        )
    raise UserError(
        f"{where} was called with {name}, a {type(value).__name__}, which cannot be doubled for a second stream; "
        "use attn_implementation sdpa or eager."
    )


def _holds_the_batch(name: str, value: Tensor, batch: int, tokens: int, where: str) -> bool:
    if name.startswith("cu_seq"):
        raise UserError(
            f"{where} was called with {name}: sequences packed into one row cannot be doubled for a second stream; "
            "give one sequence a row."
        )
    if value.dim() == 0 or name in SHARED or value.shape[0] == 2 * batch:
        return False
    if name in BATCHED:
        return value.shape[0] == batch or (value.shape[0] > 1 and value.shape[0] % batch == 0 and batch > 1)
    if value.shape[0] == batch == tokens > 1:
        raise UserError(
            f"{where} was called with {name or 'an argument'} {list(value.shape)}, whose first dimension may be the "
            f"{batch} examples or the {tokens} tokens, so it cannot be doubled safely; use another batch size."
        )
    return value.shape[0] == batch


def second_labels(labels: Tensor, wanted: bool) -> Tensor:
    """`labels` [B, ...] for both halves; where the second half's are not wanted, a class that no loss counts.

    Numbers have no such class; the method then takes the loss of the first half itself.
    """
    if wanted or labels.is_floating_point():
        return torch.cat((labels, labels))
    return torch.cat((labels, torch.full_like(labels, IGNORED)))


def label_kind(config: Any, labels: Tensor | None) -> tuple[bool, bool]:
    """Whether `labels` are numbers to come close to, and whether they are several at once, as Transformers decides."""
    if labels is None:
        return False, False
    problem, count = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
    if problem is not None:
        return problem == "regression", problem == "multi_label_classification"
    one_number = count == 1 and labels.numel() == labels.shape[0]
    return one_number, labels.is_floating_point() and not one_number


def example_weights(batch: int, labels: Tensor | None, items: Any, device: torch.device) -> Tensor:
    """fp32 [B]: what a mean over an example counts for in the loss that the model returns.

    1 / B, since a trainer averages micro-batches of one size. Where the model divides a sum over labels by `items`
    (`num_items_in_batch`) and micro-batches are summed, the example's share of those labels. Either way it does not
    depend on how a batch is cut.
    """
    if items is None or labels is None:
        return torch.full((batch,), 1.0 / batch, device=device)
    return (labels.reshape(batch, -1) != IGNORED).sum(1).float() / items


def first_half(value: Any, batch: int) -> Any:
    """`value`, an output of a model, with the clean half of every tensor that holds both."""
    if isinstance(value, Tensor):
        return value[:batch] if value.dim() and value.shape[0] == 2 * batch else value
    if isinstance(value, dict):
        for key in list(value):
            value[key] = first_half(value[key], batch)
        return value
    if type(value) in (tuple, list):
        return type(value)(first_half(item, batch) for item in value)
    return value


class SharedDropout(TorchFunctionMode):
    """While active, dropout draws one mask an example and applies it to both halves.

    The mask is the one that a batch without a second stream would get, so the clean half runs as in plain fine-tuning.
    """

    def __init__(self, batch: int, tokens: int) -> None:
        super().__init__()
        self.batch, self.tokens = batch, tokens

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout) and self._is_twin(args[0] if args else kwargs["input"]):
            return _shared_dropout(func, args, kwargs)
        if func is F.scaled_dot_product_attention and self._is_twin(args[0] if args else kwargs["query"]):
            return _attend_with_shared_dropout(self.batch, args, kwargs)
        return func(*args, **kwargs)

    def _is_twin(self, value: Tensor) -> bool:
        rows = 2 * self.batch
        # Two dimensions and as many rows by chance: DeBERTa's relative embeddings, which have no halves.
        return value.shape[0] == (rows if value.dim() > 2 else rows * self.tokens)


def _shared_dropout(function: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    given = {**kwargs, **dict(zip(("input", "p", "training"), args))}
    whole, rate = given["input"], given.get("p", 0.5)
    training = given.get("training", given.get("train", True))
    if not training or rate == 0:
        return function(*args, **kwargs)
    mask = F.dropout(torch.ones_like(whole[: whole.shape[0] // 2]), rate)
    return (whole.unflatten(0, (2, -1)) * mask).flatten(0, 1)


def _attend_with_shared_dropout(batch: int, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    attend = F.scaled_dot_product_attention
    if not (args[4] if len(args) > 4 else kwargs.get("dropout_p")):
        return attend(*args, **kwargs)

    def one(start: int) -> Tensor:
        def half(value: Any) -> Any:
            twin = isinstance(value, Tensor) and value.dim() > 2 and value.shape[0] == 2 * batch
            return value[start : start + batch] if twin else value

        return attend(*map(half, args), **{name: half(value) for name, value in kwargs.items()})

    device = (args[0] if args else kwargs["query"]).device
    module: Any = torch if device.type == "cpu" else getattr(torch, device.type)
    which = () if device.type == "cpu" else (device,)
    state = module.get_rng_state(*which)
    clean = one(0)
    module.set_rng_state(state, *which)
    return torch.cat((clean, one(batch)))


def check_dropout_can_be_shared(config: Any, layer: nn.Module) -> None:
    """Raise UserError for attention that draws its masks in its own kernel; warn of dropout that no module applies."""
    rates = [getattr(config, name, 0) for name in ATTENTION_DROPOUTS]
    if "flash" in str(getattr(config, "_attn_implementation", "")) and any(rates):
        raise UserError(
            "same_dropout: flash attention draws its dropout inside its kernel, where two streams cannot share it; use "
            "attn_implementation sdpa, an attention dropout of 0, or same_dropout: false."
        )
    try:
        source = inspect.getsource(type(layer).forward)
    except (OSError, TypeError):
        return
    if re.search(r"functional\.dropout|\bF\.dropout", source):
        logger.warning(
            "same_dropout: %s applies dropout in its own forward, where the two streams draw masks of their own; set the "
            "model's dropout to 0, or the term measures dropout as well.",
            type(layer).__name__,
        )


def refuse_reentrant(layer: nn.Module, what: str) -> None:
    """Raise UserError where `layer` is checkpointed in the reentrant way, which loses what leaves it by the side."""
    function: Any = getattr(layer, "_gradient_checkpointing_func", None)
    if getattr(layer, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get(
        "use_reentrant"
    ):
        raise UserError(
            f"{what} does not work with reentrant activation checkpointing; set use_reentrant to false in its kwargs."
        )
