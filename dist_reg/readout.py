"""What lies between a model's layers and its head: reads every layer's hidden states, replaces those the head reads.

It acts in training and in eval, and stays when the training methods come off. The states are those that Transformers
numbers: h^l is what layer l reads, before any method's noise, and h^L what the head reads, after a final norm where the
model has one. With a second stream inside the model, the clean half is read.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dist_reg.backbone import Backbone, hidden_argument
from dist_reg.errors import UserError
from dist_reg.forward import inner_model, parameter_names
from dist_reg.methods.base import Step
from dist_reg.streams import refuse_reentrant

Fuse = Callable[[Sequence[Tensor], Tensor | None, Step | None], Tensor]
"""Maps (hidden states of the layers, bool [B, T] of the real tokens or None for all, the training forward if one is under
way) to what the head reads."""


@dataclass
class _Reading:
    """One forward of the base model."""

    batch: int
    real: Tensor | None
    backward: int
    """The backward pass that it is a recomputation in, -1 for none."""
    states: dict[int, Tensor] = field(default_factory=dict)


class Readout:
    """Hooks that hand the layers' hidden states to `fuse` and its result to the head; a compiler leaves them as they are.

    Raises UserError for a model in which nothing of that kind reads the last hidden states.
    """

    def __init__(self, owner: str, backbone: Backbone, fuse: Fuse, *, embeddings: bool) -> None:
        check_head(owner, backbone)
        self.owner, self.fuse, self.base = owner, fuse, backbone.base
        self.handle: Any = None
        """Whose training forwards these are; `fuse` is given the one under way."""
        self._count = len(backbone.layers) + embeddings
        self._names = parameter_names(self.base)
        self._readings: dict[int, _Reading] = {}  # by thread: a served model may run in several
        self._hooks: list[RemovableHandle] = []
        self._hooks.append(self.base.register_forward_pre_hook(self._enter, with_kwargs=True))
        for number, layer in enumerate(backbone.layers):
            if number or embeddings:
                hook = functools.partial(self._read, number)
                self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        owner_path = backbone.layers_path.rpartition(".")[0]
        end: Any = backbone.final_norm or backbone.model.get_submodule(owner_path)
        self._hooks.append(end.register_forward_hook(self._leave))
        self._hooks.append(self.base.register_forward_hook(self._let_go, always_call=True))

    def remove(self) -> None:
        """Take the hooks off."""
        while self._hooks:
            self._hooks.pop().remove()

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args)), **kwargs}
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return
        if given.get("past_key_values") is not None and given["past_key_values"].get_seq_length():
            raise UserError(f"{self.owner} reads whole sequences; call the model without past_key_values.")
        if getattr(module, "_is_replica", False):
            raise UserError(
                f"{self.owner} does not work in nn.DataParallel; start one process a GPU with torchrun."
            )
        batch, length = tokens.shape[:2]
        mask, real = given.get("attention_mask"), None
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.shape != (batch, length):
                shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise UserError(
                    f"{self.owner} needs an attention_mask [batch, tokens] = {[batch, length]}, from which it knows the real "
                    f"tokens; it is {shape}."
                )
            real = mask != 0
        backward = torch._C._current_graph_task_id()
        self._readings[threading.get_ident()] = _Reading(batch, real, backward)

    @torch.compiler.disable
    def _read(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        reading = self._readings.get(threading.get_ident())
        if reading is None or reading.backward != torch._C._current_graph_task_id():
            return  # a layer that is computed again during backward
        if layer.training:
            refuse_reentrant(layer, self.owner)
        reading.states[number] = hidden_argument(args, kwargs)[: reading.batch]

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        reading = self._readings.pop(threading.get_ident(), None)
        if reading is None:
            raise UserError(
                f"{type(module).__name__} was called without going through {type(self.base).__name__}, so {self.owner} "
                "knows nothing of its inputs; call the whole model."
            )
        last = _last_hidden(output)
        if len({state.shape for state in (*reading.states.values(), last)}) > 1:
            raise UserError(
                f"{self.owner}: the layers of {type(self.base).__name__} return hidden states of different shapes, which "
                "cannot be mixed."
            )
        states = [*(state for _, state in sorted(reading.states.items())), last]
        if len(states) != self._count:
            raise UserError(
                f"{self.owner} reads {self._count} layers and {len(states)} ran; a model that leaves layers out cannot be mixed."
            )
        step = self.handle.step_under_way if self.handle is not None else None
        return _replace(output, last, self.fuse(states, reading.real, step))

    @torch.compiler.disable
    def _let_go(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Whatever happened in between, keep nothing of a forward that is over."""
        self._readings.pop(threading.get_ident(), None)


def check_head(owner: str, backbone: Backbone) -> None:
    """Raise UserError, with the reason, for a model without a head that reads whole sequences of hidden states."""
    inner = inner_model(backbone.model)
    name, config = type(inner).__name__, getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{owner}: {name} is an encoder-decoder, whose head reads the decoder and not the layers of one stack; use an "
            "encoder or a decoder."
        )
    if backbone.head is None:
        raise UserError(
            f"{owner}: {name} has no head that reads hidden states; load the model with one, for example by "
            "AutoModelForSequenceClassification."
        )
    kinds = {kind.__name__ for kind in type(inner).__mro__}
    generates = getattr(inner, "can_generate", bool)()
    if generates or kinds & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UserError(
            f"{owner}: {name} predicts the next token, which {owner} would show it: it reads a sequence as a whole; use a "
            "model for classification, tagging or question answering."
        )


def _last_hidden(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise UserError("the layers' stack returned no hidden states [batch, tokens, channels].")
    return found


def _replace(output: Any, last: Tensor, new: Tensor) -> Any:
    """`output` with `new` wherever it holds `last`: DeBERTa's head reads the last of `hidden_states`."""

    def one(value: Any) -> Any:
        if value is last:
            return new
        return tuple(one(part) for part in value) if type(value) is tuple else value

    if isinstance(output, Tensor):
        return new
    if isinstance(output, tuple):
        return one(output)
    for key, value in output.items():
        output[key] = one(value)
    return output
