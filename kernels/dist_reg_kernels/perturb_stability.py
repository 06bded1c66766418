"""This layer's stability and the next layer's noise in the same pass over the twin stream.

    distance = stability(twin)                               as in stability.py
    out      = twin + s * eps, the same eps on both halves   as in perturb.py, to the bit

twin and out are [2B, T, D], keys int64 [B], distance [B, T] in fp32. Both halves of an example take the noise of its
one key, which is drawn once: the streams differ by what LNSR injected and by nothing else. With the relative scale
each half has its own s. One pass reads 2N elements and writes 2N, N = B * T * D; apart, the two operations would read
4N, and draw the noise twice.

Backward: that of stability.py, for the noise's gradient is the identity.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dist_reg_kernels import rows
from dist_reg_kernels.perturb import perturb_torch
from dist_reg_kernels.philox import DISTRIBUTIONS
from dist_reg_kernels.rows import add, row_load, row_noise, row_place, row_scale, row_store
from dist_reg_kernels.stability import stability_torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def perturb_stability_torch(
    twin: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> tuple[Tensor, Tensor]:
    """The reference and fallback in plain torch: (out, distance)."""
    keys_of_both = torch.cat((keys, keys))
    spans_of_both = None if spans is None else torch.cat((spans, spans))
    out = perturb_torch(twin, keys_of_both, spans_of_both, seed, site, sigma, distribution, relative)
    return out, stability_torch(twin, spans)


def _perturb_stability_kernel(
    twin_ptr,
    out_ptr,
    distance_ptr,
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
    rows_of_half = tl.num_programs(0).to(tl.int64)
    example, token, token_in_example, real = row_place(row, tokens, spans_ptr, HAS_SPANS)
    clean_row = twin_ptr + example * stride_batch + token.to(tl.int64) * stride_token
    noisy_row = clean_row + (rows_of_half // tokens) * stride_batch
    clean_out = out_ptr + row * channels
    noisy_out = clean_out + rows_of_half * channels

    clean_scale = row_scale(clean_row, stride_channel, channels, sigma, RELATIVE, BLOCKS)
    noisy_scale = row_scale(noisy_row, stride_channel, channels, sigma, RELATIVE, BLOCKS)
    key = tl.load(keys_ptr + example)
    squares = tl.full((4 * BLOCKS,), 0.0, tl.float32)
    for start in range(0, channels, 4 * BLOCKS):
        clean = row_load(clean_row, start, stride_channel, channels, BLOCKS)
        noisy = row_load(noisy_row, start, stride_channel, channels, BLOCKS)
        if real:
            squares += (noisy - clean) * (noisy - clean)
            noise = row_noise(
                start, token_in_example, channels, key, site, seed_low, seed_high, DISTRIBUTION, BLOCKS
            )
            clean = tl.fma(noise, clean_scale, clean)
            noisy = tl.fma(noise, noisy_scale, noisy)
        row_store(clean_out, start, channels, clean, BLOCKS)
        row_store(noisy_out, start, channels, noisy, BLOCKS)
    tl.store(distance_ptr + row, tl.reduce(squares, 0, add))


if triton is not None:
    _perturb_stability_kernel = triton.jit(
        _perturb_stability_kernel, do_not_specialize=["seed_low", "seed_high", "site", "tokens"]
    )


def perturb_stability_triton(
    twin: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel: one program a token, both halves of it. fp32, bf16 and fp16; (out, distance)."""
    double, tokens, channels = twin.shape
    batch = double // 2
    out = torch.empty(twin.shape, dtype=twin.dtype, device=twin.device)
    distance = torch.empty(batch, tokens, dtype=torch.float32, device=twin.device)
    if out.numel() == 0:
        return out, distance.zero_()
    blocks, warps = rows.block_and_warps(channels)
    with torch.cuda.device(twin.device) if twin.is_cuda else nullcontext():
        _perturb_stability_kernel[(batch * tokens,)](
            twin,
            out,
            distance,
            keys.contiguous(),
            None if spans is None else spans.contiguous(),
            *twin.stride(),
            tokens,
            channels,
            rows.int32(seed),
            rows.int32(seed >> 32),
            rows.int32(site),
            sigma,
            DISTRIBUTION=DISTRIBUTIONS.index(distribution),
            RELATIVE=relative,
            HAS_SPANS=spans is not None,
            BLOCKS=blocks,
            num_warps=warps,
            enable_fp_fusion=False,  # perturb's bits
        )
    return out, distance
