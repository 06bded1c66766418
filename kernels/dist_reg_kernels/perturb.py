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
from functools import lru_cache

import torch
from torch import Tensor

from dist_reg_kernels.philox import DISTRIBUTIONS, inside_spans, noise_reference, triton_noise

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


def _add(x, y):
    return x + y


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
    DISTRIBUTION: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    example = row // tokens
    token = (row % tokens).to(tl.int32)
    hidden_row = hidden_ptr + example * stride_batch + token.to(tl.int64) * stride_token
    out_row = out_ptr + row * channels

    inside = token >= 0
    if HAS_SPANS:
        first = tl.load(spans_ptr + 2 * example).to(tl.int32)
        end = tl.load(spans_ptr + 2 * example + 1).to(tl.int32)
        inside = (token >= first) & (token < end)
        token -= first

    lane = tl.arange(0, 4 * BLOCKS)
    scale = sigma
    if RELATIVE:
        squares = tl.full((4 * BLOCKS,), 0.0, tl.float32)
        for start in range(0, channels, 4 * BLOCKS):
            channel = start + lane
            x = tl.load(
                hidden_row + channel.to(tl.int64) * stride_channel, mask=channel < channels, other=0.0
            ).to(tl.float32)
            squares += x * x
        scale = sigma * tl.sqrt_rn(tl.reduce(squares, 0, _add) / channels)

    key = tl.load(keys_ptr + example)
    key_low = key.to(tl.uint32)
    key_high = (key >> 32).to(tl.uint32)
    first_block = token * ((channels + 3) // 4)
    for start in range(0, channels, 4 * BLOCKS):
        channel = start + lane
        mask = channel < channels
        x = tl.load(hidden_row + channel.to(tl.int64) * stride_channel, mask=mask, other=0.0).to(tl.float32)
        if inside:
            block = (first_block + start // 4 + tl.arange(0, BLOCKS)).to(tl.uint32)
            noise = triton_noise(
                block,
                key_low,
                key_high,
                site.to(tl.uint32),
                seed_low.to(tl.uint32),
                seed_high.to(tl.uint32),
                DISTRIBUTION,
            )
            x = tl.fma(noise, scale, x)
        tl.store(out_row + channel, x.to(out_ptr.dtype.element_ty), mask=mask)


if triton is not None:
    _add = triton.jit(_add)
    # A new seed, site or layer must never compile again.
    _perturb_kernel = triton.jit(
        _perturb_kernel,
        do_not_specialize=["seed_low", "seed_high", "site", "tokens"],
    )


@lru_cache
def block_and_warps(channels: int) -> tuple[int, int]:
    """Channel blocks (of four) that one program handles at a time, and its warps: two blocks a thread."""
    blocks = min(max(triton.next_power_of_2(-(-channels // 4)), 16), 1024)
    return blocks, min(max(blocks // 64, 1), 8)


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
    """Launch the kernel: one program per token. fp32, bf16 and fp16 on a GPU, or on a CPU in the interpreter."""
    batch, tokens, channels = hidden.shape
    out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if out.numel() == 0:
        return out
    blocks, warps = block_and_warps(channels)
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        _perturb_kernel[(batch * tokens,)](
            hidden,
            out,
            keys.contiguous(),
            None if spans is None else spans.contiguous(),
            *hidden.stride(),
            tokens,
            channels,
            _int32(seed),
            _int32(seed >> 32),
            _int32(site),
            sigma,
            DISTRIBUTION=DISTRIBUTIONS.index(distribution),
            RELATIVE=relative,
            HAS_SPANS=spans is not None,
            BLOCKS=blocks,
            num_warps=warps,
            enable_fp_fusion=False,  # the fused ones are written out; Triton's default is about to change
        )
    return out


def _int32(word: int) -> int:
    """The low 32 bits as a signed integer: one argument type for every seed, so one compiled kernel."""
    return ((word + 2**31) & 0xFFFFFFFF) - 2**31
