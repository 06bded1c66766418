"""The noise that enters a layer, added by the norm beside it, where it then costs no pass of its own.

Post-norm (BERT): the LayerNorm that ends layer l - 1 adds the noise of layer l to what it writes.
Pre-norm (Llama): the noise of layer l is added together with the RMSNorm that layer l begins with.
Same numbers as noise added alone, up to one rounding less. Everything not known to be safe stays with the latter.
"""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_reg.backbone import Backbone, closing_norms, opening_norms
from dist_reg.errors import UserError, nearest
from dist_reg.layer_noise import LayerNoise
from dist_reg.methods.base import Step, Transform

FASTER_ON_CPU = {"layer_norm": False, "rms_norm": True}
"""Whether a step gains on a CPU; docs/kernels.md has the measurement. On a GPU both do."""

CHOICES = ("auto", "always", "never")


class Fusion:
    """Which norms add noise, and how they learn which. One belongs to each handle."""

    def __init__(
        self,
        backbone: Backbone,
        transforms: Mapping[int, Sequence[Transform]],
        steps: Mapping[int, Step | None],
        outputs_are_read: bool,
    ) -> None:
        """`transforms` act on the hidden states entering a layer; `steps` is the forward each layer is in.

        Raises UserError where DIST_REG_FUSE is none of auto, always and never.
        """
        self.choice = os.environ.get("DIST_REG_FUSE") or "auto"
        if self.choice not in CHOICES:
            raise UserError(f"unknown DIST_REG_FUSE={self.choice!r}: {nearest(self.choice, CHOICES)}")
        alone = {i: acts[0] for i, acts in transforms.items() if len(acts) == 1}
        self.noises = {i: noise for i, noise in alone.items() if isinstance(noise, LayerNoise)}
        self.steps = steps
        self.layers = backbone.layers
        self.base = backbone.base
        closing = closing_norms(backbone) if self._may_pay("layer_norm") and not outputs_are_read else {}
        self.closing = {i: norm for i, norm in closing.items() if i + 1 in self.noises}
        opening = opening_norms(backbone) if self._may_pay("rms_norm") else {}
        self.opening = {i: norm for i, norm in opening.items() if i in self.noises}
        self._arguments = list(inspect.signature(self.base.forward).parameters)
        self._outputs_requested = False
        self._opened: dict[int, tuple[Tensor, Tensor]] = {}

    def install(self) -> None:
        # Bound methods that reach everything through their module, so that a deep copy of the model is whole.
        for norms, forward in ((self.closing, _close), (self.opening, _open)):
            for layer, module in norms.items():
                norm: Any = module
                norm._dist_reg_fusion = (self, layer)
                norm.forward = types.MethodType(forward, norm)

    def remove(self) -> None:
        for module in (*self.closing.values(), *self.opening.values()):
            norm: Any = module
            del norm._dist_reg_fusion
            # Where somebody has wrapped our forward since, it stays and runs the norm's own.
            if getattr(norm.forward, "__func__", None) in (_close, _open):
                del norm.forward

    def enter_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the layers run: see whether their outputs are asked for, which must not hold the next noise."""
        given = {**dict(zip(self._arguments, args)), **kwargs}.get("output_hidden_states")
        configured = getattr(getattr(self.base, "config", None), "output_hidden_states", False)
        self._outputs_requested = bool(given or configured)

    def enter_layer(self, layer: int, hidden_states: Tensor, step: Step) -> Tensor | None:
        """The hidden states [B, T, D] that `layer` reads, noise included; None where it is still to be added.

        Raises UserError where the norm before has added it and something else than its output arrives.
        """
        if layer in step.fused:
            if _recomputing():
                return hidden_states
            written, step.fused[layer] = step.fused[layer], None
            if written is None or not _unchanged(*written, hidden_states):
                raise UserError(
                    f"layer {layer} does not read what layer {layer - 1} returned, in which its noise is already; "
                    "set DIST_REG_FUSE=never in the environment to have noise added where a layer begins."
                )
            return hidden_states
        norm: Any = self.opening.get(layer)
        if norm is None or torch.compiler.is_compiling():
            return None
        if not self._can_open(layer, norm.weight, hidden_states, step):
            return None
        noise, epsilon = self.noises[layer], norm.variance_epsilon
        self._opened[layer] = noise.before_rms_norm(hidden_states, norm.weight, epsilon, step)
        return self._opened[layer][0]

    def close(self, layer: int, norm: Any, hidden_states: Tensor) -> Tensor | None:
        """What `norm`, the last of `layer`, returns with the next layer's noise; None where it is to run alone."""
        step = self.steps.get(layer)
        # Tracing, every question below would break the graph.
        if step is None or torch.compiler.is_compiling():
            return None
        step = step.of(hidden_states)
        again = _recomputing()
        # A recomputation does what its forward did.
        if not (layer + 1 in step.fused if again else self._can_close(hidden_states, step)):
            return None
        noise = self.noises[layer + 1]
        out = noise.after_layer_norm(hidden_states, norm.weight, norm.bias, norm.eps, step)
        if not again:
            step.fused[layer + 1] = out, out._version
        return out

    def open(self, layer: int, hidden_states: Tensor) -> Tensor | None:
        """RMSNorm of `hidden_states` where it was computed along with the noise, else None."""
        stream, normed = self._opened.pop(layer, (None, None))
        return normed if stream is hidden_states else None

    def _may_pay(self, kind: str) -> bool:
        """Whether noise is worth fusing on some device of this machine; the model may move to another yet."""
        pays = FASTER_ON_CPU[kind] or torch.cuda.is_available() or self.choice == "always"
        return bool(self.noises) and self.choice != "never" and pays

    def _can_close(self, hidden_states: Tensor, step: Step) -> bool:
        # Autocast has LayerNorm return fp32 on a GPU, whatever it is given.
        device, dtype = hidden_states.device.type, hidden_states.dtype
        promoted = dtype != torch.float32 and torch.is_autocast_enabled(device)
        return not (self._outputs_requested or promoted) and self._can_fuse("layer_norm", hidden_states, step)

    def _can_open(self, layer: int, weight: Tensor, hidden_states: Tensor, step: Step) -> bool:
        # Checkpointed, the layer would keep the normed states as well as the stream.
        # ZeRO-3 has a weight at hand, and expects its gradient, around the call of its own module alone.
        if getattr(self.layers[layer], "gradient_checkpointing", False) or hasattr(weight, "ds_id"):
            return False
        at_hand = weight.shape == hidden_states.shape[-1:] and weight.device == hidden_states.device
        same_dtype = torch.promote_types(weight.dtype, hidden_states.dtype) == hidden_states.dtype
        plain = type(weight) in (Tensor, nn.Parameter)
        return at_hand and same_dtype and plain and self._can_fuse("rms_norm", hidden_states, step)

    def _can_fuse(self, kind: str, hidden_states: Tensor, step: Step) -> bool:
        """Nothing here may differ between two forwards of a run, or the run would not be the same again."""
        device = hidden_states.device.type
        pays = device == "cuda" or (device == "cpu" and FASTER_ON_CPU[kind])
        if not (pays or self.choice == "always"):
            return False
        return (
            hidden_states.shape[:-1] == (step.example_keys.shape[0], step.tokens)
            and not hidden_states.is_inference()
        )


def _close(norm: Any, input: Tensor) -> Tensor:
    fusion, layer = getattr(norm, "_dist_reg_fusion", (None, 0))
    out = None if fusion is None else fusion.close(layer, norm, input)
    return type(norm).forward(norm, input) if out is None else out


def _open(norm: Any, hidden_states: Tensor) -> Tensor:
    fusion, layer = getattr(norm, "_dist_reg_fusion", (None, 0))
    out = None if fusion is None else fusion.open(layer, hidden_states)
    return type(norm).forward(norm, hidden_states) if out is None else out


def _recomputing() -> bool:
    """Whether activation checkpointing runs a layer again, during backward."""
    return torch._C._current_graph_task_id() != -1


def _unchanged(written: Tensor, version: int, read: Tensor) -> bool:
    """Whether `read` is what was written. DeepSpeed's hooks put a new tensor around the same memory."""
    return (
        written.data_ptr() == read.data_ptr()
        and (written.shape, written.stride()) == (read.shape, read.stride())
        and version == read._version
    )
