"""The gradients of bottleneck.py's weights in Triton: sums of outer products over segments of the sorted tokens.

One program owns a tile of a weight and walks the segment, so the sums have one order, and a weight that no token met
gets zeros. The gradient of a bias is the sum of the same rows, by the programs of the first columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dist_reg_kernels.autoencoders import Weights
from dist_reg_kernels.bottleneck_tiles import Batch, Visitors, blocks, compiled, is_wide, multiply
from dist_reg_kernels.bottleneck_triton import Scratch
from dist_reg_kernels.rows import add

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _weight_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    bias_ptr,
    order_ptr,
    bounds_ptr,
    left_stride,
    right_stride,
    decoded,
    height,
    columns,
    LEFT_GATHER: tl.constexpr,
    RIGHT_GATHER: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Sum over a segment of left [height] x right [columns] and of left: a tile of a weight's gradient and of its bias's.

    Rows on the right are `decoded` further on for tokens with an inner choice.
    """
    group = tl.program_id(2)
    if BY_CHOICE:
        first = tl.load(bounds_ptr + group)
        end = tl.load(bounds_ptr + group + 1)
    else:
        first = tl.load(bounds_ptr)
        end = tl.load(bounds_ptr + CHOICES + 1)
    with_inner = tl.load(bounds_ptr + CHOICES)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(first, end, DEPTH):
        position = start + tl.arange(0, DEPTH)
        inside = position < end
        from_left = position.to(tl.int64)
        from_right = position.to(tl.int64)
        if LEFT_GATHER or RIGHT_GATHER:
            token = tl.load(order_ptr + position, mask=inside, other=0)
            from_left = token if LEFT_GATHER else from_left
            from_right = token if RIGHT_GATHER else from_right
        shift = tl.where(position < with_inner, decoded, 0)
        left = tl.load(
            left_ptr + (from_left * left_stride)[None, :] + row[:, None],
            mask=inside[None, :] & (row < height)[:, None],
            other=0.0,
        )
        right = tl.load(
            right_ptr + (from_right * right_stride + shift)[:, None] + column[None, :],
            mask=inside[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        kind: tl.constexpr = out_ptr.dtype.element_ty
        total = multiply(left.to(kind), right.to(kind), total, WIDE)
    place = group.to(tl.int64) * height * columns + (row.to(tl.int64) * columns)[:, None] + column[None, :]
    mask = (row < height)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        sums = tl.full((ROWS,), 0.0, tl.float32)
        for start in range(first, end, DEPTH):
            position = start + tl.arange(0, DEPTH)
            inside = position < end
            from_left = position.to(tl.int64)
            if LEFT_GATHER:
                from_left = tl.load(order_ptr + position, mask=inside, other=0)
            left = tl.load(
                left_ptr + (from_left * left_stride)[None, :] + row[:, None],
                mask=inside[None, :] & (row < height)[:, None],
                other=0.0,
            )
            sums += tl.reduce(left.to(tl.float32), 1, add)
        tl.store(bias_ptr + group * height + row, sums.to(bias_ptr.dtype.element_ty), mask=row < height)


if triton is not None:
    _weight_kernel = compiled(_weight_kernel)


class Rows(NamedTuple):
    """Gradients [N, .] of one kind on their way back: of `Scratch`'s values before tanh."""

    top: Tensor
    """Those of y [N, D]."""
    gather: bool
    """Whether `top` is in the tokens' own order."""
    inside: Scratch


def tile_of(height: int, columns: int, wide: bool) -> dict[str, int]:
    """The tile of a weight [height, columns], and how many tokens are taken at once: in fp32 with 32 it spilled."""
    down, across = (blocks(size, 16 if wide else 64, wide) for size in (height, columns))
    return {"ROWS": min(down["COLUMNS"], 64), **across}


def weight_gradients(batch: Batch, own: Weights, who: Visitors, values: Scratch, rows: Rows) -> Weights:
    """Each gradient as the sum of rows times what its layer read."""
    channels, choices = batch.hidden.shape[1], own.inner_encoder.shape[0]
    found = Weights(*(torch.empty_like(tensor) for tensor in own))
    code, narrow = values.code.stride(1), values.narrow.stride(0)
    wide = is_wide(own)

    def outer_products(
        left: Tensor, right: Tensor, weight: Tensor, bias: Tensor, *strides: int, **gather: bool
    ) -> None:
        by_choice = weight.ndim == 3
        height, columns = weight.shape[-2:]
        groups = choices if by_choice else 1
        if not groups:
            return
        tile = tile_of(height, columns, wide)
        grid = (-(-height // tile["ROWS"]), -(-columns // tile["COLUMNS"]), groups)
        _weight_kernel[grid](
            *(left, right, weight, bias, who.order, who.bounds, *strides, height, columns),
            **{"LEFT_GATHER": False, "RIGHT_GATHER": False, **gather},
            BY_CHOICE=by_choice,
            CHOICES=choices,
            WIDE=wide,
            **tile,
            num_warps=4,
            num_stages=3,
        )

    inside = rows.inside
    outer_products(
        inside.code, batch.hidden, found.encoder, found.encoder_bias, code, channels, 0, RIGHT_GATHER=True
    )
    outer_products(inside.narrow, values.code, found.inner_encoder, found.inner_encoder_bias, narrow, code, 0)
    outer_products(
        inside.code[1], values.narrow, found.inner_decoder, found.inner_decoder_bias, code, narrow, 0
    )
    outer_products(
        *(rows.top, values.code, found.decoder, found.decoder_bias, channels, code, values.decoded),
        LEFT_GATHER=rows.gather,
    )
    return found
