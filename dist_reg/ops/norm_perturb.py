"""A block's norm and the noise in one pass: `dist_reg_kernels.norm_perturb` and `dist_reg_kernels.norm_backward`."""

from typing import Any

import torch
from torch import Tensor

from dist_reg.ops.backend import implementation
from dist_reg.ops.checks import (
    check_channels,
    check_epsilon,
    check_keys,
    check_like,
    check_noise,
    check_spans,
    check_stream,
    signed_seed,
)


def layer_norm_perturb(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    epsilon: float,
    sigma: float,
    seed: int,
    example_keys: Tensor,
    site: int,
    spans: Tensor | None = None,
    distribution: str = "normal",
    scale: str = "absolute",
) -> Tensor:
    """`perturb` of LayerNorm(hidden_states + residual) * weight + bias, in one pass, rounded once.

    `hidden_states` and `residual` [B, T, D] are fp32, bf16, fp16 or fp64, one dtype, any strides; the result is
    contiguous, of that dtype. `weight` and `bias` [D] may be of another floating dtype, and their gradients are of
    theirs. `epsilon` is the norm's. The other options are those of `perturb`, and the noise is the same: the relative
    scale is of the normed token's root mean square, and tokens outside `spans` are normed all the same. The gradient
    is the norm's.

    Raises ValueError, naming the argument, for a wrong shape, dtype, device or option.
    """
    _check(hidden_states, residual, example_keys, spans, epsilon, sigma, distribution, scale)
    check_channels("weight", weight, hidden_states)
    check_channels("bias", bias, hidden_states)
    out, _, _ = _layer_norm_perturb(
        hidden_states,
        residual,
        weight,
        bias,
        example_keys,
        spans,
        signed_seed(seed),
        site,
        sigma,
        epsilon,
        distribution,
        scale == "relative",
    )
    return out


def perturb_rms_norm(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    epsilon: float,
    sigma: float,
    seed: int,
    example_keys: Tensor,
    site: int,
    spans: Tensor | None = None,
    distribution: str = "normal",
    scale: str = "absolute",
) -> tuple[Tensor, Tensor]:
    """`perturb` of hidden_states + residual, and the RMSNorm of the result, in one pass: (stream, normed).

    The arguments are those of `layer_norm_perturb`, without a bias; the relative scale is of the token's root mean
    square before the norm. Both results are contiguous, of the dtype of `hidden_states`. The norm is taken of the rounded
    stream, as Transformers' Llama does: in fp32, rounded, then times `weight`.

    Raises ValueError, naming the argument, for a wrong shape, dtype, device or option.
    """
    _check(hidden_states, residual, example_keys, spans, epsilon, sigma, distribution, scale)
    check_channels("weight", weight, hidden_states)
    stream, normed, _ = _perturb_rms_norm(
        hidden_states,
        residual,
        weight,
        example_keys,
        spans,
        signed_seed(seed),
        site,
        sigma,
        epsilon,
        distribution,
        scale == "relative",
    )
    return stream, normed


def _check(
    hidden_states: Tensor,
    residual: Tensor | None,
    example_keys: Tensor,
    spans: Tensor | None,
    epsilon: float,
    sigma: float,
    distribution: str,
    scale: str,
) -> None:
    check_stream("hidden_states", hidden_states)
    if residual is not None:
        check_like("residual", residual, hidden_states)
    check_keys(example_keys, hidden_states.shape[0], hidden_states)
    check_spans(spans, hidden_states.shape[0], hidden_states)
    check_epsilon(epsilon)
    check_noise(sigma, distribution, scale)


@torch.library.custom_op("dist_reg::layer_norm_perturb", mutates_args=())
def _layer_norm_perturb(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    epsilon: float,
    distribution: str,
    relative: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    function = implementation("norm_perturb", "layer_norm_perturb", hidden)
    return function(
        hidden, residual, weight, bias, keys, spans, seed, site, sigma, epsilon, distribution, relative
    )


@_layer_norm_perturb.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), _empty_statistic(hidden), _empty_statistic(hidden)


@torch.library.custom_op("dist_reg::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    function = implementation("norm_backward", "layer_norm_backward", hidden)
    return function(hidden, residual, weight, mean, rstd, gradient, with_weight)


@_layer_norm_backward.register_fake
def _(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape),
        _empty_sum(rstd, weight, with_weight),
        _empty_sum(rstd, weight, with_weight),
    )


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, residual, weight, bias, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(hidden, residual, weight, mean, rstd)
    ctx.bias_dtype = bias.dtype


def _layer_norm_gradient(ctx: Any, gradient: Tensor, *_statistics: Tensor) -> tuple[Tensor | None, ...]:
    hidden, residual, weight, mean, rstd = ctx.saved_tensors
    _, needs_residual, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    pull, weight_sum, bias_sum = _layer_norm_backward(
        hidden, residual, weight, mean, rstd, gradient, needs_weight or needs_bias
    )
    return (
        pull,
        pull if needs_residual else None,
        weight_sum.to(weight.dtype) if needs_weight else None,
        bias_sum.to(ctx.bias_dtype) if needs_bias else None,
        *[None] * 8,
    )


_layer_norm_perturb.register_autograd(_layer_norm_gradient, setup_context=_save_layer_norm)


@torch.library.custom_op("dist_reg::perturb_rms_norm", mutates_args=())
def _perturb_rms_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    epsilon: float,
    distribution: str,
    relative: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    function = implementation("norm_perturb", "perturb_rms_norm", hidden)
    return function(hidden, residual, weight, keys, spans, seed, site, sigma, epsilon, distribution, relative)


@_perturb_rms_norm.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape), _empty_statistic(hidden)


@torch.library.custom_op("dist_reg::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    stream: Tensor,
    weight: Tensor,
    rstd: Tensor,
    stream_gradient: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    function = implementation("norm_backward", "rms_norm_backward", stream)
    return function(stream, weight, rstd, stream_gradient, gradient, with_weight)


@_rms_norm_backward.register_fake
def _(
    stream: Tensor,
    weight: Tensor,
    rstd: Tensor,
    stream_gradient: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    return stream.new_empty(stream.shape), _empty_sum(rstd, weight, with_weight)


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    stream, _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(stream, inputs[2], rstd)


def _rms_norm_gradient(
    ctx: Any, stream_gradient: Tensor, gradient: Tensor, *_statistic: Tensor
) -> tuple[Tensor | None, ...]:
    stream, weight, rstd = ctx.saved_tensors
    _, needs_residual, needs_weight, *_ = ctx.needs_input_grad
    pull, weight_sum = _rms_norm_backward(stream, weight, rstd, stream_gradient, gradient, needs_weight)
    return (
        pull,
        pull if needs_residual else None,
        weight_sum.to(weight.dtype) if needs_weight else None,
        *[None] * 8,
    )


_perturb_rms_norm.register_autograd(_rms_norm_gradient, setup_context=_save_rms_norm)


def _empty_statistic(hidden: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(hidden.shape[0] * hidden.shape[1], dtype=dtype)


def _empty_sum(statistic: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    return statistic.new_empty(weight.shape[0] if wanted else 0)
