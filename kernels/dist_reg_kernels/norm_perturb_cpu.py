"""norm_perturb.py's operations on the CPU: one compiled pass over the rows, split over threads.

A row is summed and normed in a buffer that stays in the first cache, and takes its noise on the way out, so memory is
read and written once, and rounded once, as on a GPU. fp32, fp64 and bf16 are read as they lie; fp16 goes through fp32
copies.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from dist_reg_kernels import philox
from dist_reg_kernels.norm_perturb import rms_norm_torch, wide_sum
from dist_reg_kernels.perturb_cpu import add_noise, noise_arguments, perturb_cpu
from dist_reg_kernels.philox_cpu import draw, noise_buffers
from dist_reg_kernels.rows_cpu import (
    as_rows,
    compiled,
    for_rows,
    is_real,
    root_mean_square,
    sqrt,
    store,
    wide,
)


@numba.njit
def load_sum(buffer, hidden, residual, r):
    """Row `r` of hidden + residual (or no rows of it), in the buffer's dtype."""
    row = hidden[r]
    if residual.shape[0] == 0:
        for i in range(row.size):
            buffer[i] = wide(row, i)
    else:
        other = residual[r]
        for i in range(row.size):
            buffer[i] = wide(row, i) + wide(other, i)


@numba.njit(fastmath={"reassoc"})
def _mean(row, zero):
    total = zero
    for i in range(row.size):
        total += wide(row, i)
    return total / (zero + row.size)


@numba.njit(fastmath={"reassoc"})
def _variance(row, mean, zero):
    total = zero
    for i in range(row.size):
        deviation = wide(row, i) - mean
        total += deviation * deviation
    return total / (zero + row.size)


@numba.njit
def _add_noise(
    row, out, buffers, r, keys, spans, tokens, seed_low, seed_high, site, sigma, distribution, relative
):
    """Write a row of the buffer's dtype with its noise to `out`, rounded to the dtype of that."""
    if sigma == 0 or not is_real(r, spans, tokens):
        for i in range(row.size):
            store(out, i, row[i])
        return
    noise = draw(buffers, row.size, r, keys, spans, tokens, seed_low, seed_high, site, distribution)
    add_noise(row, out, noise, sigma * root_mean_square(row, sigma - sigma) if relative else sigma)


@compiled
def _layer_norm_rows(
    begin,
    end,
    hidden,
    residual,
    weight,
    bias,
    out,
    mean,
    rstd,
    epsilon,
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
    buffer, noise = np.empty_like(weight), noise_buffers(weight.size)
    zero = epsilon - epsilon
    for r in range(begin, end):
        load_sum(buffer, hidden, residual, r)
        mean[r] = _mean(buffer, zero)
        centre = mean[r]
        rstd[r] = 1 / sqrt(_variance(buffer, centre, zero) + epsilon)
        scale = rstd[r]
        for i in range(buffer.size):
            buffer[i] = (buffer[i] - centre) * scale * weight[i] + bias[i]
        _add_noise(
            buffer,
            out[r],
            noise,
            r,
            keys,
            spans,
            tokens,
            seed_low,
            seed_high,
            site,
            sigma,
            distribution,
            relative,
        )


@compiled
def _rms_norm_rows(
    begin,
    end,
    hidden,
    residual,
    weight,
    stream,
    normed,
    rstd,
    epsilon,
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
    buffer, noise = np.empty_like(weight), noise_buffers(weight.size)
    zero = epsilon - epsilon
    for r in range(begin, end):
        load_sum(buffer, hidden, residual, r)
        x, out = stream[r], normed[r]
        _add_noise(
            buffer, x, noise, r, keys, spans, tokens, seed_low, seed_high, site, sigma, distribution, relative
        )
        scale = 1 / sqrt(_variance(x, zero, zero) + epsilon)
        rstd[r] = scale
        for i in range(x.size):
            store(out, i, wide(x, i) * scale)
        for i in range(x.size):
            store(out, i, wide(out, i) * weight[i])


def layer_norm_perturb_cpu(
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
    """The operation on CPU tensors; the arguments of `norm_perturb.layer_norm_perturb_torch`."""
    if hidden.dtype == torch.float16:
        options = (weight, bias, keys, spans, seed, site, sigma, epsilon, distribution, relative)
        out, mean, rstd = layer_norm_perturb_cpu(wide_sum(hidden, residual), None, *options)
        return out.to(torch.float16), mean, rstd
    out = torch.empty(hidden.shape, dtype=hidden.dtype)
    mean, rstd = statistic(hidden), statistic(hidden)
    if out.numel() == 0:
        return out, mean, rstd
    rows = as_rows(out)
    arguments = (
        as_rows(hidden),
        residual_rows(hidden, residual),
        as_vector(weight, mean),
        as_vector(bias, mean),
        rows,
        mean.numpy(),
        rstd.numpy(),
        mean.numpy().dtype.type(epsilon),
        *noise_arguments(keys, spans, hidden.shape[1], seed, site, sigma, hidden.dtype),
        philox.DISTRIBUTIONS.index(distribution),
        relative,
    )
    for_rows(_layer_norm_rows, *rows.shape, arguments)
    return out, mean, rstd


def perturb_rms_norm_cpu(
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
    """The operation on CPU tensors; the arguments of `norm_perturb.perturb_rms_norm_torch`."""
    if hidden.dtype == torch.float16:
        wide = wide_sum(hidden, residual)
        stream = perturb_cpu(wide, keys, spans, seed, site, sigma, distribution, relative).to(torch.float16)
        return stream, *rms_norm_torch(stream, weight, epsilon)
    stream, normed = (torch.empty(hidden.shape, dtype=hidden.dtype) for _ in range(2))
    rstd = statistic(hidden)
    if stream.numel() == 0:
        return stream, normed, rstd
    rows = as_rows(stream)
    arguments = (
        as_rows(hidden),
        residual_rows(hidden, residual),
        as_vector(weight, rstd),
        rows,
        as_rows(normed),
        rstd.numpy(),
        rstd.numpy().dtype.type(epsilon),
        *noise_arguments(keys, spans, hidden.shape[1], seed, site, sigma, hidden.dtype),
        philox.DISTRIBUTIONS.index(distribution),
        relative,
    )
    for_rows(_rms_norm_rows, *rows.shape, arguments)
    return stream, normed, rstd


def statistic(hidden: Tensor) -> Tensor:
    """An empty number a row, in the dtype the sums are taken in."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return torch.empty(hidden.shape[0] * hidden.shape[1], dtype=dtype)


def residual_rows(hidden: Tensor, residual: Tensor | None) -> np.ndarray:
    """The rows of `residual`, or no rows where it is None."""
    return as_rows(hidden)[:0] if residual is None else as_rows(residual)


def as_vector(tensor: Tensor, like: Tensor) -> np.ndarray:
    """A tensor [D] as a contiguous NumPy array of the dtype of `like`."""
    return tensor.detach().to(like.dtype).contiguous().numpy()
