"""perturb_stability.py's operation on the CPU: one compiled pass over the rows of both halves.

The noise of a row is made once, into a buffer of one row that stays in the first cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_reg_kernels import philox
from dist_reg_kernels.perturb_cpu import add_noise, noise_arguments
from dist_reg_kernels.philox_cpu import draw, noise_buffers
from dist_reg_kernels.rows_cpu import as_rows, compiled, for_rows, is_real, root_mean_square
from dist_reg_kernels.stability_cpu import squared_distance


@compiled
def _perturb_and_compare(
    begin,
    end,
    twin,
    out,
    distance,
    keys,
    spans,
    tokens,
    seed_low,
    seed_high,
    site,
    sigma,
    distribution,
    relative,
):
    half, channels = distance.size, twin.shape[1]
    buffers = noise_buffers(channels)
    zero = sigma - sigma
    for r in range(begin, end):
        clean, noisy = twin[r], twin[half + r]
        if not is_real(r, spans, tokens):
            distance[r] = zero
            for i in range(channels):
                out[r, i] = clean[i]
                out[half + r, i] = noisy[i]
            continue
        distance[r] = squared_distance(clean, noisy, zero)
        noise = draw(buffers, channels, r, keys, spans, tokens, seed_low, seed_high, site, distribution)
        add_noise(clean, out[r], noise, sigma * root_mean_square(clean, zero) if relative else sigma)
        add_noise(noisy, out[half + r], noise, sigma * root_mean_square(noisy, zero) if relative else sigma)


def perturb_stability_cpu(
    twin: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> tuple[Tensor, Tensor]:
    """The operation on CPU tensors; the arguments of `perturb_stability.perturb_stability_torch`."""
    if twin.dtype == torch.float16:
        out, distance = perturb_stability_cpu(
            twin.float(), keys, spans, seed, site, sigma, distribution, relative
        )
        return out.to(torch.float16), distance
    double, tokens, channels = twin.shape
    out = torch.empty(twin.shape, dtype=twin.dtype)
    dtype = torch.float64 if twin.dtype == torch.float64 else torch.float32
    distance = torch.zeros(double // 2, tokens, dtype=dtype)
    if out.numel() == 0:
        return out, distance
    arguments = (
        as_rows(twin),
        as_rows(out),
        distance.numpy().reshape(-1),
        *noise_arguments(keys, spans, tokens, seed, site, sigma, twin.dtype),
        philox.DISTRIBUTIONS.index(distribution),
        relative,
    )
    for_rows(_perturb_and_compare, distance.numel(), 2 * channels, arguments)
    return out, distance
