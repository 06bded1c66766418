"""Random autoencoders on the tokens of a batch: `dist_reg_kernels.bottleneck`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_reg.errors import UserError, nearest
from dist_reg.ops.backend import backend_of, implementation, nobody_watches
from dist_reg.ops.checks import check_device, check_dtype, check_spans, check_stream, signed_seed

RECONSTRUCT = ("all", "sampled", "none")
TENSORS_A_VIEW = 8


def bottleneck(
    hidden_states: Tensor,
    weights: Sequence[Tensor],
    *,
    views: Tensor,
    inner: Tensor,
    token_keys: Tensor,
    seed: int,
    site: int,
    spans: Tensor | None = None,
    dropout: float = 0.0,
    reconstruct: str = "sampled",
) -> tuple[Tensor, Tensor]:
    """Each token through the autoencoder of its view, and how far that is from the token.

    `hidden_states` [B, T, D] is fp32, bf16, fp16 or fp64. `weights` holds eight tensors an autoencoder: encoder
    [d, D] and bias [d], K inner encoders [K, h, d] and biases [K, h], K inner decoders [K, d, h] and biases [K, d],
    decoder [D, d] and bias [D]; products are taken in their dtype. `views` int64 [B, T] is 0 to M, M for the token as
    it is; `inner` int64 [B, T, M] is 0 to K, K for no inner one. `token_keys` int64 [B, T] makes a token's dropout.
    Tokens outside `spans` int [B, 2] are left as they are. Values out of range are undefined.

    Returns (out [B, T, D], error fp32 [B, T]): the mean over D of the squared difference, of the token's own view
    (`reconstruct` "sampled"; 0 where it takes none), the mean over all views ("all"), or 0 ("none"). The error's
    gradient goes to the weights alone, the other one to hidden states and weights.

    Raises ValueError, naming the argument, for a wrong shape, dtype, device or option.
    """
    check_stream("hidden_states", hidden_states)
    check_spans(spans, hidden_states.shape[0], hidden_states)
    check_weights(weights, hidden_states)
    places = hidden_states.shape[:2]
    number = len(weights) // TENSORS_A_VIEW
    for name, tensor, shape in (
        ("views", views, places),
        ("inner", inner, (*places, number)),
        ("token_keys", token_keys, places),
    ):
        if tensor.dtype != torch.int64 or tensor.shape != shape:
            raise UserError(f"{name} must be int64 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        check_device(name, tensor, hidden_states)
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be at least 0 and below 1, got {dropout}")
    if reconstruct not in RECONSTRUCT:
        raise UserError(f"unknown reconstruct {reconstruct!r}: {nearest(reconstruct, RECONSTRUCT)}")
    options = (signed_seed(seed), site, float(dropout), reconstruct)
    if torch.is_grad_enabled() and nobody_watches(hidden_states) and backend_of(hidden_states) == "cpu":
        return _Keeping.apply(hidden_states, views, inner, token_keys, spans, options, *weights)
    return _bottleneck(hidden_states, list(weights), views, inner, token_keys, spans, *options)


class _Keeping(torch.autograd.Function):
    """The operation on the CPU, whose backward reads what the forward computed on the way.

    It is saved as any operation saves what it needs, so activation checkpointing lets go of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        views: Tensor,
        inner: Tensor,
        keys: Tensor,
        spans: Tensor | None,
        options: tuple[Any, ...],
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        function = implementation("bottleneck_keeping", "keeping", hidden)
        out, error, tensors, ctx.plan = function(hidden, weights, views, inner, keys, spans, *options)
        ctx.reconstruct, ctx.count = options[-1], len(weights)
        ctx.save_for_backward(hidden, *weights, *tensors)
        return out, error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:  # pyrefly: ignore[bad-override]
        gradient, error_gradient = grad_outputs
        hidden, *rest = ctx.saved_tensors
        weights, tensors = rest[: ctx.count], rest[ctx.count :]
        function = implementation("bottleneck_keeping", "kept_backward", hidden)
        found, gradients = function(
            gradient, error_gradient, hidden, weights, tensors, ctx.plan, ctx.reconstruct
        )
        return found, None, None, None, None, None, *gradients


def check_weights(weights: Sequence[Tensor], stream: Tensor) -> None:
    """Eight tensors an autoencoder of at least one, of fitting shapes and one dtype."""
    if not weights or len(weights) % TENSORS_A_VIEW:
        raise UserError(f"weights must be {TENSORS_A_VIEW} tensors an autoencoder, got {len(weights)}")
    channels, choices = stream.shape[2], weights[2].shape[0]
    for i in range(0, len(weights), TENSORS_A_VIEW):
        own = weights[i : i + TENSORS_A_VIEW]
        width, narrow = own[0].shape[0], own[2].shape[1] if own[2].ndim == 3 else 0
        shapes = (
            (width, channels),
            (width,),
            (choices, narrow, width),
            (choices, narrow),
            (choices, width, narrow),
            (choices, width),
            (channels, width),
            (channels,),
        )
        for j, (tensor, shape) in enumerate(zip(own, shapes)):
            name = f"weights[{i + j}]"
            if tensor.shape != shape or tensor.dtype != weights[0].dtype:
                raise UserError(
                    f"{name} must be {weights[0].dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
                )
            check_dtype(name, tensor)
            check_device(name, tensor, stream)


@torch.library.custom_op("dist_reg::bottleneck", mutates_args=())
def _bottleneck(
    hidden: Tensor,
    weights: list[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
) -> tuple[Tensor, Tensor]:
    function = implementation("bottleneck", "bottleneck", hidden)
    return function(hidden, weights, views, inner, keys, spans, seed, site, dropout, reconstruct)


@_bottleneck.register_fake
def _(
    hidden: Tensor,
    weights: list[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[:2], dtype=torch.float32)


@torch.library.custom_op("dist_reg::bottleneck_backward", mutates_args=())
def _bottleneck_backward(
    gradient: Tensor,
    error_gradient: Tensor,
    hidden: Tensor,
    weights: list[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
) -> tuple[Tensor, list[Tensor]]:
    function = implementation("bottleneck", "bottleneck_backward", hidden)
    options = (seed, site, dropout, reconstruct)
    return function(gradient, error_gradient, hidden, weights, views, inner, keys, spans, *options)


@_bottleneck_backward.register_fake
def _(
    gradient: Tensor,
    error_gradient: Tensor,
    hidden: Tensor,
    weights: list[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
) -> tuple[Tensor, list[Tensor]]:
    return hidden.new_empty(hidden.shape), [tensor.new_empty(tensor.shape) for tensor in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weights, views, inner, keys, spans, *ctx.options = inputs
    ctx.save_for_backward(hidden, views, inner, keys, spans, *weights)


def _gradients(ctx: Any, gradient: Tensor, error_gradient: Tensor) -> tuple[Any, ...]:
    hidden, views, inner, keys, spans, *weights = ctx.saved_tensors
    places = (views, inner, keys, spans)
    found = _bottleneck_backward(gradient, error_gradient, hidden, weights, *places, *ctx.options)
    return (*found, *[None] * 8)


_bottleneck.register_autograd(_gradients, setup_context=_save)
