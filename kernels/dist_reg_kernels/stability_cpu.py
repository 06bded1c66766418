"""stability.py's operations on the CPU: one compiled, vectorised pass over the rows, split over threads.

fp32, fp64 and bf16 are read as they lie; fp16 goes through fp32 copies.
"""

from __future__ import annotations

import numba
import torch
from torch import Tensor

from dist_reg_kernels.rows_cpu import as_rows, compiled, for_rows, is_real, span_array, store, wide


@numba.njit(fastmath={"reassoc"})
def squared_distance(clean, noisy, zero):
    """Sum of the squared differences of two rows, in the dtype of `zero`."""
    total = zero
    for i in range(clean.size):
        difference = wide(noisy, i) - wide(clean, i)
        total += difference * difference
    return total


@compiled
def _distances(begin, end, twin, distance, spans, tokens):
    zero, half = distance.dtype.type(0), distance.size
    for r in range(begin, end):
        distance[r] = squared_distance(twin[r], twin[half + r], zero) if is_real(r, spans, tokens) else zero


@numba.njit(inline="always")
def _add_pull(clean, noisy, clean_gradient, noisy_gradient, clean_out, noisy_out, factor, detach_clean):
    if detach_clean:
        for i in range(clean.size):
            pull = factor * (wide(noisy, i) - wide(clean, i))
            clean_out[i] = clean_gradient[i]
            store(noisy_out, i, wide(noisy_gradient, i) + pull)
    else:
        for i in range(clean.size):
            pull = factor * (wide(noisy, i) - wide(clean, i))
            store(clean_out, i, wide(clean_gradient, i) - pull)
            store(noisy_out, i, wide(noisy_gradient, i) + pull)


@compiled
def _gradients(begin, end, twin, gradient, out, upstream, spans, tokens, detach_clean):
    half = upstream.size
    for r in range(begin, end):
        if is_real(r, spans, tokens):
            factor = upstream[r] + upstream[r]
            _add_pull(
                twin[r],
                twin[half + r],
                gradient[r],
                gradient[half + r],
                out[r],
                out[half + r],
                factor,
                detach_clean,
            )
        else:
            for i in range(twin.shape[1]):
                out[r, i] = gradient[r, i]
                out[half + r, i] = gradient[half + r, i]


def stability_cpu(twin: Tensor, spans: Tensor | None) -> Tensor:
    """The forward operation of stability.py on CPU tensors; the arguments of `stability.stability_torch`."""
    if twin.dtype == torch.float16:
        twin = twin.float()
    double, tokens, channels = twin.shape
    dtype = torch.float64 if twin.dtype == torch.float64 else torch.float32
    if twin.numel() == 0:
        return torch.zeros(double // 2, tokens, dtype=dtype)
    count = double // 2 * tokens
    distance = torch.empty(count, dtype=dtype)
    for_rows(_distances, count, channels // 4, (as_rows(twin), distance.numpy(), span_array(spans), tokens))
    return distance.view(-1, tokens)


def stability_backward_cpu(
    twin: Tensor, spans: Tensor | None, gradient: Tensor, upstream: Tensor, detach_clean: bool
) -> Tensor:
    """The backward operation on CPU tensors; the arguments of `stability.stability_backward_torch`."""
    if twin.dtype == torch.float16:
        wider = stability_backward_cpu(twin.float(), spans, gradient.float(), upstream, detach_clean)
        return wider.to(torch.float16)
    out = torch.empty(twin.shape, dtype=twin.dtype)
    if out.numel() == 0:
        return out
    weights = upstream.contiguous().numpy().reshape(-1)
    tensors = (as_rows(twin), as_rows(gradient), as_rows(out), weights)
    for_rows(
        _gradients,
        weights.size,
        4 * twin.shape[2],
        (*tensors, span_array(spans), twin.shape[1], detach_clean),
    )
    return out
