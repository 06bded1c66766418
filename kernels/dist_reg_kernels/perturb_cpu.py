"""perturb.py's operation on the CPU: one compiled, vectorised pass over the rows, split over threads.

hidden and out are [B, T, D] in fp32, fp64, bf16 or fp16; the noise of a row stays in the first cache. bf16 is read and
rounded inside the same loop; fp16 goes through fp32 copies.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from dist_reg_kernels import philox
from dist_reg_kernels.philox_cpu import draw, noise_buffers
from dist_reg_kernels.rows_cpu import (
    as_rows,
    compiled,
    fma,
    for_rows,
    is_real,
    root_mean_square,
    span_array,
    store,
    wide,
)


@numba.njit(forceinline=True)
def add_noise(row, out, noise, scale):
    for i in range(row.size):
        store(out, i, fma(scale, noise[i], wide(row, i)))


@compiled
def _perturb_rows(
    begin,
    end,
    hidden,
    out,
    clean,
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
    channels = hidden.shape[1]
    buffers = noise_buffers(channels)
    for r in range(begin, end):
        row, target = hidden[r], out[r]
        if clean.shape[0] > 0:
            copy = clean[r]
            for i in range(row.size):
                copy[i] = row[i]
        if not is_real(r, spans, tokens):
            for i in range(row.size):
                target[i] = row[i]
            continue
        noise = draw(buffers, channels, r, keys, spans, tokens, seed_low, seed_high, site, distribution)
        add_noise(row, target, noise, sigma * root_mean_square(row, sigma - sigma) if relative else sigma)


def noise_arguments(
    keys: Tensor, spans: Tensor | None, tokens: int, seed: int, site: int, sigma: float, dtype: torch.dtype
) -> tuple[Any, ...]:
    """What a compiled loop takes to know every row's noise: keys, spans, tokens, seed words, site and sigma."""
    number = np.float64 if dtype == torch.float64 else np.float32
    seed_low, seed_high = philox.split_words(seed)
    return (
        keys.contiguous().numpy(),
        span_array(spans),
        tokens,
        np.uint32(seed_low),
        np.uint32(seed_high),
        np.uint32(site & 0xFFFFFFFF),
        number(ctypes.c_float(sigma).value),
    )


def perturb_cpu(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    """The operation of perturb.py on CPU tensors; the arguments of `perturb.perturb_torch`."""
    return perturb_or_fork(hidden, keys, spans, seed, site, sigma, distribution, relative, fork=False)


def perturb_or_fork(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
    *,
    fork: bool,
) -> Tensor:
    """The perturbed rows, behind a copy of the clean ones when `fork`."""
    if hidden.dtype == torch.float16:
        wider = hidden.float()
        out = perturb_or_fork(wider, keys, spans, seed, site, sigma, distribution, relative, fork=fork)
        return out.to(torch.float16)
    batch, tokens, channels = hidden.shape
    out = torch.empty((2 * batch if fork else batch, tokens, channels), dtype=hidden.dtype)
    if out.numel() == 0:
        return out
    rows = batch * tokens
    whole = as_rows(out)
    arguments = (
        as_rows(hidden),
        whole[-rows:],
        whole[:rows] if fork else whole[:0],
        *noise_arguments(keys, spans, tokens, seed, site, sigma, hidden.dtype),
        philox.DISTRIBUTIONS.index(distribution),
        relative,
    )
    for_rows(_perturb_rows, rows, channels, arguments)
    return out
