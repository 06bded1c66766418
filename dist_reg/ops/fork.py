"""One stream of hidden states becomes two: `dist_reg_kernels.fork`."""

import torch
from torch import Tensor

from dist_reg.ops.backend import implementation
from dist_reg.ops.checks import check_keys, check_noise, check_spans, check_stream, signed_seed


def fork(
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
    """The twin stream [2B, T, D] of `hidden_states` [B, T, D]: the clean half, and behind it the perturbed one.

    The second half is `perturb` of the same arguments, bit for bit. The gradient is the sum of the two halves'.
    Raises ValueError, naming the argument, for a wrong shape, dtype, device or option.
    """
    check_stream("hidden_states", hidden_states)
    check_keys(example_keys, hidden_states.shape[0], hidden_states)
    check_spans(spans, hidden_states.shape[0], hidden_states)
    check_noise(sigma, distribution, scale)
    return _fork(
        hidden_states,
        example_keys,
        spans,
        signed_seed(seed),
        site,
        sigma,
        distribution,
        scale == "relative",
    )


@torch.library.custom_op("dist_reg::fork", mutates_args=())
def _fork(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    function = implementation("fork", "fork", hidden)
    return function(hidden, keys, spans, seed, site, sigma, distribution, relative)


@_fork.register_fake
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
    return hidden.new_empty(2 * hidden.shape[0], *hidden.shape[1:])


def _sum_of_halves(_context: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
    clean, noisy = gradient.chunk(2)
    return clean + noisy, None, None, None, None, None, None, None


_fork.register_autograd(_sum_of_halves)
