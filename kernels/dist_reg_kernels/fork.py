"""twin = [hidden ; hidden + s * eps]: one stream becomes two, the clean half first, the perturbed half behind it.

hidden [B, T, D], any strides; twin [2B, T, D], contiguous, same dtype. The noise and its options are those of
perturb.py, to the bit. One pass reads N elements and writes 2N, where copying, perturbing and concatenating
would read 3N and write 4N.

Backward: the sum of the two halves of the gradient, rounded once; reads 2N, writes N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_reg_kernels.perturb import launch, perturb_torch, triton

__all__ = ["fork_torch", "fork_triton", "triton"]


def fork_torch(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    """The reference and fallback in plain torch, on any device and floating dtype."""
    noisy = perturb_torch(hidden, keys, spans, seed, site, sigma, distribution, relative)
    return torch.cat((hidden, noisy))


def fork_triton(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    """Launch perturb.py's kernel with both halves to write."""
    return launch(hidden, keys, spans, seed, site, sigma, distribution, relative, fork=True)
