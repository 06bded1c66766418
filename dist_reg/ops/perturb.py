"""Noise added to a stream of hidden states: `dist_reg_kernels.perturb`."""

from typing import Any

import torch
from torch import Tensor

from dist_reg.ops.backend import implementation, nobody_watches
from dist_reg.ops.checks import check_keys, check_noise, check_spans, check_stream, signed_seed


def perturb(
    hidden_states: Tensor,
    *,
    sigma: float,
    seed: int,
    example_keys: Tensor,
    site: int,
    spans: Tensor | None = None,
    distribution: str = "normal",
    scale: str = "absolute",
) -> Tensor:
    """hidden_states + s * eps, with eps a function of (seed, example key, site, token, channel) alone.

    `hidden_states` [B, T, D] is fp32, bf16, fp16 or fp64, any strides; the result is contiguous, of the same
    dtype. `seed` is a 64-bit integer, `site` a 32-bit one (`noise.site_id`). `example_keys` is int64 [B]
    (`noise.example_keys`). `spans` int32 or int64 [B, 2] holds the first real token and one past the last; tokens
    outside are copied, and None means all. `distribution` at unit sigma is "normal" N(0, 1), "uniform" U(-1, 1)
    or "uniform_released" U(0, 1), the form in HyPe's released code. `scale` "absolute" makes s = sigma,
    "relative" makes it sigma times the token's root mean square over D. The gradient is the identity.

    Raises ValueError, naming the argument, for a wrong shape, dtype, device or option.
    """
    check_stream("hidden_states", hidden_states)
    check_keys(example_keys, hidden_states.shape[0], hidden_states)
    check_spans(spans, hidden_states.shape[0], hidden_states)
    check_noise(sigma, distribution, scale)
    options = (example_keys, spans, signed_seed(seed), site, sigma, distribution, scale == "relative")
    if nobody_watches(hidden_states):
        return _Perturb.apply(hidden_states, *options)
    return _perturb(hidden_states, *options)


class _Perturb(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *options: Any) -> Tensor:
        return implementation("perturb", "perturb", hidden)(hidden, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _identity_gradient(ctx, *gradients)


@torch.library.custom_op("dist_reg::perturb", mutates_args=())
def _perturb(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    function = implementation("perturb", "perturb", hidden)
    return function(hidden, keys, spans, seed, site, sigma, distribution, relative)


@_perturb.register_fake
def _(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _identity_gradient(_context: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None, None, None, None


_perturb.register_autograd(_identity_gradient)
