"""Attach methods to a Hugging Face model from outside, and take them off again.

The only place that hooks a model. It wraps the model's own forward, so that the loss the model returns holds the
methods' terms, and registers forward hooks on the layers that a method asked for. It knows no concrete method.
"""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import textwrap
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_reg.backbone import (
    find_backbone,
    first_output,
    hidden_argument,
    hidden_dropouts,
    replace_first_output,
    replace_hidden,
    sub_blocks,
)
from dist_reg.errors import UserError
from dist_reg.methods.base import Method, Step, Transform
from dist_reg.noise import draw_example_keys, token_spans

logger = logging.getLogger(__name__)

MEASURE_EVERY = 50
"""Training forwards between two diagnostics that cost something, where `Handle.measure` does not say."""


def regularize(
    model: nn.Module, methods: Sequence[Method], *, seed: int = 0, layers_path: str | None = None
) -> Handle:
    """Attach `methods` to `model` in place and return the handle that reports on them and removes them.

    The model's forward keeps its signature. In training its loss includes the methods' terms; in eval it is the
    bare model. It takes one more keyword, `example_keys` (int64 [B], see `dist_reg.noise.example_keys`); without it
    the keys are drawn once per forward from torch's generator.

    Call it before `deepspeed.initialize`, DDP or `Accelerator.prepare`. `seed` is the run seed of the noise.
    `layers_path` names the layers of a model whose structure is not recognised, such as "encoder.blocks".
    Raises UserError for a model without recognisable layers, a selector that matches none, a method listed twice,
    or a model that is already regularised.
    """
    active = getattr(model, "_dist_reg_handle", None)
    if active is not None:
        names = ", ".join(method.name for method in active.methods) or "no method"
        raise UserError(f"this model is regularised already ({names}); call handle.remove() first.")
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"methods: {name!r} is listed twice; both would act at the same places, so keep one."
            )
    return Handle(model, methods, seed, layers_path)


class Handle:
    """What `regularize` returns; also a context manager that removes the methods at its end."""

    def __init__(
        self, model: nn.Module, methods: Sequence[Method], seed: int, layers_path: str | None
    ) -> None:
        self.model = model
        self.methods = tuple(methods)
        self.seed = seed
        self.measure: bool | None = None
        """Whether the next forwards take the diagnostics that cost something; None: one in `MEASURE_EVERY`."""
        self.backbone = find_backbone(model, layers_path)
        self._parameters = _parameters(model)
        self._inputs: dict[int, list[Transform]] = defaultdict(list)
        self._betweens: dict[int, list[Transform]] = defaultdict(list)
        self._undo: list[Callable[[], None]] = []
        self._step: Step | None = None
        """The forward that is under way, if one is."""
        self._last_step: Step | None = None
        self._layer_steps: dict[int, Step | None] = {}
        self._forwards = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._warned: set[str] = set()
        try:
            for method in self.methods:
                method.attach(self)
            self._hook_layers()
            self._own_the_loss()
        except BaseException:
            self.remove()
            raise

    # -- what a method may ask for (dist_reg.methods.base.Host)

    def transform_input(self, layer: int, transform: Transform) -> None:
        self._inputs[layer].append(transform)

    def transform_between(self, layer: int, transform: Transform) -> None:
        if not self.backbone.between:
            raise UserError(
                f"{type(self.backbone.layers[layer]).__name__} shows no place between attention and feed-forward; "
                "use site: input."
            )
        self._betweens[layer].append(transform)

    def disable_hidden_dropout(self) -> None:
        dropouts: Any = hidden_dropouts(self.model)
        for _, module in dropouts:
            self._undo.append(functools.partial(setattr, module, "p", module.p))
            module.p = 0.0

    # -- what a user may ask for

    def metrics(self) -> dict[str, float]:
        """Means over the training forwards since the last call: `task_loss`, each method's terms, diagnostics."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        self._warn(means)
        return means

    def remove(self) -> None:
        """Take everything off; the model is what it was, bit for bit. Calling it twice is harmless."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # -- hooks

    def _hook_layers(self) -> None:
        for layer in sorted(self._inputs.keys() | self._betweens.keys()):
            module = self.backbone.layers[layer]
            hook = module.register_forward_pre_hook(
                functools.partial(self._enter_layer, layer), with_kwargs=True
            )
            self._undo.append(hook.remove)
        for layer, transforms in self._betweens.items():
            hook = self.backbone.between[layer].register_forward_hook(
                functools.partial(self._between, layer, transforms)
            )
            self._undo.append(hook.remove)
            for part in sub_blocks(self.backbone.layers[layer]):
                hook = part.register_forward_pre_hook(
                    functools.partial(self._enter_part, layer), with_kwargs=True
                )
                self._undo.append(hook.remove)

    def _enter_part(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """In a recomputation that does not pass `_enter_layer`, find the forward it belongs to.

        From transformers 5.23 on, activation checkpointing reruns what is inside a layer and not the layer's own hooks,
        with the very tensor that `_enter_layer` gave the layer.
        """
        if torch._C._current_graph_task_id() == -1:
            return
        for value in (*args, *kwargs.values()):
            step = getattr(value, "_dist_reg_step", None)
            if step is not None:
                self._layer_steps[layer] = step

    def _enter_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if not module.training:
            self._layer_steps[layer] = None
            return None
        hidden_states = hidden_argument(args, kwargs)
        step = self._step_of(hidden_states)
        self._layer_steps[layer] = step
        if step is None:
            return None
        if hidden_states.shape[1] != step.tokens:
            raise UserError(
                f"layer {layer} reads {hidden_states.shape[1]} tokens where the model was given {step.tokens} (prompt "
                "tuning prepends some), so the noise would land on the wrong ones."
            )
        for transform in self._inputs.get(layer, ()):
            hidden_states = transform(hidden_states, step)
        entering: Any = hidden_states
        entering._dist_reg_step = step
        return replace_hidden(args, kwargs, entering)

    def _between(
        self, layer: int, transforms: list[Transform], module: nn.Module, args: tuple, output: Any
    ) -> Any:
        step = self._layer_steps.get(layer)
        if not module.training or step is None:
            return None
        hidden_states = first_output(output)
        for transform in transforms:
            hidden_states = transform(hidden_states, step)
        return replace_first_output(output, hidden_states)

    def _step_of(self, hidden_states: Any) -> Step | None:
        """The forward these hidden states belong to.

        Up to transformers 5.22 activation checkpointing reruns the hooks during backward, when another forward may
        have begun. Checkpointing hands the very same input tensor back, so the tensor remembers its forward.
        """
        if torch._C._current_graph_task_id() != -1:
            return getattr(hidden_states, "_dist_reg_step", self._last_step)
        if self._step is None:
            warnings.warn(
                f"{type(self.backbone.base).__name__} was called without going through "
                f"{type(self.model).__name__}.forward, so no method acts; call the model that was regularised.",
                stacklevel=2,
            )
            return None
        hidden_states._dist_reg_step = self._step
        return self._step

    # -- the model's forward

    def _own_the_loss(self) -> None:
        model: Any = self.model
        original = model.forward
        previous = model.__dict__.get("forward")
        signature = inspect.signature(original)

        # A bound method that reaches everything through its module, so that a deep copy of the model is whole.
        def regularised(module: Any, *args: Any, example_keys: Tensor | None = None, **kwargs: Any) -> Any:
            call = functools.partial(type(module).forward, module) if previous is None else previous
            handle = getattr(module, "_dist_reg_handle", None)
            if handle is None or not module.training:
                return call(*args, **kwargs)
            step = handle._begin(args, kwargs, example_keys)
            try:
                outputs = handle._add_terms(call(*args, **kwargs), step)
            finally:
                handle._step = None
            handle._forwards += 1
            return outputs

        forward: Any = functools.update_wrapper(regularised, original)
        del forward.__wrapped__
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
        bound = types.MethodType(forward, model)

        def restore() -> None:
            if model.__dict__.get("forward") is bound:
                if previous is None:
                    del model.forward
                else:
                    model.forward = previous
            del model._dist_reg_handle

        model.forward = bound
        model._dist_reg_handle = self
        self._undo.append(restore)
        self._declare_loss_scaling()

    def _declare_loss_scaling(self) -> None:
        """Tell Transformers' Trainer which losses are plain means over the micro-batch.

        It takes every forward with **kwargs for one that divides by `num_items_in_batch`. A loss that ignores that
        argument, as most classifiers' do, would be multiplied by world size and accumulation steps.
        """
        base: Any = self.model
        if hasattr(base, "get_base_model"):
            base = base.get_base_model()
        if "accepts_loss_kwargs" in vars(base) or _hands_arguments_to_its_loss(base):
            return
        base.accepts_loss_kwargs = False
        self._undo.append(functools.partial(delattr, base, "accepts_loss_kwargs"))

    def _begin(self, args: tuple, kwargs: dict[str, Any], example_keys: Tensor | None) -> Step:
        given = {**dict(zip(self._parameters, args)), **kwargs}
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if tokens is None:
            raise UserError("the regularised model was called without input_ids or inputs_embeds.")
        batch, length = tokens.shape[:2]
        if example_keys is None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            example_keys = draw_example_keys(batch, tokens.device, rank)
        mask = given.get("attention_mask")
        spans = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            spans = token_spans(mask, batch, length, tokens.device)
        measure = self._forwards % MEASURE_EVERY == 0 if self.measure is None else self.measure
        self._step = self._last_step = Step(self.seed, example_keys, length, spans, measure)
        return self._step

    def _add_terms(self, outputs: Any, step: Step) -> Any:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
        terms = {name: term for method in self.methods for name, term in method.loss_terms(step).items()}
        if loss is None or loss.dim() > 0:
            if terms:
                raise UserError(
                    f"the model returned no loss to add {', '.join(terms)} to; pass it the labels."
                )
        else:
            self._record("task_loss", loss)
            for name, term in terms.items():
                self._record(name, term)
            if terms:
                loss = loss + torch.stack(list(terms.values())).sum()
                if isinstance(outputs, dict):
                    outputs["loss"] = loss
                else:
                    outputs = (loss, *outputs[1:])
        by_metric: dict[str, list[Tensor]] = defaultdict(list)
        for (metric, _), value in step.values.items():
            by_metric[metric].append(value)
        for metric, values in by_metric.items():
            self._record(metric, torch.stack(values).mean())
        step.values.clear()
        step.measure = False
        if self._forwards == 0:
            self._warn({metric: float(self._sums[metric]) for metric in by_metric})
        return outputs

    def _record(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._counts[name] = self._counts.get(name, 0) + 1

    def _warn(self, metrics: dict[str, float]) -> None:
        for method in self.methods:
            text = method.warning(metrics)
            if text and method.name not in self._warned:
                self._warned.add(method.name)
                logger.warning(text)


def _hands_arguments_to_its_loss(model: nn.Module) -> bool:
    """Whether the model's forward calls `self.loss_function(..., **kwargs)`, and `num_items_in_batch` gets there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(model).forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(
        isinstance(call.func, ast.Attribute)
        and call.func.attr == "loss_function"
        and any(keyword.arg is None for keyword in call.keywords)
        for call in calls
    )


def _parameters(model: Any) -> list[str]:
    """Names of the forward's positional parameters; PEFT's own forward may take *args for those of the model inside."""
    names = list(inspect.signature(model.forward).parameters)
    if names == ["args", "kwargs"] and hasattr(model, "get_base_model"):
        names = list(inspect.signature(model.get_base_model().forward).parameters)
    return names
