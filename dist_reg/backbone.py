"""Finds the parts of a Hugging Face model that a regulariser acts on, by structure and not by model name.

Layers count from 0: layer i reads h^i and returns h^(i+1), so h^0 is the embedding output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dist_reg.errors import UserError, nearest

EXTRA = "dist_reg_"
"""How the names of modules that a method adds to a model begin."""

Selector = str | int | Sequence[str | int]

_SELECTOR_FORMS = '"all", "3", "0-5", "first:4", "last:4" or a list such as [0, 2, -1]'
# What attention modules call the query projection: separate (BERT, Llama, T5) or fused (GPT-2, ModernBERT).
_QUERY = re.compile(
    r"(q|wq|query)(_[ab])?(_lin|_proj)?|w?qkv(_proj)?|query_key_value|c_attn|in_proj", re.IGNORECASE
)
# Dropouts beside the query projection that are not on probabilities: after the output projection (GPT-2,
# ModernBERT), or on DeBERTa's relative position embeddings, which `hidden_dropout_prob` governs too.
_NOT_PROBABILITIES = re.compile(r"resid|out_|proj|pos_")


@dataclass(frozen=True)
class Backbone:
    """The parts of a model, as `find_backbone` found them."""

    model: nn.Module
    """The model that was given."""
    base: nn.Module
    """The Hugging Face model whose forward runs the layers: BertModel, LlamaModel, T5's encoder stack."""
    embedding: nn.Module | None
    """The module whose output is h^0, [B, T, D]; None where no single module returns it. T5 applies one more
    dropout between this module and layer 0, and `inputs_embeds` bypasses a bare embedding table."""
    layers: tuple[nn.Module, ...]
    """The transformer layers in order."""
    layers_path: str
    """Dotted path of their list from `model`."""
    between: tuple[nn.Module, ...]
    """Per layer, the module to whose (first) output noise is added to perturb the hidden state between
    attention and feed-forward. Empty where the structure does not tell."""
    final_norm: nn.Module | None
    """The normalisation after the last layer; None in post-norm models."""
    head: nn.Module | None
    """The module that turns hidden states into logits (with PEFT, its trained copy); None in a bare model."""
    hidden_size: int
    """D."""


def find_backbone(model: nn.Module, layers_path: str | None = None) -> Backbone:
    """The backbone of `model`, with any head and with or without PEFT around it.

    `layers_path` names the ModuleList of layers where a model holds several, as an encoder-decoder does.
    Raises UserError when the path does not exist, or when without it none or several lists could be meant, or
    the list is shorter than the configuration says.
    """
    path = _find_layers(model) if layers_path is None else _check_layers(model, layers_path)
    layers = tuple(model.get_submodule(path).children())
    ancestors = [model.get_submodule(".".join(path.split(".")[:i])) for i in range(path.count(".") + 1)]
    owners = [module for module in ancestors if isinstance(module, PreTrainedModel)] or [model]
    base = owners[-1]
    config = getattr(base, "config", None)
    expected = getattr(config, "num_hidden_layers", len(layers))
    if layers_path is None and len(layers) < expected:
        raise UserError(
            f"{path} holds {len(layers)} layer(s) where the configuration counts {expected}: shared layers, "
            f"as in ALBERT, are not supported; if layers were removed from the model, pass layers_path={path}"
        )
    parallel = getattr(config, "use_parallel_residual", False) or getattr(config, "parallel_attn", False)
    between = [module for layer in layers if not parallel and (module := _between(layer)) is not None]
    final_norm = _final_norm(base, layers)
    embedding = _embedding(base, layers, final_norm)
    return Backbone(
        model=model,
        base=base,
        embedding=embedding,
        layers=layers,
        layers_path=path,
        between=tuple(between) if len(between) == len(layers) else (),
        final_norm=final_norm,
        head=_head(owners),
        hidden_size=_hidden_size(base, embedding),
    )


def select_layers(selector: Selector, number_of_layers: int) -> tuple[int, ...]:
    """Sorted unique layer numbers (0-based) that `selector` names.

    Forms: "all", "3", "0-5" (both ends included), "first:4", "last:4", an integer, a list of these; negative
    integers count from the end. Raises UserError for a selector that is malformed, out of range or empty.
    """

    def error(reason: str) -> UserError:
        return UserError(
            f"layers {selector!r}: {reason}; the model has {number_of_layers} layer(s), numbered from 0, "
            f"and a selector is {_SELECTOR_FORMS}"
        )

    chosen: set[int] = set()
    for item in selector if isinstance(selector, Sequence) and not isinstance(selector, str) else [selector]:
        span = _span(item, number_of_layers)
        if span is None:
            raise error(f"{item!r} is not a layer selector")
        if span and (span.start < 0 or span.stop > number_of_layers):
            raise error(f"{item!r} is out of range")
        if not span:
            raise error(f"{item!r} selects no layer")
        chosen.update(span)
    if not chosen:
        raise error("selects no layer")
    return tuple(sorted(chosen))


def hidden_dropouts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every dropout on hidden states: embeddings, residual branches, head.

    Left out are dropouts on attention probabilities and those of adapters (LoRA). The list may be empty:
    Llama, Qwen3 and Mistral have no hidden dropout but that of a token classification head. Dropout that a
    model applies as a function (OPT and BART do) cannot be seen.
    """
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        if not _is_dropout(module) or _in_adapter(path, modules):
            continue
        parent, _, name = path.rpartition(".")
        if path and _owns_query(modules[parent]) and not _NOT_PROBABILITIES.search(name):
            continue
        found.append((path, module))
    return found


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [B, T, D] among the arguments of a layer, as a forward pre-hook receives them."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise UserError(
            "a layer was called without hidden states, neither as its first argument nor as hidden_states="
        )
    return hidden


def replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer with `new` as its hidden states: what a forward pre-hook returns."""
    hidden_argument(args, kwargs)
    if args:
        return (new, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": new}


def first_output(output: Any) -> Tensor:
    """The hidden states in what a layer or sub-block returned: a tensor, or the first entry of a tuple."""
    hidden = (
        output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) and output else None
    )
    if not isinstance(hidden, Tensor):
        raise UserError(f"a module that should return hidden states returned {type(output).__name__}")
    return hidden


def replace_first_output(output: Any, new: Tensor) -> Any:
    """`output` with `new` in place of its hidden states: what a forward hook returns."""
    first_output(output)
    return new if isinstance(output, Tensor) else (new, *output[1:])


def sub_blocks(layer: nn.Module) -> list[nn.Module]:
    """The modules that a layer calls itself, in order."""
    return [part for _, part in _parts(layer)]


def feed_forward_output(layer: nn.Module, hidden_size: int) -> nn.Module | None:
    """The module of `layer` whose output the feed-forward adds to the stream: its last projection to D channels.

    None where the structure does not tell, as in a mixture of experts.
    """
    parts = _parts(layer)
    attention = _attention(parts)
    after = [part for name, part in parts if part is not attention and not _is_norm(name, part)]
    inside = [module for part in after for module in part.modules()]
    adapters = [part for module in inside if _wrapped(module) is not module for part in module.modules()]
    within = {part for part in adapters if _wrapped(part) is part}
    projections = [module for module in inside if module not in within and _out_features(module) is not None]
    if any(isinstance(module, nn.ModuleList) for module in inside) or len(projections) not in (2, 3):
        return None
    return projections[-1] if _out_features(projections[-1]) == hidden_size else None


def _out_features(module: nn.Module) -> int | None:
    """Of a Linear or the Conv1D of GPT-2, adapted or not; None for anything else."""
    own = _wrapped(module)
    return own.out_features if isinstance(own, nn.Linear) else own.nf if isinstance(own, Conv1D) else None


def modules_between(backbone: Backbone) -> list[str]:
    """Names of modules with weights beside the layers, which may act between two of them, as DeBERTa's convolution."""
    owner, _, layers = backbone.layers_path.rpartition(".")
    beside = [part for part in backbone.model.get_submodule(owner).named_children() if part[0] != layers]
    return [
        name
        for name, module in beside
        if _has_weights(module)
        and not name.startswith(EXTRA)
        and not _is_norm(name, module)
        and not any(isinstance(part, nn.Embedding) for part in module.modules())
    ]


def closing_norms(backbone: Backbone) -> dict[int, nn.LayerNorm]:
    """By layer, the LayerNorm whose output the layer returns and the next one reads, in post-norm models like BERT.

    It ends a last sub-block of one Linear that brings the feed-forward's width back to D, this norm and dropouts.
    Empty where a module with weights of its own may act between two layers, as DeBERTa's convolution does.
    """
    if modules_between(backbone):
        return {}
    norms = {i: _closing_norm(layer, backbone.hidden_size) for i, layer in enumerate(backbone.layers)}
    return {i: norm for i, norm in norms.items() if norm is not None}


def opening_norms(backbone: Backbone) -> dict[int, nn.Module]:
    """By layer, the RMSNorm that reads the hidden states entering it, in pre-norm models like Llama.

    It is the first of two and computes x / sqrt(mean(x^2) + variance_epsilon) * weight, which is tried out: Gemma's
    multiplies by 1 + weight.
    """
    found = {}
    for i, layer in enumerate(backbone.layers):
        norms = [(name, part) for name, part in _parts(layer) if _is_norm(name, part)]
        if len(norms) == 2 and not norms[0][0].startswith("post"):
            norm = norms[0][1]
            if _is_plain_rms_norm(norm, backbone.hidden_size):
                found[i] = norm
    return found


def _closing_norm(layer: nn.Module, width: int) -> nn.LayerNorm | None:
    if getattr(layer, "chunk_size_feed_forward", 0):
        # The norm is then called for a few tokens at a time.
        return None
    parts = [_wrapped(part) for part in sub_blocks(layer)[-1].children() if not _is_dropout(part)]
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    norms = [part for part in parts if isinstance(part, nn.LayerNorm)]
    if len(parts) != 2 or len(linears) != 1 or len(norms) != 1:
        return None
    (linear,), (norm,) = linears, norms
    # A norm of D channels can only come behind a Linear that reads another number of them.
    widths = linear.out_features == width != linear.in_features and norm.normalized_shape == (width,)
    affine = norm.weight is not None and norm.bias is not None
    return norm if widths and affine and _runs_its_class(norm, nn.LayerNorm) else None


def _is_plain_rms_norm(norm: nn.Module, width: int) -> bool:
    epsilon = getattr(norm, "variance_epsilon", None)
    if [name for name, _ in norm.named_parameters()] != ["weight"] or not isinstance(epsilon, float):
        return False
    if not _runs_its_class(norm, type(norm)):
        return False
    channels = torch.arange(1, width + 1, dtype=torch.float32, device="cpu")
    hidden, weight = channels.sin().view(1, 1, width), channels.cos()
    expected = weight * hidden * torch.rsqrt(hidden.square().mean() + epsilon)
    try:
        with torch.no_grad():
            # Under ZeRO-3 the norm's own weight may lie in parts on many ranks.
            normed = torch.func.functional_call(norm, {"weight": weight}, (hidden,))
    except (RuntimeError, TypeError):
        return False
    return isinstance(normed, Tensor) and normed.shape == hidden.shape and torch.allclose(normed, expected)


def _runs_its_class(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of `kind`, which nobody has replaced."""
    return "forward" not in vars(module) and type(module).forward is kind.forward


def _find_layers(model: nn.Module) -> str:
    lists = _lists(model)
    found = [path for path, blocks in lists.items() if _are_layers(blocks)]
    # A list of towers also holds attention and feed-forward: the layers are the innermost such list.
    found = [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
    if len(found) == 1:
        return found[0]
    name = type(model).__name__
    if found:
        raise UserError(
            f"{name} has several stacks of layers, name one with layers_path=: {', '.join(found)}"
        )
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    described = [f"{path} ({len(lists[path])} x {type(lists[path][0]).__name__})" for path in outer]
    raise UserError(
        f"no ModuleList of {name} holds blocks of one kind with an attention and a feed-forward each; "
        f"name the layers with layers_path=, one of: {', '.join(described) or 'it has none'}"
    )


def _check_layers(model: nn.Module, path: str) -> str:
    lists = _lists(model)
    if path not in lists:
        raise UserError(
            f"layers_path={path!r} is no filled ModuleList or Sequential of {type(model).__name__}: "
            f"{nearest(path, list(lists)) if lists else 'it has none'}"
        )
    return path


def _lists(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    return {
        path: module
        for path, module in model.named_modules()
        if path and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }


def _are_layers(blocks: nn.ModuleList | nn.Sequential) -> bool:
    return len({type(block) for block in blocks}) == 1 and all(_is_layer(block) for block in blocks)


def _is_layer(block: nn.Module) -> bool:
    parts = _parts(block)
    attention = _attention(parts)
    return attention is not None and any(
        part is not attention and not _is_norm(name, part) and _has_weights(part) for name, part in parts
    )


def _parts(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a layer in order; T5 keeps its sub-blocks in a ModuleList, which is looked through."""
    parts: list[tuple[str, nn.Module]] = []
    for name, child in layer.named_children():
        parts.extend(child.named_children() if isinstance(child, nn.ModuleList) else [(name, child)])
    return parts


def _attention(parts: list[tuple[str, nn.Module]]) -> nn.Module | None:
    return next((part for _, part in parts if any(_owns_query(module) for module in part.modules())), None)


def _owns_query(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or any(
        _QUERY.fullmatch(name) for name, _ in module.named_children()
    )


def _is_norm(name: str, module: nn.Module) -> bool:
    # ModernBERT's first layer has an Identity in place of its first norm.
    placeholder = isinstance(module, nn.Identity) and "norm" in name
    return placeholder or "norm" in type(_wrapped(module)).__name__.lower()


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) or type(module).__name__ == "StableDropout"


def _in_adapter(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a PEFT layer, which keeps what it wraps as `base_layer`, brought the module at `path` along."""
    names = path.split(".")
    return any(
        names[i] != "base_layer" and hasattr(modules[".".join(names[:i])], "base_layer")
        for i in range(len(names))
    )


def _between(layer: nn.Module) -> nn.Module | None:
    parts = _parts(layer)
    names, modules = [name for name, _ in parts], [part for _, part in parts]
    norms = [name for name, part in parts if _is_norm(name, part)]
    attention = _attention(parts)
    if attention is None or any(isinstance(_wrapped(part), nn.Linear) for part in modules):
        # Without a feed-forward module, BART (post-norm) and OPT (pre-norm) look the same.
        return None
    if not norms:
        # The sub-block does its own residual add: BERT, DeBERTa, T5.
        return attention
    if len(norms) != 2 or norms[0].startswith("post"):
        # Parallel branches (Phi), sandwich norms (Gemma 2) or a norm on the branch (OLMo 2).
        return None
    after = modules.index(attention) + 1
    if names[after : after + 1] == norms[:1]:
        # Post-norm with the norm beside the attention: DistilBERT.
        return modules[after]
    # Pre-norm: what the attention returns is added to the residual stream as it is.
    return attention


def _children(base: nn.Module, layers: tuple[nn.Module, ...]) -> tuple[list[tuple[str, nn.Module]], int]:
    """The children of `base`, and the position of the one that holds the layers."""
    children = list(base.named_children())
    return children, next(i for i, (_, child) in enumerate(children) if layers[0] in set(child.modules()))


def _final_norm(base: nn.Module, layers: tuple[nn.Module, ...]) -> nn.Module | None:
    # Only the base's own children count: the norm of DeBERTa's encoder is for its relative positions.
    children, position = _children(base, layers)
    for i, (name, child) in reversed(list(enumerate(children))):
        module = _unwrap(child)
        if _is_norm(name, module) and "emb" not in name and (i > position or name.startswith("final")):
            return module
    return None


def _embedding(
    base: nn.Module, layers: tuple[nn.Module, ...], final_norm: nn.Module | None
) -> nn.Module | None:
    children, position = _children(base, layers)
    holding = [
        i
        for i, (_, child) in enumerate(children[:position])
        if any(isinstance(module, nn.Embedding) for module in child.modules())
    ]
    if not holding:
        return None
    # A projection, norm or dropout after the tables is the last to touch h^0: ELECTRA, BLOOM, GPT-2.
    for name, child in reversed(children[holding[-1] + 1 : position]):
        if _unwrap(child) is not final_norm and (
            isinstance(_wrapped(child), nn.Linear) or _is_dropout(child) or _is_norm(name, child)
        ):
            return child
    # Several bare tables are added up by code: no module returns the sum.
    return _unwrap(children[holding[0]][1]) if len(holding) == 1 else None


def _head(owners: Sequence[nn.Module]) -> nn.Module | None:
    """The last registered module with weights beside the base, looked for from the base outwards."""
    for inner, owner in zip(owners[::-1], owners[-2::-1]):
        beside = [
            _unwrap(child)
            for name, child in owner.named_children()
            if not name.startswith(EXTRA) and inner not in set(child.modules())
        ]
        heads = [
            child
            for child in beside
            if _has_weights(child) and not isinstance(child, (nn.Embedding, PreTrainedModel))
        ]
        if heads:
            return heads[-1]
    return None


def _unwrap(module: nn.Module) -> nn.Module:
    """The copy that PEFT trains and runs, where `modules_to_save` wrapped `module`."""
    copies = getattr(module, "modules_to_save", None)
    active = getattr(module, "active_adapters", None)
    return copies[active[0]] if isinstance(copies, nn.ModuleDict) and active else module


def _wrapped(module: nn.Module) -> nn.Module:
    """What a PEFT layer such as LoRA's Linear was put around; any other module itself."""
    return getattr(module, "base_layer", module)


def _hidden_size(base: nn.Module, embedding: nn.Module | None) -> int:
    width = getattr(embedding, "embedding_dim", None)
    size = getattr(getattr(base, "config", None), "hidden_size", width)
    if size is None:
        raise UserError(f"{type(base).__name__} has neither config.hidden_size nor a bare embedding table")
    return int(size)


def _span(item: str | int, number_of_layers: int) -> range | None:
    """The layers that one entry of a selector names, unchecked; None when it is malformed."""
    text = str(item).strip() if isinstance(item, (str, int)) and not isinstance(item, bool) else ""
    if text == "all":
        return range(number_of_layers)
    if re.fullmatch(r"-?\d+", text):
        first = int(text) + (number_of_layers if int(text) < 0 else 0)
        return range(first, first + 1)
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        return range(int(match[1]), int(match[2]) + 1)
    if match := re.fullmatch(r"(first|last):(\d+)", text):
        count = int(match[2])
        return range(count) if match[1] == "first" else range(number_of_layers - count, number_of_layers)
    return None
