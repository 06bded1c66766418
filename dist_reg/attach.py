"""Attach methods to a Hugging Face model from outside, and take them off again.

The only place that hooks a model. It wraps the model's own forward, so that the loss the model returns holds the
methods' terms, and registers forward hooks on the layers that a method asked for. It knows no concrete method.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_reg import streams
from dist_reg.backbone import (
    EXTRA,
    feed_forward_output,
    find_backbone,
    first_output,
    hidden_argument,
    hidden_dropouts,
    modules_between,
    replace_first_output,
    replace_hidden,
    sub_blocks,
)
from dist_reg.errors import UserError
from dist_reg.forward import (
    hands_arguments_to_its_loss,
    inner_model,
    parameter_names,
    restore_forward,
    wrap_forward,
)
from dist_reg.fusion import Fusion
from dist_reg.kept import is_kept, keep, kept_methods, save_what_is_kept
from dist_reg.layer_noise import LayerNoise
from dist_reg.methods.base import Method, Step, Transform
from dist_reg.model import whole_parameter
from dist_reg.noise import draw_example_keys, sequence_lengths, token_spans
from dist_reg.readout import Fuse, Readout
from dist_reg.streams import TwinStream, example_weights, label_kind
from dist_reg.terms import Means, add_terms, diagnostics

logger = logging.getLogger(__name__)

MEASURE_EVERY = 50
"""Training forwards between two diagnostics that cost something, where `Handle.measure` does not say."""


def regularize(
    model: nn.Module, methods: Sequence[Method], *, seed: int = 0, layers_path: str | None = None
) -> Handle:
    """Attach `methods` to `model` in place and return the handle that reports on them and removes them.

    The model's forward keeps its signature. In training its loss includes the methods' terms; in eval it is the
    bare model. It takes two more keywords: `example_keys` (int64 [B], see `dist_reg.noise.example_keys`), without which
    the keys are drawn once per forward from torch's generator; and `row_spans` (int32 [B, 2], the first real token of a
    row and one past its last), for rows without an attention mask that hold several examples each, told apart by
    `position_ids` that begin anew.

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
        self.optimizer_step: int | None = None
        """The optimizer step that the next forwards are a part of; None: every forward counts as one."""
        self.task_weight: Tensor | None = None
        """What the task's loss of the next forwards counts for; None: 1."""
        self.warming_up = False
        """Whether the next forwards train the added modules alone: everything else in the loss then counts 0."""
        self._modules: dict[nn.Module, tuple[str, float]] = {}
        """What methods added: the method's name, and the multiple of the learning rate."""
        self._rates_are_known = False
        self._added: dict[int, str] = {}
        self.backbone = find_backbone(model, layers_path)
        self._parameters = parameter_names(model)
        self._inputs: dict[int, list[Transform]] = defaultdict(list)
        self._after: dict[tuple[int, nn.Module], list[Transform]] = defaultdict(list)
        self._embeddings: list[Callable[[Tensor, Tensor, Tensor, Step], Tensor]] = []
        self._stream: TwinStream | None = None
        self._reparametrised: list[tuple[nn.Linear, Callable[[Tensor], Tensor]]] = []
        self._attaching, self._attaching_kept = "", False
        inner = inner_model(model)
        self._takes_cache = "use_cache" in parameter_names(inner)
        self._counts_items = hands_arguments_to_its_loss(inner)
        # A model that names no loss gets that of causal language models, as GPT-2's does.
        self._next_token = self._counts_items and getattr(inner, "loss_type", "") in (None, "ForCausalLM")
        self._outputs_are_read = False
        self._undo: list[Callable[[], None]] = []
        self._undo_kept: list[Callable[[], None]] = []
        self._readout: Readout | None = None
        self._step: Step | None = None
        """The forward that is under way, if one is."""
        self._last_step: Step | None = None
        self._layer_steps: dict[int, Step | None] = {}
        self._forwards = 0
        self._means = Means()
        self._warned: set[str] = set()
        try:
            for method in self.methods:
                self._attaching, self._attaching_kept = method.name, method.kept
                if not (method.kept and is_kept(model, method)):
                    method.attach(self)
                if method.kept and not is_kept(model, method):
                    self._undo_kept.append(keep(model, method, layers_path, self._readout))
            self._follow_kept()
            self._fusion = Fusion(self.backbone, self._inputs, self._layer_steps, self._outputs_are_read)
            self._hook_layers()
            self._undo.append(wrap_forward(model, self))
            self._declare_loss_scaling()
        except BaseException:
            self.remove()
            raise

    # -- what a method may ask for (dist_reg.methods.base.Host)

    def transform_input(self, layer: int, transform: Transform) -> None:
        self._inputs[layer].append(transform)

    def add_noise(self, layer: int, noise: LayerNoise) -> None:
        self._inputs[layer].append(noise)

    def reads_outputs(self) -> None:
        self._outputs_are_read = True

    def add_module(self, name: str, module: nn.Module, *, learning_rate_multiple: float) -> Callable[[], Any]:
        place = next(self.backbone.layers[0].parameters(), None)
        if place is not None and not hasattr(place, "ds_id") and not place.is_meta:
            module.to(place.device)
        owner: Any = inner_model(self.model)  # adapters around it may come and go
        owner.add_module(EXTRA + name, module)
        undo = self._undo_kept if self._attaching_kept else self._undo
        undo.append(functools.partial(delattr, owner, EXTRA + name))
        self._modules[module] = self._attaching, learning_rate_multiple
        return functools.partial(getattr, owner, EXTRA + name)

    def replace_readout(self, fuse: Fuse, *, embeddings: bool) -> None:
        self._readout = Readout(self._attaching, self.backbone, fuse, embeddings=embeddings)
        self._undo_kept.append(self._readout.remove)

    def _follow_kept(self) -> None:
        """See to what the methods need that are a part of the model, from now on or from before."""
        for kept in kept_methods(self.model).values():
            self.reads_outputs()
            save_what_is_kept(self.model)
            if kept.readout is not None:
                kept.readout.handle = self
                self._undo.append(functools.partial(setattr, kept.readout, "handle", None))

    def transform_between(self, layer: int, transform: Transform) -> None:
        if not self.backbone.between:
            raise UserError(
                f"{type(self.backbone.layers[layer]).__name__} shows no place between attention and feed-forward; "
                "use site: input."
            )
        self._after[layer, self.backbone.between[layer]].append(transform)

    def transform_output(self, layer: int, transform: Transform) -> None:
        self._after[layer, self.backbone.layers[layer]].append(transform)
        self._added[layer] = self._attaching
        self.reads_outputs()

    def transform_feed_forward(self, layer: int, transform: Transform) -> None:
        block: Any = self.backbone.layers[layer]
        module = feed_forward_output(block, self.backbone.hidden_size)
        if module is None or getattr(block, "chunk_size_feed_forward", 0):
            raise UserError(
                f"{self._attaching}: {type(self.backbone.layers[layer]).__name__} shows no feed-forward whose last "
                "projection could be told; use site: output."
            )
        self._after[layer, module].append(transform)
        self._added[layer] = self._attaching

    def watch_embeddings(self, watch: Callable[[Tensor, Tensor, Tensor, Step], Tensor]) -> None:
        self._embeddings.append(watch)

    def fork(self, layer: int, make_twin: Transform, *, same_dropout: bool) -> None:
        if same_dropout:
            config = getattr(self.backbone.base, "config", None)
            streams.check_dropout_can_be_shared(config, self.backbone.layers[layer])
        between = modules_between(self.backbone)
        if layer == 0 and between:
            raise UserError(
                f"{self._attaching}: {between[0]} joins the first layer's input with its output, so the stream cannot "
                "fork there; use layer: 1 or above."
            )
        self._open_stream(TwinStream(self._attaching, layer, make_twin, same_dropout=same_dropout))
        self.reads_outputs()

    def compare(self, state: int, weight: float, *, detach_clean: bool) -> None:
        assert self._stream is not None
        self._stream.compared[state] = weight, detach_clean

    def double_inputs(self, *, second_labels: bool) -> None:
        if not second_labels and getattr(self.backbone.base.config, "is_encoder_decoder", False):
            raise UserError(
                f"{self._attaching} leaves the second half without labels, from which an encoder-decoder makes its "
                "decoder's inputs; it is for encoders and decoders."
            )
        self._open_stream(TwinStream(self._attaching, counts_second=second_labels))

    def reparametrise(self, linear: nn.Linear, function: Callable[[Tensor], Tensor]) -> None:
        own: Any = linear
        previous = own.__dict__.get("forward")
        own.forward = functools.partial(_linear, own, function)
        self._undo.append(functools.partial(restore_forward, own, own.forward, previous))
        self._reparametrised.append((linear, function))

    def _open_stream(self, stream: TwinStream) -> None:
        if self._stream is not None:
            raise UserError(
                f"methods: {self._stream.owner} and {stream.owner} both run a second stream; keep one of them."
            )
        self._stream = stream

    def disable_hidden_dropout(self) -> None:
        dropouts: Any = hidden_dropouts(self.model)
        for _, module in dropouts:
            self._undo.append(functools.partial(setattr, module, "p", module.p))
            module.p = 0.0

    # -- what a user may ask for

    def metrics(self) -> dict[str, float]:
        """Means over the training forwards since the last call: `task_loss`, each method's terms, diagnostics."""
        means = self._means.take()
        self._warn(means)
        return means

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The trainable parameters as an optimizer takes them: the model's own, then each multiple of `learning_rate`."""
        groups: dict[float, list[nn.Parameter]] = {1.0: []}
        multiples = self.learning_rate_multiples()
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                groups.setdefault(multiples.get(parameter, 1.0), []).append(parameter)
        return [{"params": found, "lr": learning_rate * multiple} for multiple, found in groups.items()]

    def learning_rate_multiples(self) -> dict[nn.Parameter, float]:
        """Of the parameters that the methods added to the model."""
        self._rates_are_known = True
        return {
            parameter: multiple
            for module, (_, multiple) in self._modules.items()
            for parameter in module.parameters()
            if multiple != 1
        }

    def bake(self) -> None:
        """Make what a method computes from a weight that weight itself, and take everything off that does not belong to
        the model at inference: for the export.

        Under ZeRO-3 every process calls this.
        """
        for linear, function in self._reparametrised:
            weight: Any = linear.weight
            with whole_parameter(weight), torch.no_grad():
                weight.copy_(function(weight))
        self._take_off()
        self._undo_kept.clear()

    def remove(self) -> None:
        """Take everything off; the model is what it was, bit for bit. Calling it twice is harmless."""
        self._take_off()
        while self._undo_kept:
            self._undo_kept.pop()()

    def _take_off(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._reparametrised.clear()
        self._modules.clear()

    @property
    def step_under_way(self) -> Step | None:
        """The training forward that the model is in, if it is in one."""
        return self._step

    @property
    def removed(self) -> bool:
        """Whether everything that acts in training alone has been taken off."""
        return not self._undo

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # -- hooks

    def _hook_layers(self) -> None:
        layers = self.backbone.layers
        for (layer, module), transforms in self._after.items():
            self._hook(module.register_forward_hook(functools.partial(self._leave, layer, transforms)))
        forked = range(0)
        if self._stream is not None and self._stream.layer is not None:
            forked = range(self._stream.layer, len(layers))
            self._hook(layers[-1].register_forward_hook(self._leave_last_layer))
        sharing = forked if self._stream is not None and self._stream.same_dropout else range(0)
        base: Any = self.backbone.base
        if self._embeddings:
            self._hook(base.get_input_embeddings().register_forward_hook(self._leave_embeddings))
        if self._fusion.closing:
            self._hook(base.register_forward_pre_hook(self._fusion.enter_model, with_kwargs=True))
        self._undo.append(self._fusion.remove)
        self._fusion.install()
        within = {layer for layer, module in self._after if module is not layers[layer]}
        inside = {*within, *self._fusion.closing, *sharing}
        for layer in sorted({*self._inputs, *inside, *forked, *(layer for layer, _ in self._after)}):
            self._hook(
                layers[layer].register_forward_pre_hook(
                    functools.partial(self._enter_layer, layer), with_kwargs=True
                )
            )
        for layer in sorted(inside):
            for part in sub_blocks(layers[layer]):
                self._hook(
                    part.register_forward_pre_hook(
                        functools.partial(self._enter_part, layer), with_kwargs=True
                    )
                )
        for layer in sharing:
            self._share_dropout(layer)

    def _hook(self, hook: RemovableHandle) -> None:
        self._undo.append(hook.remove)

    def _share_dropout(self, layer: int) -> None:
        """Run the parts of `layer`, which a recomputation reruns too, with the clean half's dropout in both halves."""
        for part in sub_blocks(self.backbone.layers[layer]):
            own: Any = part
            previous = own.__dict__.get("forward")
            own.forward = functools.partial(self._run_part, layer, own, previous)
            self._undo.append(functools.partial(restore_forward, own, own.forward, previous))

    def _run_part(self, layer: int, part: nn.Module, previous: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(type(part).forward, part) if previous is None else previous
        step = self._layer_steps.get(layer)
        if step is None:
            return call(*args, **kwargs)
        with streams.SharedDropout(step.batch, step.tokens):
            return call(*args, **kwargs)

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
            if self._stream is not None and self._step is not None:
                raise UserError(
                    f"layer {layer} is in eval mode while the model trains, so {self._stream.owner}'s second stream would "
                    "end there; call model.train()."
                )
            self._layer_steps[layer] = None
            return None
        if layer in self._added:
            streams.refuse_reentrant(module, self._added[layer])
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
        stream = self._stream
        forks = stream is not None and layer == stream.layer
        entering: Any = None
        if stream is not None and layer in stream.compared:
            noise = self._fusion.noises.get(layer)
            hidden_states = stream.compare(layer, hidden_states, step, noise)
            entering = None if noise is None else hidden_states
        if entering is None and not forks:
            entering = self._fusion.enter_layer(layer, hidden_states, step.of(hidden_states))
        if entering is None:
            entering = hidden_states
            for transform in self._inputs.get(layer, ()):
                entering = transform(entering, step.of(entering))
        if forks and stream.make_twin is not None:
            entering = stream.make_twin(entering, step)
        entering._dist_reg_step = step
        args, kwargs = replace_hidden(args, kwargs, entering)
        if stream is not None and stream.layer is not None and layer >= stream.layer:
            streams.refuse_reentrant(module, "a second stream")
            known = step.doubled if step.under_way else {}
            args, kwargs = streams.double_arguments(module, args, kwargs, step.batch, step.tokens, known)
        return args, kwargs

    def _leave_last_layer(self, module: nn.Module, args: tuple, output: Any) -> Any:
        step = self._layer_steps.get(len(self.backbone.layers) - 1)
        stream = self._stream
        if not module.training or step is None or stream is None:
            return None
        hidden_states = first_output(output)
        last = len(self.backbone.layers)
        if last in stream.compared:
            hidden_states = stream.compare(last, hidden_states, step, None)
        return replace_first_output(output, hidden_states[: step.batch])

    def _leave_embeddings(self, module: Any, args: tuple, output: Tensor) -> Tensor | None:
        if self._step is None or not args:
            return None
        for watch in self._embeddings:
            output = watch(output, args[0], module.weight, self._step)
        return output

    def _leave(
        self, layer: int, transforms: list[Transform], module: nn.Module, args: tuple, output: Any
    ) -> Any:
        step = self._layer_steps.get(layer)
        if not module.training or step is None:
            return None
        hidden_states = first_output(output)
        if hidden_states.dim() != 3 or hidden_states.shape[1] != step.tokens:
            raise UserError(
                f"{type(module).__name__} in layer {layer} returns {list(hidden_states.shape)} where [batch, {step.tokens} "
                "tokens, channels] was expected, so no method can act on its tokens; use site: output."
            )
        for transform in transforms:
            hidden_states = transform(hidden_states, step.of(hidden_states))
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

    def run_forward(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        example_keys: Tensor | None,
        row_spans: Tensor | None = None,
    ) -> Any:
        """What the wrapped forward of a model in training does: `call`, the model's own, and the methods around it."""
        if self._forwards == 0:
            self._check_added_modules()
        step = self._begin(args, kwargs, example_keys, row_spans)
        try:
            args, kwargs = self._second_stream(args, kwargs, step)
            outputs = self._finish(call(*args, **kwargs), step)
        finally:
            step.finish()
            self._step = None
        self._forwards += 1
        return outputs

    def _declare_loss_scaling(self) -> None:
        """Tell Transformers' Trainer which losses are plain means over the micro-batch.

        It takes every forward with **kwargs for one that divides by `num_items_in_batch`. A loss that ignores that
        argument, as most classifiers' do, would be multiplied by world size and accumulation steps.
        """
        base: Any = inner_model(self.model)
        if "accepts_loss_kwargs" in vars(base) or self._counts_items:
            return
        base.accepts_loss_kwargs = False
        self._undo.append(functools.partial(delattr, base, "accepts_loss_kwargs"))

    def _begin(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        example_keys: Tensor | None,
        row_spans: Tensor | None,
    ) -> Step:
        given = {**dict(zip(self._parameters, args)), **kwargs}
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
            if tokens is not None and self._embeddings:
                raise UserError(
                    "a method acts on word embeddings, so the model needs input_ids, not inputs_embeds."
                )
        if tokens is None:
            raise UserError("the regularised model was called without input_ids or inputs_embeds.")
        batch, length = tokens.shape[:2]
        if example_keys is None and not (self._inputs or self._after or self._embeddings or self._stream):
            # Nothing needs a key; drawing one would move the generator that dropout draws from.
            example_keys = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
        if example_keys is None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            example_keys = draw_example_keys(batch, tokens.device, rank)
        mask = given.get("attention_mask")
        spans, lengths = row_spans, None
        if row_spans is not None:
            lengths = sequence_lengths(given["position_ids"])
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            spans = token_spans(mask, batch, length, tokens.device)
        measure = self._forwards % MEASURE_EVERY == 0 if self.measure is None else self.measure
        labels = given.get("labels")
        items = given.get("num_items_in_batch") if self._counts_items else None
        regression, several_labels = label_kind(getattr(inner_model(self.model), "config", None), labels)
        step = Step(
            self.seed,
            example_keys,
            length,
            spans,
            measure,
            weights=example_weights(batch, labels, items, tokens.device),
            labels=labels,
            next_token=self._next_token,
            regression=regression,
            several_labels=several_labels,
            number=self._forwards if self.optimizer_step is None else self.optimizer_step,
            task_weight=self.task_weight,
            sequence_lengths=lengths,
        )
        if self._stream is not None:
            spans, lengths = (None if value is None else value.repeat(2, 1) for value in (spans, lengths))
            # Both share what a forward gathers: `replace` hands on the very dictionaries.
            step.twin = dataclasses.replace(
                step,
                example_keys=self._stream.keys_of_both(example_keys),
                spans=spans,
                sequence_lengths=lengths,
            )
        self._step = self._last_step = step
        return step

    def _second_stream(
        self, args: tuple, kwargs: dict[str, Any], step: Step
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model's forward as the second stream needs them."""
        if self._stream is None:
            return args, kwargs
        given = {**dict(zip(self._parameters, args)), **kwargs}
        if self._takes_cache and given.get("use_cache") is None:
            # PEFT hands on what its own forward does not name.
            given["use_cache"] = kwargs["use_cache"] = False
        if self._stream.layer is not None:
            return args, kwargs
        _, given = streams.double_arguments(self.model, (), given, step.batch, step.tokens, step.doubled)
        if step.labels is not None:
            given["labels"] = streams.second_labels(step.labels, self._stream.counts_second)
        for name in streams.SPAN:
            if given.get(name) is not None and not self._stream.counts_second:
                given[name] = given[name].clone()
                given[name][step.batch :] = step.tokens
        if self._stream.counts_second and given.get("num_items_in_batch") is not None and self._counts_items:
            given["num_items_in_batch"] = 2 * given["num_items_in_batch"]
        return (), given

    def _finish(self, outputs: Any, step: Step) -> Any:
        doubled = self._stream is not None and self._stream.layer is None
        if doubled:
            first = int(step.labels is not None)
            step.logits = outputs.get("logits") if isinstance(outputs, dict) else outputs[first]
            if isinstance(outputs, dict) and "start_logits" in outputs:
                step.span_logits = outputs["start_logits"], outputs["end_logits"]
        for method in self.methods:
            method.finish(step)
        alone = {method.name for method in self.methods if method.epochs_alone()} if self.warming_up else None
        outputs = add_terms(outputs, step, self._means, alone)
        if self._forwards == 0:
            self._warn({metric: float(value) for metric, value in diagnostics(step).items()})
        return outputs if self._stream is None else streams.first_half(outputs, step.batch)

    def _check_added_modules(self) -> None:
        """Warn where what a method added cannot learn as it should."""
        own_rates = [name for name, multiple in self._modules.values() if multiple != 1]
        if own_rates and not self._rates_are_known:
            logger.warning(
                "%s added modules that learn at a rate of their own, and nobody has asked for it; make the optimizer from "
                "handle.parameter_groups(rate), or use dist_reg.Trainer, which also has the warm-up.",
                ", ".join(dict.fromkeys(own_rates)),
            )
        owner: Any = inner_model(self.model)
        modules = [(name, module) for module, (name, _) in self._modules.items()]
        modules += [(name, getattr(owner, EXTRA + name)) for name in kept_methods(self.model)]
        frozen = [name for name, module in modules if not any(p.requires_grad for p in module.parameters())]
        if frozen:
            logger.warning(
                "%s added modules whose parameters have been frozen since, as PEFT does; call regularize after get_peft_model.",
                ", ".join(dict.fromkeys(frozen)),
            )

    def _warn(self, metrics: dict[str, float]) -> None:
        for method in self.methods:
            text = method.warning(metrics)
            if text and method.name not in self._warned:
                self._warned.add(method.name)
                logger.warning(text)


def _linear(module: nn.Linear, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return nn.functional.linear(inputs, function(module.weight), module.bias)
