"""The gradients of norm_perturb.py's operations. The noise is a constant, so they are those of the norms.

With x the normalised row, (z - mean) * rstd or stream * rstd, g the gradient of the normed output, w = weight:

    layer norm    dz = rstd * (w g - mean(w g) - x mean(w g x))          d weight = sum g x,   d bias = sum g
    RMS norm      dz = d stream + rstd * (w g - x mean(w g x))           d weight = sum g x

means over the D channels, sums over the B * T tokens. z = hidden + residual; dz [B, T, D] is the gradient of both, of the
dtype of hidden. The gradients of weight and bias are [D] in fp32 (float64 for float64), or empty without `with_weight`.
One pass over the rows: layer norm reads 3N elements (2N without a residual) and writes N, RMS norm reads 3N and writes N.

The sums over tokens are taken in two stages without atomics: every program sums its own group of rows in registers, and
torch sums the groups. The number of groups follows from the shape alone, so the result is the same on every GPU. Rows
beyond 8192 channels do not fit in registers: their blocks are read once for the means, once for dz and once for the sums.

Source: as norm_perturb.py.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from dist_reg_kernels import norm_perturb
from dist_reg_kernels.norm_perturb import sum_load, wide_sum
from dist_reg_kernels.rows import add, device_function, row_load, row_store

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def layer_norm_backward_torch(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fallback in plain torch: (dz, d weight, d bias)."""
    mean, rstd = (statistic.view(*hidden.shape[:2], 1) for statistic in (mean, rstd))
    x = (wide_sum(hidden, residual) - mean) * rstd
    g = gradient.to(x.dtype)
    weighted = g * weight.to(x.dtype)
    pull = rstd * (weighted - weighted.mean(-1, keepdim=True) - x * (weighted * x).mean(-1, keepdim=True))
    if not with_weight:
        return pull.to(hidden.dtype), x.new_empty(0), x.new_empty(0)
    return pull.to(hidden.dtype), (g * x).sum((0, 1)), g.sum((0, 1))


def rms_norm_backward_torch(
    stream: Tensor,
    weight: Tensor,
    rstd: Tensor,
    stream_gradient: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The fallback in plain torch: (dz, d weight)."""
    rstd = rstd.view(*stream.shape[:2], 1)
    x = wide_sum(stream, None) * rstd
    g = gradient.to(x.dtype)
    weighted = g * weight.to(x.dtype)
    pull = stream_gradient.to(x.dtype) + rstd * (weighted - x * (weighted * x).mean(-1, keepdim=True))
    return pull.to(stream.dtype), (g * x).sum((0, 1)) if with_weight else x.new_empty(0)


@device_function
def normalised(
    stream_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    row,
    offset,
    start,
    channels,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """(x, rstd) for one block of the row number `row`, which lies at `offset`."""
    rstd = tl.load(rstd_ptr + row)
    z = sum_load(stream_ptr, residual_ptr, offset, start, channels, HAS_RESIDUAL, BLOCKS)
    if CENTRED:
        z -= tl.load(mean_ptr + row)
    return z * rstd, rstd


@device_function
def store_pull(
    out_ptr,
    stream_gradient_ptr,
    offset,
    start,
    channels,
    pull,
    HAS_STREAM_GRADIENT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the gradient of one block of a row, what came along the stream added."""
    if HAS_STREAM_GRADIENT:
        pull += row_load(stream_gradient_ptr + offset, start, 1, channels, BLOCKS)
    row_store(out_ptr + offset, start, channels, pull, BLOCKS)


def _norm_backward_kernel(
    stream_ptr,
    residual_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    stream_gradient_ptr,
    gradient_ptr,
    out_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
    rows,
    channels,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STREAM_GRADIENT: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a group of rows, each held in registers; the group's sums stay there until the end."""
    group = tl.program_id(0)
    first = group.to(tl.int64) * channels
    offset = first
    step = tl.num_programs(0).to(tl.int64) * channels
    weight_sum = tl.full((4 * BLOCKS,), 0.0, tl.float32)
    bias_sum = tl.full((4 * BLOCKS,), 0.0, tl.float32)
    for row in range(group, rows, tl.num_programs(0)):
        x, rstd = normalised(
            stream_ptr,
            residual_ptr,
            mean_ptr,
            rstd_ptr,
            row,
            offset,
            0,
            channels,
            CENTRED,
            HAS_RESIDUAL,
            BLOCKS,
        )
        g = row_load(gradient_ptr + offset, 0, 1, channels, BLOCKS)
        weight_sum += g * x
        if CENTRED:
            bias_sum += g
        weighted = g * row_load(weight_ptr, 0, 1, channels, BLOCKS)
        pull = weighted - x * (tl.reduce(weighted * x, 0, add) / channels)
        if CENTRED:
            pull -= tl.reduce(weighted, 0, add) / channels
        store_pull(
            out_ptr, stream_gradient_ptr, offset, 0, channels, rstd * pull, HAS_STREAM_GRADIENT, BLOCKS
        )
        offset += step
    if WITH_WEIGHT:
        row_store(weight_sums_ptr + first, 0, channels, weight_sum, BLOCKS)
        if CENTRED:
            row_store(bias_sums_ptr + first, 0, channels, bias_sum, BLOCKS)


def _long_norm_backward_kernel(
    stream_ptr,
    residual_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    stream_gradient_ptr,
    gradient_ptr,
    out_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
    rows,
    channels,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STREAM_GRADIENT: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The same for rows of several blocks: first the gradients, row by row, then the sums, block by block."""
    group = tl.program_id(0)
    first = group.to(tl.int64) * channels
    offset = first
    step = tl.num_programs(0).to(tl.int64) * channels
    for row in range(group, rows, tl.num_programs(0)):
        products = tl.full((4 * BLOCKS,), 0.0, tl.float32)
        plain = tl.full((4 * BLOCKS,), 0.0, tl.float32)
        for start in range(0, channels, 4 * BLOCKS):
            x, rstd = normalised(
                stream_ptr,
                residual_ptr,
                mean_ptr,
                rstd_ptr,
                row,
                offset,
                start,
                channels,
                CENTRED,
                HAS_RESIDUAL,
                BLOCKS,
            )
            weighted = row_load(gradient_ptr + offset, start, 1, channels, BLOCKS)
            weighted *= row_load(weight_ptr, start, 1, channels, BLOCKS)
            products += weighted * x
            plain += weighted
        along = tl.reduce(products, 0, add) / channels
        level = tl.reduce(plain, 0, add) / channels
        for start in range(0, channels, 4 * BLOCKS):
            x, rstd = normalised(
                stream_ptr,
                residual_ptr,
                mean_ptr,
                rstd_ptr,
                row,
                offset,
                start,
                channels,
                CENTRED,
                HAS_RESIDUAL,
                BLOCKS,
            )
            pull = row_load(gradient_ptr + offset, start, 1, channels, BLOCKS)
            pull = pull * row_load(weight_ptr, start, 1, channels, BLOCKS) - x * along
            if CENTRED:
                pull -= level
            store_pull(
                out_ptr,
                stream_gradient_ptr,
                offset,
                start,
                channels,
                rstd * pull,
                HAS_STREAM_GRADIENT,
                BLOCKS,
            )
        offset += step
    if WITH_WEIGHT:
        for start in range(0, channels, 4 * BLOCKS):
            weight_sum = tl.full((4 * BLOCKS,), 0.0, tl.float32)
            bias_sum = tl.full((4 * BLOCKS,), 0.0, tl.float32)
            offset = first
            for row in range(group, rows, tl.num_programs(0)):
                x, _ = normalised(
                    stream_ptr,
                    residual_ptr,
                    mean_ptr,
                    rstd_ptr,
                    row,
                    offset,
                    start,
                    channels,
                    CENTRED,
                    HAS_RESIDUAL,
                    BLOCKS,
                )
                g = row_load(gradient_ptr + offset, start, 1, channels, BLOCKS)
                weight_sum += g * x
                bias_sum += g
                offset += step
            row_store(weight_sums_ptr + first, start, channels, weight_sum, BLOCKS)
            if CENTRED:
                row_store(bias_sums_ptr + first, start, channels, bias_sum, BLOCKS)


if triton is not None:
    _norm_backward_kernel = triton.jit(_norm_backward_kernel, do_not_specialize=["rows"])
    _long_norm_backward_kernel = triton.jit(_long_norm_backward_kernel, do_not_specialize=["rows"])


def groups_of_rows(rows: int, warps: int) -> int:
    """Programs that share the rows: at least four rows each, and 4096 warps in all, half of what an H200 holds."""
    return min(-(-rows // 4), 4096 // warps)


def layer_norm_backward_triton(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel: (dz, d weight, d bias)."""
    return _launch(hidden, residual, weight, mean, rstd, None, gradient, with_weight)


def rms_norm_backward_triton(
    stream: Tensor,
    weight: Tensor,
    rstd: Tensor,
    stream_gradient: Tensor,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: (dz, d weight)."""
    return _launch(stream, None, weight, None, rstd, stream_gradient, gradient, with_weight)[:2]


def _launch(
    stream: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    stream_gradient: Tensor | None,
    gradient: Tensor,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel with a mean is the layer norm's, the one without the RMS norm's."""
    batch, tokens, channels = stream.shape
    blocks, warps = norm_perturb.block_and_warps(channels)
    groups = groups_of_rows(batch * tokens, warps)
    out = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
    weight_sums = _sums(groups, channels, with_weight, stream)
    bias_sums = _sums(groups, channels, with_weight and mean is not None, stream)
    tensors = (stream, residual, weight, mean, rstd, stream_gradient, gradient, out, weight_sums, bias_sums)
    if groups > 0:
        whole = channels <= 4 * blocks
        kernel = _norm_backward_kernel if whole else _long_norm_backward_kernel
        with torch.cuda.device(stream.device) if stream.is_cuda else nullcontext():
            kernel[(groups,)](
                *(None if tensor is None else tensor.contiguous() for tensor in tensors),
                batch * tokens,
                channels,
                CENTRED=mean is not None,
                HAS_RESIDUAL=residual is not None,
                HAS_STREAM_GRADIENT=stream_gradient is not None,
                WITH_WEIGHT=with_weight,
                BLOCKS=blocks,
                num_warps=warps,
                enable_fp_fusion=True,
            )
    return out, weight_sums.sum(0), bias_sums.sum(0)


def _sums(groups: int, channels: int, wanted: bool, like: Tensor) -> Tensor:
    """One row of sums for each group, or rows of none."""
    return torch.empty(groups, channels if wanted else 0, dtype=torch.float32, device=like.device)
