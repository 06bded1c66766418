"""bottleneck.py's forward operation in Triton: one launch a layer, over the tiles of bottleneck_tiles.py.

    code     [N, d]   Drop(tanh(W_e x + b_e)) of every visitor
    narrow   [N, h]   Drop(tanh(U_k code + a_k)) of those with an inner choice
    decoded  [N, d]   tanh(V_k narrow + c_k) of the same, in the place of their codes

in the dtype of the weights, for one view at a time, d and h padded to multiples of 16; all of it is gone when the view
is done. The decoder writes y or leaves x, and adds up the squared differences of its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dist_reg_kernels.autoencoders import Weights, inner_site, outer_site
from dist_reg_kernels.bottleneck_tiles import (
    Batch,
    Visitors,
    blocks,
    compiled,
    draws,
    drop,
    is_wide,
    launch,
    prepare,
    product,
    tanh,
    tile_place,
    visitors,
)
from dist_reg_kernels.rows import add

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _layer_kernel(
    rows_ptr,
    matrix_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    bounds_ptr,
    keys_ptr,
    rows_stride,
    out_stride,
    depth,
    columns,
    seed_low,
    seed_high,
    site,
    limit,
    scale,
    GATHER: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    DROP: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Drop(tanh(matrix row + bias)); the rows are those of the tokens (GATHER) or of the sorted positions."""
    choice, position, inside = tile_place(bounds_ptr, GROUPS, ROWS)
    if choice < 0:
        return
    if BY_CHOICE:
        matrix_ptr += choice.to(tl.int64) * columns * depth
        bias_ptr += choice * columns
    token = tl.load(order_ptr + position, mask=inside, other=0)
    row = token if GATHER else position.to(tl.int64)
    start = tl.program_id(1) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    value = product(
        rows_ptr,
        row * rows_stride,
        inside,
        matrix_ptr,
        column,
        columns,
        depth,
        depth,
        1,
        ROWS,
        COLUMNS,
        DEPTH,
        WIDE,
    )
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    value = tanh(value + bias[None, :])
    if DROP:
        keys = tl.load(keys_ptr + token, mask=inside, other=0)
        value *= drop(keys, start, site, seed_low, seed_high, limit, scale, ROWS, COLUMNS)
    tl.store(
        out_ptr + (position.to(tl.int64) * out_stride)[:, None] + column[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < columns)[None, :],
    )


def _decoder_kernel(
    code_ptr,
    matrix_ptr,
    bias_ptr,
    hidden_ptr,
    out_ptr,
    error_ptr,
    order_ptr,
    bounds_ptr,
    views_ptr,
    code_stride,
    decoded,
    width,
    channels,
    tokens,
    view,
    EVERY: tl.constexpr,
    ERROR: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y to the tokens that take the view, and the sums of (y - x)^2 over this tile's columns to error [tiles, N].

    `decoded` is how far behind the codes those lie that an inner choice decoded.
    """
    choice, position, inside = tile_place(bounds_ptr, CHOICES + 1, ROWS)
    if choice < 0:
        return
    token = tl.load(order_ptr + position, mask=inside, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = position.to(tl.int64) * code_stride + tl.where(choice < CHOICES, decoded, 0)
    y = product(
        code_ptr, source, inside, matrix_ptr, column, channels, width, width, 1, ROWS, COLUMNS, DEPTH, WIDE
    )
    y += tl.load(bias_ptr + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]
    place = (token * channels)[:, None] + column[None, :]
    mask = inside[:, None] & (column < channels)[None, :]
    if ERROR:
        x = tl.load(hidden_ptr + place, mask=mask, other=0.0).to(tl.float32)
        apart = tl.where(mask, y - x, 0.0)
        sums = error_ptr + tl.program_id(1).to(tl.int64) * tokens + token
        before = tl.load(sums, mask=inside, other=0.0)
        tl.store(sums, before + tl.reduce(apart * apart, 1, add), mask=inside)
    if EVERY:
        taken = tl.load(views_ptr + token, mask=inside, other=-1) == view
        mask = mask & taken[:, None]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


if triton is not None:
    _layer_kernel = compiled(_layer_kernel)
    _decoder_kernel = compiled(_decoder_kernel)


class Scratch(NamedTuple):
    """What a view's layers hand on."""

    code: Tensor
    """[2, N, d], or [1, N, d] with the decoded codes in the place of the codes."""
    narrow: Tensor
    """[N, h]."""

    @property
    def decoded(self) -> int:
        """How far behind the codes the decoded ones lie."""
        return self.code.stride(0) * (self.code.shape[0] - 1)


def scratch_of(own: Weights, tokens: int, codes: int = 2) -> Scratch:
    """Uninitialised. With one array of `codes` the decoded ones take the place of the codes."""
    empty = own.encoder.new_empty
    return Scratch(empty(codes, tokens, own.encoder.shape[0]), empty(tokens, own.inner_encoder.shape[1]))


def encode(batch: Batch, own: Weights, who: Visitors, scratch: Scratch) -> None:
    """Everything before the outer decoder."""
    tokens, channels = batch.hidden.shape
    choices, width = own.inner_encoder.shape[0], own.encoder.shape[0]
    places = (who.order, who.bounds, batch.keys)
    wide, dropped = is_wide(own), batch.dropout > 0
    code, narrow = scratch.code, scratch.narrow
    launch(
        _layer_kernel,
        tokens,
        choices + 1,
        width,
        channels,
        wide,
        *(batch.hidden, own.encoder, own.encoder_bias, code, *places),
        *(channels, code.stride(1), channels, width, *draws(batch, outer_site(batch.site, who.view))),
        GATHER=True,
        BY_CHOICE=False,
        DROP=dropped,
        GROUPS=choices + 1,
    )
    if not choices:
        return
    thin = own.inner_encoder.shape[1]
    options = {"GATHER": False, "BY_CHOICE": True, "GROUPS": choices}
    drawn = draws(batch, inner_site(batch.site, who.view))
    launch(
        _layer_kernel,
        tokens,
        choices,
        thin,
        width,
        wide,
        *(code, own.inner_encoder, own.inner_encoder_bias, narrow, *places),
        *(code.stride(1), narrow.stride(0), width, thin, *drawn),
        DROP=dropped,
        **options,
    )
    launch(
        _layer_kernel,
        tokens,
        choices,
        width,
        thin,
        wide,
        *(narrow, own.inner_decoder, own.inner_decoder_bias, code[-1], *places),
        *(narrow.stride(0), code.stride(1), thin, width, *drawn),
        DROP=False,
        **options,
    )


def bottleneck_triton(
    hidden: Tensor,
    weights: Sequence[Tensor],
    views: Tensor,
    inner: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    dropout: float,
    reconstruct: str,
) -> tuple[Tensor, Tensor]:
    """The forward operation; the arguments of `bottleneck.bottleneck_torch`. Streams and weights of fp32, bf16, fp16."""
    batch, own = prepare(hidden, weights, views, keys, seed, site, dropout, reconstruct)
    tokens, channels = batch.hidden.shape
    out = batch.hidden.clone()
    if out.numel() == 0:
        return out.view(hidden.shape), out.new_zeros(hidden.shape[:2], dtype=torch.float32)
    tiles = -(-channels // blocks(channels, 1, is_wide(own[0]))["COLUMNS"])
    sums = torch.zeros(tiles, tokens, dtype=torch.float32, device=hidden.device)
    choices = own[0].inner_encoder.shape[0]
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        for who in visitors(views, inner, spans, choices, len(own), batch.every):
            one = own[who.view]
            scratch = scratch_of(one, tokens, codes=1)
            encode(batch, one, who, scratch)
            launch(
                _decoder_kernel,
                tokens,
                choices + 1,
                channels,
                one.encoder.shape[0],
                is_wide(one),
                *(scratch.code, one.decoder, one.decoder_bias, batch.hidden, out, sums),
                *(who.order, who.bounds, batch.views, scratch.code.stride(1), scratch.decoded),
                *(one.encoder.shape[0], channels, tokens, who.view),
                EVERY=batch.every,
                ERROR=reconstruct != "none",
                CHOICES=choices,
            )
    error = sums.sum(0) / (channels * (len(own) if batch.every else 1))
    return out.view(hidden.shape), error.view(hidden.shape[:2])
