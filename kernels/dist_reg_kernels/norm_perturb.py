"""A block's norm and the noise of philox.py in one pass; norm_backward.py holds the gradients.

    layer_norm_perturb    z = hidden + residual,   n = (z - mean z) * rstd * weight + bias,   out = n + s * eps
                          rstd = 1 / sqrt(mean (z - mean z)^2 + epsilon)
    perturb_rms_norm      z = hidden + residual,   stream = z + s * eps,   normed = (stream * rstd) * weight
                          rstd = 1 / sqrt(mean stream^2 + epsilon)

The first closes a post-norm block (BERT, RoBERTa), the second opens a pre-norm one (Llama, Qwen3). hidden, residual
(or None) and the results are [B, T, D] of one dtype, weight and bias [D] of any floating dtype, mean and rstd [B * T] in
fp32 (float64 for float64). eps and s are those of perturb.py, where n or z takes the place of its hidden states: s is
sigma, or sigma times the token's root mean square when `relative`. Tokens outside their example's span are normed
and take no noise.

Everything is fp32 in registers. `out` is rounded once, where a norm and then `perturb` would round n, add the noise
and round again. `stream` is rounded to its dtype before the norm, which is LlamaRMSNorm's on what the block goes on with:
(stream * rstd) is rounded, then the product with weight. Without a residual `stream` is `perturb`'s, bit for bit with the
absolute scale. The variance is a mean of squared deviations, so a large mean costs no accuracy.

Bytes: reads 2N elements (N without a residual), N = B * T * D, and writes N (2N for perturb_rms_norm), as the norm alone.
Rows of up to 8192 channels stay in registers; of longer ones all but the first 4096 are read again. What is saved for
the backward pass is the inputs or `stream`, and mean and rstd; a residual add and a LayerNorm keep their sum instead.
Tensors that are not contiguous are copied.

Source: HyPe, arXiv 2212.08853; LayerNorm, arXiv 1607.06450; RMSNorm, arXiv 1910.07467.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from dist_reg_kernels import rows
from dist_reg_kernels.perturb import perturb_torch
from dist_reg_kernels.philox import DISTRIBUTIONS
from dist_reg_kernels.rows import add, device_function, row_load, row_noise, row_place, row_store

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def layer_norm_reference(stream: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """The normed stream [B, T, D], computed in the dtype of the tensors."""
    deviation = stream - stream.mean(-1, keepdim=True)
    variance = deviation.square().mean(-1, keepdim=True)
    return deviation * (variance + epsilon).rsqrt() * weight + bias


def rms_norm_reference(stream: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The normed stream [B, T, D], computed in the dtype of the tensors."""
    return stream * (stream.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


def layer_norm_perturb_torch(
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
    """The fallback in plain torch, on any device and floating dtype: (out, mean, rstd)."""
    stream = wide_sum(hidden, residual)
    mean = stream.mean(-1)
    rstd = ((stream - mean[..., None]).square().mean(-1) + epsilon).rsqrt()
    normed = layer_norm_reference(stream, weight.to(stream.dtype), bias.to(stream.dtype), epsilon)
    out = perturb_torch(normed, keys, spans, seed, site, sigma, distribution, relative)
    return out.to(hidden.dtype), mean.flatten(), rstd.flatten()


def perturb_rms_norm_torch(
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
    """The fallback in plain torch, on any device and floating dtype: (stream, normed, rstd)."""
    wide = wide_sum(hidden, residual)
    stream = perturb_torch(wide, keys, spans, seed, site, sigma, distribution, relative).to(hidden.dtype)
    return stream, *rms_norm_torch(stream, weight, epsilon)


def rms_norm_torch(stream: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(normed, rstd) of a stream, rounded where LlamaRMSNorm rounds."""
    wide = wide_sum(stream, None)
    rstd = (wide.square().mean(-1) + epsilon).rsqrt()
    normed = (wide * rstd[..., None]).to(stream.dtype)
    return (normed.to(wide.dtype) * weight.to(wide.dtype)).to(stream.dtype), rstd.flatten()


def wide_sum(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """hidden + residual in fp32, or float64 for float64."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(dtype) if residual is None else hidden.to(dtype) + residual.to(dtype)


@device_function
def inside_row(start, channels, BLOCKS: tl.constexpr):
    """Which of the elements `start` to `start + 4 * BLOCKS` exist."""
    return start + tl.arange(0, 4 * BLOCKS) < channels


@device_function
def sum_load(
    hidden_ptr, residual_ptr, offset, start, channels, HAS_RESIDUAL: tl.constexpr, BLOCKS: tl.constexpr
):
    """The elements `start` to `start + 4 * BLOCKS` of hidden + residual in fp32, for the row at `offset`."""
    z = row_load(hidden_ptr + offset, start, 1, channels, BLOCKS)
    if HAS_RESIDUAL:
        z += row_load(residual_ptr + offset, start, 1, channels, BLOCKS)
    return z


@device_function
def block_moments(z, start, channels, BLOCKS: tl.constexpr):
    """(count, mean, sum of squared deviations) of one block of a row."""
    count = tl.minimum(channels - start, 4 * BLOCKS).to(tl.float32)
    mean = tl.reduce(z, 0, add) / count
    deviation = tl.where(inside_row(start, channels, BLOCKS), z - mean, 0.0)
    return count, mean, tl.reduce(deviation * deviation, 0, add)


@device_function
def affine(z, mean, rstd, weight_ptr, bias_ptr, start, channels, BLOCKS: tl.constexpr):
    """The layer norm of one block of a row, 0 past its end."""
    weight = row_load(weight_ptr, start, 1, channels, BLOCKS)
    bias = row_load(bias_ptr, start, 1, channels, BLOCKS)
    return tl.fma((z - mean) * rstd, weight, bias)


@device_function
def inverse_root(mean_square, epsilon):
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square + epsilon))


def _layer_norm_perturb_kernel(
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    keys_ptr,
    spans_ptr,
    tokens,
    channels,
    seed_low,
    seed_high,
    site,
    sigma,
    epsilon,
    HAS_RESIDUAL: tl.constexpr,
    NOISE: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offset = row * channels
    example, _, token, real = row_place(row, tokens, spans_ptr, HAS_SPANS)
    key = tl.load(keys_ptr + example)

    z = sum_load(hidden_ptr, residual_ptr, offset, 0, channels, HAS_RESIDUAL, BLOCKS)
    count, mean, squares = block_moments(z, 0, channels, BLOCKS)
    if not WHOLE:
        for start in range(4 * BLOCKS, channels, 4 * BLOCKS):
            later = sum_load(hidden_ptr, residual_ptr, offset, start, channels, HAS_RESIDUAL, BLOCKS)
            later_count, later_mean, later_squares = block_moments(later, start, channels, BLOCKS)
            step = later_mean - mean
            share = later_count / (count + later_count)
            squares += later_squares + step * step * count * share
            mean += step * share
            count += later_count
    rstd = inverse_root(squares / channels, epsilon)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    y = affine(z, mean, rstd, weight_ptr, bias_ptr, 0, channels, BLOCKS)
    scale = sigma
    if NOISE and RELATIVE:
        total = tl.reduce(y * y, 0, add)
        if not WHOLE:
            for start in range(4 * BLOCKS, channels, 4 * BLOCKS):
                z = sum_load(hidden_ptr, residual_ptr, offset, start, channels, HAS_RESIDUAL, BLOCKS)
                later = affine(z, mean, rstd, weight_ptr, bias_ptr, start, channels, BLOCKS)
                total += tl.reduce(later * later, 0, add)
        scale = sigma * tl.sqrt_rn(total / channels)

    if NOISE and real:
        noise = row_noise(0, token, channels, key, site, seed_low, seed_high, DISTRIBUTION, BLOCKS)
        y = tl.fma(noise, scale, y)
    row_store(out_ptr + offset, 0, channels, y, BLOCKS)
    if not WHOLE:
        for start in range(4 * BLOCKS, channels, 4 * BLOCKS):
            z = sum_load(hidden_ptr, residual_ptr, offset, start, channels, HAS_RESIDUAL, BLOCKS)
            y = affine(z, mean, rstd, weight_ptr, bias_ptr, start, channels, BLOCKS)
            if NOISE and real:
                noise = row_noise(
                    start, token, channels, key, site, seed_low, seed_high, DISTRIBUTION, BLOCKS
                )
                y = tl.fma(noise, scale, y)
            row_store(out_ptr + offset, start, channels, y, BLOCKS)


@device_function
def store_normed(normed_ptr, x, rstd, weight_ptr, start, channels, BLOCKS: tl.constexpr):
    """Write one block of the RMS norm: rounded before the product with weight, and after."""
    weight = row_load(weight_ptr, start, 1, channels, BLOCKS)
    rounded = (x * rstd).to(normed_ptr.dtype.element_ty).to(tl.float32)
    row_store(normed_ptr, start, channels, rounded * weight, BLOCKS)


def _perturb_rms_norm_kernel(
    hidden_ptr,
    residual_ptr,
    weight_ptr,
    stream_ptr,
    normed_ptr,
    rstd_ptr,
    keys_ptr,
    spans_ptr,
    tokens,
    channels,
    seed_low,
    seed_high,
    site,
    sigma,
    epsilon,
    HAS_RESIDUAL: tl.constexpr,
    NOISE: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offset = row * channels
    example, _, token, real = row_place(row, tokens, spans_ptr, HAS_SPANS)
    key = tl.load(keys_ptr + example)

    z = sum_load(hidden_ptr, residual_ptr, offset, 0, channels, HAS_RESIDUAL, BLOCKS)
    scale = sigma
    if NOISE and RELATIVE:
        total = tl.reduce(z * z, 0, add)
        if not WHOLE:
            for start in range(4 * BLOCKS, channels, 4 * BLOCKS):
                later = sum_load(hidden_ptr, residual_ptr, offset, start, channels, HAS_RESIDUAL, BLOCKS)
                total += tl.reduce(later * later, 0, add)
        scale = sigma * tl.sqrt_rn(total / channels)

    if NOISE and real:
        noise = row_noise(0, token, channels, key, site, seed_low, seed_high, DISTRIBUTION, BLOCKS)
        z = tl.where(inside_row(0, channels, BLOCKS), tl.fma(noise, scale, z), 0.0)
    x = z.to(stream_ptr.dtype.element_ty).to(tl.float32)
    row_store(stream_ptr + offset, 0, channels, x, BLOCKS)
    squares = tl.reduce(x * x, 0, add)
    if not WHOLE:
        for start in range(4 * BLOCKS, channels, 4 * BLOCKS):
            z = sum_load(hidden_ptr, residual_ptr, offset, start, channels, HAS_RESIDUAL, BLOCKS)
            if NOISE and real:
                noise = row_noise(
                    start, token, channels, key, site, seed_low, seed_high, DISTRIBUTION, BLOCKS
                )
                z = tl.where(inside_row(start, channels, BLOCKS), tl.fma(noise, scale, z), 0.0)
            later = z.to(stream_ptr.dtype.element_ty).to(tl.float32)
            row_store(stream_ptr + offset, start, channels, later, BLOCKS)
            squares += tl.reduce(later * later, 0, add)
    rstd = inverse_root(squares / channels, epsilon)
    tl.store(rstd_ptr + row, rstd)

    store_normed(normed_ptr + offset, x, rstd, weight_ptr, 0, channels, BLOCKS)
    if not WHOLE:
        tl.debug_barrier()  # the stream is read back, perhaps by another thread than wrote it
        for start in range(4 * BLOCKS, channels, 4 * BLOCKS):
            later = row_load(stream_ptr + offset, start, 1, channels, BLOCKS)
            store_normed(normed_ptr + offset, later, rstd, weight_ptr, start, channels, BLOCKS)


if triton is not None:
    _SAME_KERNEL = ["seed_low", "seed_high", "site", "tokens"]
    _layer_norm_perturb_kernel = triton.jit(_layer_norm_perturb_kernel, do_not_specialize=_SAME_KERNEL)
    _perturb_rms_norm_kernel = triton.jit(_perturb_rms_norm_kernel, do_not_specialize=_SAME_KERNEL)


@lru_cache
def block_and_warps(channels: int) -> tuple[int, int]:
    """Channel blocks (of four) that one program holds in registers, and its warps: up to four blocks a thread.

    Half as many of a row that they cannot hold whole: its loops need the registers.
    """
    blocks = max(triton.next_power_of_2(-(-channels // 4)), 16)
    blocks = blocks if blocks <= 2048 else 1024
    return blocks, min(max(blocks // 64, 1), 16)


def layer_norm_perturb_triton(
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
    """Launch the kernel: one program a token. fp32, bf16 and fp16; (out, mean, rstd)."""
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    mean, rstd = _statistic(hidden), _statistic(hidden)
    _launch(
        _layer_norm_perturb_kernel,
        (hidden, residual, weight, bias, out, mean, rstd),
        (keys, spans, seed, site, sigma, epsilon, distribution, relative),
    )
    return out, mean, rstd


def perturb_rms_norm_triton(
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
    """Launch the kernel: one program a token. fp32, bf16 and fp16; (stream, normed, rstd)."""
    stream, normed = (torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) for _ in range(2))
    rstd = _statistic(hidden)
    _launch(
        _perturb_rms_norm_kernel,
        (hidden, residual, weight, stream, normed, rstd),
        (keys, spans, seed, site, sigma, epsilon, distribution, relative),
    )
    return stream, normed, rstd


def _statistic(hidden: Tensor) -> Tensor:
    return torch.empty(hidden.shape[0] * hidden.shape[1], dtype=torch.float32, device=hidden.device)


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor | None, ...],
    noise: tuple[Tensor, Tensor | None, int, int, float, float, str, bool],
) -> None:
    """One program a token; `tensors` as the kernel lists them, hidden and residual first."""
    hidden, residual, *_ = tensors
    keys, spans, seed, site, sigma, epsilon, distribution, relative = noise
    batch, tokens, channels = hidden.shape
    if hidden.numel() == 0:
        return
    blocks, warps = block_and_warps(channels)
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        kernel[(batch * tokens,)](
            *(None if tensor is None else tensor.contiguous() for tensor in tensors),
            keys.contiguous(),
            None if spans is None else spans.contiguous(),
            tokens,
            channels,
            rows.int32(seed),
            rows.int32(seed >> 32),
            rows.int32(site),
            sigma,
            epsilon,
            HAS_RESIDUAL=residual is not None,
            NOISE=sigma != 0,
            DISTRIBUTION=DISTRIBUTIONS.index(distribution),
            RELATIVE=relative,
            HAS_SPANS=spans is not None,
            WHOLE=channels <= 4 * blocks,
            BLOCKS=blocks,
            num_warps=warps,
            enable_fp_fusion=False,  # perturb's bits
        )
