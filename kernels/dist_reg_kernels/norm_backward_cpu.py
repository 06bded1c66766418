"""norm_backward.py's operations on the CPU: one compiled pass over groups of rows, split over threads.

The groups are the same for every number of threads, and so are the sums; torch's own layer norm sums by thread, and
would need hidden + residual written out first. fp32, fp64 and bf16 are read as they lie; fp16 goes through fp32 copies.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from dist_reg_kernels.norm_perturb import wide_sum
from dist_reg_kernels.norm_perturb_cpu import as_vector, residual_rows
from dist_reg_kernels.rows_cpu import as_rows, compiled, for_rows, store, wide

GROUPS = 32


@numba.njit
def _normalise(x, hidden, residual, r, mean, rstd):
    """The normalised row `r` of hidden + residual (or no rows of it), in the dtype of x."""
    row = hidden[r]
    if residual.shape[0] == 0:
        for i in range(x.size):
            x[i] = (wide(row, i) - mean) * rstd
    else:
        other = residual[r]
        for i in range(x.size):
            x[i] = (wide(row, i) + wide(other, i) - mean) * rstd


@numba.njit
def _load(g, row):
    for i in range(g.size):
        g[i] = wide(row, i)


@numba.njit(fastmath={"reassoc", "contract"})
def _means(x, g, weight, zero):
    """(mean of g * weight, mean of g * weight * x) of a row."""
    plain, products, size = zero, zero, x.dtype.type(x.size)
    for i in range(x.size):
        weighted = g[i] * weight[i]
        plain += weighted
        products += weighted * x[i]
    return plain / size, products / size


@numba.njit
def _store_pull(out, x, g, weight, rstd, level, along):
    for i in range(out.size):
        store(out, i, rstd * (g[i] * weight[i] - level - x[i] * along))


@numba.njit
def _store_sum_with_pull(out, stream_gradient, x, g, weight, rstd, along):
    for i in range(out.size):
        store(out, i, wide(stream_gradient, i) + rstd * (g[i] * weight[i] - x[i] * along))


@numba.njit
def _add_product(total, x, g):
    for i in range(total.size):
        total[i] += x[i] * g[i]


@numba.njit
def _add(total, g):
    for i in range(total.size):
        total[i] += g[i]


@compiled
def _layer_norm_groups(
    begin, end, hidden, residual, weight, mean, rstd, gradient, out, weight_sums, bias_sums, with_weight
):
    x, g, zero = np.empty_like(weight), np.empty_like(weight), weight.dtype.type(0)
    rows, groups = out.shape[0], weight_sums.shape[0]
    for group in range(begin, end):
        for r in range(rows * group // groups, rows * (group + 1) // groups):
            _normalise(x, hidden, residual, r, mean[r], rstd[r])
            _load(g, gradient[r])
            level, along = _means(x, g, weight, zero)
            _store_pull(out[r], x, g, weight, rstd[r], level, along)
            if with_weight:
                _add_product(weight_sums[group], x, g)
                _add(bias_sums[group], g)


@compiled
def _rms_norm_groups(
    begin, end, stream, weight, rstd, stream_gradient, gradient, out, weight_sums, with_weight
):
    x, g, zero = np.empty_like(weight), np.empty_like(weight), weight.dtype.type(0)
    rows, groups = out.shape[0], weight_sums.shape[0]
    for group in range(begin, end):
        for r in range(rows * group // groups, rows * (group + 1) // groups):
            _normalise(x, stream, stream[:0], r, zero, rstd[r])
            _load(g, gradient[r])
            _, along = _means(x, g, weight, zero)
            _store_sum_with_pull(out[r], stream_gradient[r], x, g, weight, rstd[r], along)
            if with_weight:
                _add_product(weight_sums[group], x, g)


def layer_norm_backward_cpu(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation on CPU tensors; the arguments of `norm_backward.layer_norm_backward_torch`."""
    if hidden.dtype == torch.float16:
        wide = (wide_sum(hidden, residual), None, weight, mean, rstd, gradient.float(), with_weight)
        out, *sums = layer_norm_backward_cpu(*wide)
        return out.to(torch.float16), *sums
    out, weight_sums = torch.empty(hidden.shape, dtype=hidden.dtype), _sums(mean, weight)
    bias_sums = torch.zeros_like(weight_sums)
    arguments = (
        as_rows(hidden),
        residual_rows(hidden, residual),
        as_vector(weight, mean),
        mean.numpy(),
        rstd.numpy(),
        as_rows(gradient),
        as_rows(out),
        weight_sums.numpy(),
        bias_sums.numpy(),
        with_weight,
    )
    for_rows(_layer_norm_groups, len(weight_sums), out.numel() // max(len(weight_sums), 1), arguments)
    return out, _total(weight_sums, with_weight), _total(bias_sums, with_weight)


def rms_norm_backward_cpu(
    stream: Tensor,
    weight: Tensor,
    rstd: Tensor,
    stream_gradient: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The operation on CPU tensors; the arguments of `norm_backward.rms_norm_backward_torch`."""
    if stream.dtype == torch.float16:
        gradients = (stream_gradient.float(), gradient.float())
        out, sums = rms_norm_backward_cpu(stream.float(), weight, rstd, *gradients, with_weight)
        return out.to(torch.float16), sums
    out, weight_sums = torch.empty(stream.shape, dtype=stream.dtype), _sums(rstd, weight)
    arguments = (
        as_rows(stream),
        as_vector(weight, rstd),
        rstd.numpy(),
        as_rows(stream_gradient),
        as_rows(gradient),
        as_rows(out),
        weight_sums.numpy(),
        with_weight,
    )
    for_rows(_rms_norm_groups, len(weight_sums), out.numel() // max(len(weight_sums), 1), arguments)
    return out, _total(weight_sums, with_weight)


def _sums(statistic: Tensor, weight: Tensor) -> Tensor:
    """Zeros [groups, D], a group at most a row."""
    return statistic.new_zeros(min(GROUPS, statistic.numel()), weight.numel())


def _total(sums: Tensor, wanted: bool) -> Tensor:
    return sums.sum(0) if wanted else sums.new_empty(0)
