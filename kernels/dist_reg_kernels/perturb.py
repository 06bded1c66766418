"""out = hidden + s * eps: the noise of philox.py added to the hidden states of a batch.

hidden [B, T, D], any strides; out [B, T, D], contiguous, same dtype. eps [B, T, D] at unit sigma is a function of
(seed, example key, site, token in the example, channel) and is never stored: one pass reads N elements and
writes N. s is sigma, or sigma * sqrt(mean over D of hidden^2) per token when `relative`. The sum is one fused
multiply-add in fp32 registers (float64 for float64 input), cast once: with uniform noise and an absolute scale
every backend gives the same bits. Tokens outside their example's span are copied.

Backward: the identity. The token's RMS is a constant of the noise, not a path for the gradient.

Source: HyPe, arXiv 2212.08853, equations 1 to 4 (absolute); the relative scale is dist-reg's own.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import torch
from torch import Tensor

from dist_reg_kernels import rows
from dist_reg_kernels.philox import DISTRIBUTIONS, inside_spans, noise_reference
from dist_reg_kernels.rows import row_load, row_noise, row_place, row_scale, row_store

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def perturb_reference(hidden: Tensor, noise: Tensor, *, sigma: float, relative: bool) -> Tensor:
    """hidden + s * noise, computed in the dtype of the two tensors [B, T, D]."""
    scale = sigma
    if relative:
        scale = sigma * hidden.square().mean(dim=-1, keepdim=True).sqrt()
    return hidden + scale * noise


def perturb_torch(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    """The fallback in plain torch, on any device and floating dtype; stores the noise."""
    batch, tokens, channels = hidden.shape
    if spans is None:
        spans = keys.new_tensor([[0, tokens]]).expand(batch, 2)
    noise = noise_reference(keys, spans, tokens, channels, seed=seed, site=site, distribution=distribution)
    sigma = ctypes.c_float(sigma).value  # the kernels take sigma in fp32
    out = perturb_reference(hidden.double(), noise.double(), sigma=sigma, relative=relative)
    out = out.to(torch.promote_types(hidden.dtype, torch.float32)).to(hidden.dtype)
    return torch.where(inside_spans(spans, tokens)[..., None], out, hidden).contiguous()


def _perturb_kernel(
    hidden_ptr,
    out_ptr,
    keys_ptr,
    spans_ptr,
    stride_batch,
    stride_token,
    stride_channel,
    tokens,
    channels,
    seed_low,
    seed_high,
    site,
    sigma,
    FORK: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    example, token, token_in_example, real = row_place(row, tokens, spans_ptr, HAS_SPANS)
    hidden_row = hidden_ptr + example * stride_batch + token.to(tl.int64) * stride_token
    clean_row = out_ptr + row * channels
    out_row = clean_row
    if FORK:
        out_row = clean_row + tl.num_programs(0).to(tl.int64) * channels

    scale = row_scale(hidden_row, stride_channel, channels, sigma, RELATIVE, BLOCKS)
    key = tl.load(keys_ptr + example)
    for start in range(0, channels, 4 * BLOCKS):
        x = row_load(hidden_row, start, stride_channel, channels, BLOCKS)
        if FORK:
            row_store(clean_row, start, channels, x, BLOCKS)
        if real:
            noise = row_noise(
                start, token_in_example, channels, key, site, seed_low, seed_high, DISTRIBUTION, BLOCKS
            )
            x = tl.fma(noise, scale, x)
        row_store(out_row, start, channels, x, BLOCKS)


if triton is not None:
    # A new seed, site or layer must never compile again.
    _perturb_kernel = triton.jit(
        _perturb_kernel,
        do_not_specialize=["seed_low", "seed_high", "site", "tokens"],
    )


def perturb_triton(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    """Launch the kernel: one program a token. fp32, bf16 and fp16 on a GPU, or on a CPU in the interpreter."""
    return launch(hidden, keys, spans, seed, site, sigma, distribution, relative, fork=False)


def launch(
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
    batch, tokens, channels = hidden.shape
    shape = (2 * batch if fork else batch, tokens, channels)
    out = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
    if out.numel() == 0:
        return out
    blocks, warps = rows.block_and_warps(channels)
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        _perturb_kernel[(batch * tokens,)](
            hidden,
            out,
            keys.contiguous(),
            None if spans is None else spans.contiguous(),
            *hidden.stride(),
            tokens,
            channels,
            rows.int32(seed),
            rows.int32(seed >> 32),
            rows.int32(site),
            sigma,
            FORK=fork,
            DISTRIBUTION=DISTRIBUTIONS.index(distribution),
            RELATIVE=relative,
            HAS_SPANS=spans is not None,
            BLOCKS=blocks,
            num_warps=warps,
            enable_fp_fusion=False,  # the fused ones are written out; Triton's default is about to change
        )
    return out
