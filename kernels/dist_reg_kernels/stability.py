"""How far the two halves of a twin stream lie apart, token by token, and the gradient that this sends back.

    distance[b, t] = sum_d (noisy[b, t, d] - clean[b, t, d])^2 at real tokens, 0 elsewhere

twin [2B, T, D], any strides, holds the clean half and behind it the noisy one; distance is [B, T] in fp32 (float64 for
float64 input). The difference is taken in fp32 registers. One pass reads 2N elements, N = B * T * D, and nothing of
size N is written, where eager PyTorch writes the difference and its square.

Backward, with u = upstream gradient [B, T] and the gradient g [2B, T, D] that the next layer sends to the twin:

    clean: g - 2 u (noisy - clean)     noisy: g + 2 u (noisy - clean)

in one pass that reads 4N and writes 2N; apart, the two gradients and their sum would read 6N and write 4N. With
`detach_clean` the clean half gets g alone.

Source: LNSR, arXiv 2107.04835 and 2206.05658.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dist_reg_kernels import rows
from dist_reg_kernels.philox import inside_spans
from dist_reg_kernels.rows import add, row_load, row_place, row_store

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def stability_reference(twin: Tensor, real: Tensor) -> Tensor:
    """The formula [B, T] in the dtype of the twin; `real` is bool [B, T]."""
    clean, noisy = twin.chunk(2)
    return torch.where(real, (noisy - clean).square().sum(-1), 0.0)


def real_tokens(twin: Tensor, spans: Tensor | None) -> Tensor:
    """bool [B, T], or [1, 1] where every token is real."""
    if spans is None:
        return torch.ones(1, 1, dtype=torch.bool, device=twin.device)
    return inside_spans(spans, twin.shape[1])


def stability_torch(twin: Tensor, spans: Tensor | None) -> Tensor:
    """The fallback in plain torch, on any device and floating dtype."""
    wide = twin.to(torch.promote_types(twin.dtype, torch.float32))
    return stability_reference(wide, real_tokens(twin, spans))


def stability_backward_torch(
    twin: Tensor, spans: Tensor | None, gradient: Tensor, upstream: Tensor, detach_clean: bool
) -> Tensor:
    """The gradient [2B, T, D] of the twin in plain torch."""
    clean, noisy = twin.to(upstream.dtype).chunk(2)
    upstream = torch.where(real_tokens(twin, spans), upstream, 0.0)
    pull = 2.0 * upstream[..., None] * (noisy - clean)
    pull = torch.where(upstream[..., None] == 0, 0.0, pull)  # a padding token may hold anything
    both = torch.cat((torch.zeros_like(pull) if detach_clean else -pull, pull))
    return (gradient.to(upstream.dtype) + both).to(twin.dtype)


def _stability_kernel(
    twin_ptr,
    distance_ptr,
    spans_ptr,
    stride_batch,
    stride_token,
    stride_channel,
    batch,
    tokens,
    channels,
    HAS_SPANS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    example, token, _, real = row_place(row, tokens, spans_ptr, HAS_SPANS)
    clean_row = twin_ptr + example * stride_batch + token.to(tl.int64) * stride_token
    noisy_row = clean_row + batch.to(tl.int64) * stride_batch
    squares = tl.full((4 * BLOCKS,), 0.0, tl.float32)
    if real:
        for start in range(0, channels, 4 * BLOCKS):
            clean = row_load(clean_row, start, stride_channel, channels, BLOCKS)
            noisy = row_load(noisy_row, start, stride_channel, channels, BLOCKS)
            squares += (noisy - clean) * (noisy - clean)
    tl.store(distance_ptr + row, tl.reduce(squares, 0, add))


def _stability_backward_kernel(
    twin_ptr,
    gradient_ptr,
    upstream_ptr,
    out_ptr,
    spans_ptr,
    stride_batch,
    stride_token,
    stride_channel,
    tokens,
    channels,
    HAS_SPANS: tl.constexpr,
    DETACH_CLEAN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows_of_half = tl.num_programs(0).to(tl.int64)
    example, token, _, real = row_place(row, tokens, spans_ptr, HAS_SPANS)
    batch = rows_of_half // tokens
    clean_row = twin_ptr + example * stride_batch + token.to(tl.int64) * stride_token
    noisy_row = clean_row + batch * stride_batch
    clean_offset = row * channels
    noisy_offset = (row + rows_of_half) * channels
    factor = 2.0 * tl.load(upstream_ptr + row)
    for start in range(0, channels, 4 * BLOCKS):
        clean_gradient = row_load(gradient_ptr + clean_offset, start, 1, channels, BLOCKS)
        noisy_gradient = row_load(gradient_ptr + noisy_offset, start, 1, channels, BLOCKS)
        if real:
            clean = row_load(clean_row, start, stride_channel, channels, BLOCKS)
            noisy = row_load(noisy_row, start, stride_channel, channels, BLOCKS)
            pull = factor * (noisy - clean)
            noisy_gradient += pull
            if not DETACH_CLEAN:
                clean_gradient -= pull
        row_store(out_ptr + clean_offset, start, channels, clean_gradient, BLOCKS)
        row_store(out_ptr + noisy_offset, start, channels, noisy_gradient, BLOCKS)


if triton is not None:
    _stability_kernel = triton.jit(_stability_kernel, do_not_specialize=["batch", "tokens"])
    _stability_backward_kernel = triton.jit(_stability_backward_kernel, do_not_specialize=["tokens"])


def stability_triton(twin: Tensor, spans: Tensor | None) -> Tensor:
    """Launch the forward kernel: one program a token. fp32, bf16 and fp16."""
    double, tokens, channels = twin.shape
    batch = double // 2
    distance = torch.empty(batch, tokens, dtype=torch.float32, device=twin.device)
    if distance.numel() == 0:
        return distance
    blocks, warps = rows.block_and_warps(channels)
    with torch.cuda.device(twin.device) if twin.is_cuda else nullcontext():
        _stability_kernel[(batch * tokens,)](
            twin,
            distance,
            None if spans is None else spans.contiguous(),
            *twin.stride(),
            batch,
            tokens,
            channels,
            HAS_SPANS=spans is not None,
            BLOCKS=blocks,
            num_warps=warps,
        )
    return distance


def stability_backward_triton(
    twin: Tensor, spans: Tensor | None, gradient: Tensor, upstream: Tensor, detach_clean: bool
) -> Tensor:
    """Launch the backward kernel: one program a token, both halves of it."""
    double, tokens, channels = twin.shape
    out = torch.empty(twin.shape, dtype=twin.dtype, device=twin.device)
    if out.numel() == 0:
        return out
    blocks, warps = rows.block_and_warps(channels)
    with torch.cuda.device(twin.device) if twin.is_cuda else nullcontext():
        _stability_backward_kernel[(double // 2 * tokens,)](
            twin,
            gradient.contiguous(),
            upstream.contiguous(),
            out,
            None if spans is None else spans.contiguous(),
            *twin.stride(),
            tokens,
            channels,
            HAS_SPANS=spans is not None,
            DETACH_CLEAN=detach_clean,
            BLOCKS=blocks,
            num_warps=warps,
        )
    return out
