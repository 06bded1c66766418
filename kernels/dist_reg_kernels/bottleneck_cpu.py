"""bottleneck.py's operation on the CPU: its grouped products, with dropout drawn in the compiled loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_reg_kernels.bottleneck import backward, forward
from dist_reg_kernels.perturb_cpu import perturb_cpu


def bottleneck_cpu(
    hidden: Tensor,
    weights: Sequence[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
) -> tuple[Tensor, Tensor]:
    """The forward operation of bottleneck.py on CPU tensors; the arguments of `bottleneck.bottleneck_torch`."""
    return forward(hidden, weights, views, inner, keys, spans, seed, site, dropout, reconstruct, uniform_cpu)


def bottleneck_backward_cpu(
    gradient: Tensor,
    error_gradient: Tensor,
    hidden: Tensor,
    weights: Sequence[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
) -> tuple[Tensor, list[Tensor]]:
    """The backward operation on CPU tensors; the arguments of `bottleneck.bottleneck_backward_torch`."""
    options = (seed, site, dropout, reconstruct, uniform_cpu)
    return backward(gradient, error_gradient, hidden, weights, views, inner, keys, spans, *options)


def uniform_cpu(keys: Tensor, channels: int, seed: int, site: int) -> Tensor:
    zeros = torch.zeros(keys.shape[0], 1, channels)
    return perturb_cpu(zeros, keys, None, seed, site, 1.0, "uniform", relative=False)[:, 0]
