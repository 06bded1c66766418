"""bottleneck.py's backward operation in Triton: the layers of bottleneck_triton.py again, then back through them.

With g the gradient of `out` where a token takes the view and e that of the error, two rows go back for every visitor:

    both    g + 2 e (y - x) / D, from which the weights get theirs
    out     g alone, which ends in hidden; only for tiles with a token that takes the view

one launch a layer and row, in the dtype of the weights. Without an error the two are one. bottleneck_weights.py then
makes the gradients of the weights from the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dist_reg_kernels.autoencoders import Weights, inner_site, outer_site, views_of
from dist_reg_kernels.bottleneck_tiles import (
    Batch,
    Visitors,
    compiled,
    draws,
    drop,
    is_wide,
    launch,
    prepare,
    product,
    tile_place,
    visitors,
)
from dist_reg_kernels.bottleneck_triton import Scratch, encode, scratch_of
from dist_reg_kernels.bottleneck_weights import Rows, weight_gradients
from dist_reg_kernels.rows import add

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _error_kernel(
    code_ptr,
    matrix_ptr,
    bias_ptr,
    hidden_ptr,
    gradient_ptr,
    upstream_ptr,
    both_ptr,
    order_ptr,
    bounds_ptr,
    views_ptr,
    code_stride,
    decoded,
    width,
    channels,
    view,
    factor,
    EVERY: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """g + factor * e * (y - x) to both [N, D], at the sorted positions."""
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
    x = tl.load(hidden_ptr + place, mask=mask, other=0.0).to(tl.float32)
    pull = factor * tl.load(upstream_ptr + token, mask=inside, other=0.0)
    taken = inside
    if EVERY:
        taken = tl.load(views_ptr + token, mask=inside, other=-1) == view
    g = tl.load(gradient_ptr + place, mask=mask & taken[:, None], other=0.0).to(tl.float32)
    total = g + pull[:, None] * (y - x)
    to = (position.to(tl.int64) * channels)[:, None] + column[None, :]
    tl.store(both_ptr + to, total.to(both_ptr.dtype.element_ty), mask=mask)


def _pull_kernel(
    rows_ptr,
    matrix_ptr,
    value_ptr,
    out_ptr,
    order_ptr,
    bounds_ptr,
    views_ptr,
    keys_ptr,
    rows_stride,
    value_stride,
    decoded,
    depth,
    columns,
    view,
    seed_low,
    seed_high,
    site,
    limit,
    scale,
    GATHER: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    DECODER: tl.constexpr,
    TAKEN: tl.constexpr,
    DROP: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows times a matrix [depth, columns], times the slope of Drop(tanh) at its results `value`.

    Behind the outer decoder (DECODER) that is tanh of decoded codes, `decoded` further on both in value and in out, or
    Drop(tanh) of codes where there is no inner choice. TAKEN: only tiles with a token that takes the view, rows of others 0.
    """
    choice, position, inside = tile_place(bounds_ptr, CHOICES if BY_CHOICE else CHOICES + 1, ROWS)
    if choice < 0:
        return
    token = tl.load(order_ptr + position, mask=inside, other=0)
    if TAKEN:
        inside = inside & (tl.load(views_ptr + token, mask=inside, other=-1) == view)
        if tl.reduce(inside.to(tl.int32), 0, add) == 0:
            return
    if BY_CHOICE:
        matrix_ptr += choice.to(tl.int64) * columns * depth
    row = token if GATHER else position.to(tl.int64)
    start = tl.program_id(1) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    pulled = product(
        rows_ptr,
        row * rows_stride,
        inside,
        matrix_ptr,
        column,
        columns,
        depth,
        1,
        columns,
        ROWS,
        COLUMNS,
        DEPTH,
        WIDE,
    )
    place = (position.to(tl.int64) * value_stride)[:, None] + column[None, :]
    mask = inside[:, None] & (column < columns)[None, :]
    plain = choice < 0
    if DECODER:
        plain = choice < CHOICES
        place += tl.where(plain, decoded, 0)
    value = tl.load(value_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if DROP:
        keys = tl.load(keys_ptr + token, mask=inside, other=0)
        factor = drop(keys, start, site, seed_low, seed_high, limit, scale, ROWS, COLUMNS)
        pulled *= tl.where(plain, 1.0, factor)
        value *= tl.where(plain, 1.0, 1.0 / scale)
    pulled *= 1.0 - value * value
    tl.store(out_ptr + place, pulled.to(out_ptr.dtype.element_ty), mask=mask)


def _hidden_kernel(
    rows_ptr,
    matrix_ptr,
    out_ptr,
    order_ptr,
    bounds_ptr,
    views_ptr,
    rows_stride,
    depth,
    columns,
    view,
    EVERY: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows at sorted positions times the outer encoder, to the gradients of the tokens that take the view."""
    choice, position, inside = tile_place(bounds_ptr, CHOICES + 1, ROWS)
    if choice < 0:
        return
    token = tl.load(order_ptr + position, mask=inside, other=0)
    if EVERY:
        inside = inside & (tl.load(views_ptr + token, mask=inside, other=-1) == view)
        if tl.reduce(inside.to(tl.int32), 0, add) == 0:
            return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = position.to(tl.int64) * rows_stride
    value = product(
        rows_ptr, row, inside, matrix_ptr, column, columns, depth, 1, columns, ROWS, COLUMNS, DEPTH, WIDE
    )
    tl.store(
        out_ptr + (token * columns)[:, None] + column[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < columns)[None, :],
    )


if triton is not None:
    _error_kernel = compiled(_error_kernel)
    _pull_kernel = compiled(_pull_kernel)
    _hidden_kernel = compiled(_hidden_kernel)


def bottleneck_backward_triton(
    gradient: Tensor,
    error_gradient: Tensor,
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
) -> tuple[Tensor, list[Tensor]]:
    """The gradients; the arguments of `bottleneck.bottleneck_backward_torch`. Streams and weights of fp32, bf16, fp16."""
    batch, own = prepare(hidden, weights, views, keys, seed, site, dropout, reconstruct)
    gradient = gradient.reshape(batch.hidden.shape).contiguous()
    upstream = None if reconstruct == "none" else error_gradient.reshape(-1).contiguous()
    hidden_gradient = gradient.clone()
    if gradient.numel() == 0:
        return hidden_gradient.view(hidden.shape), [torch.zeros_like(weight) for weight in weights]
    found: list[Tensor] = []
    choices = own[0].inner_encoder.shape[0]
    with torch.cuda.device(hidden.device) if hidden.is_cuda else nullcontext():
        for who in visitors(views, inner, spans, choices, len(own), batch.every):
            one = own[who.view]
            values = scratch_of(one, gradient.shape[0])
            encode(batch, one, who, values)
            out = Rows(gradient, True, values)
            both = (
                out
                if upstream is None
                else _with_error(batch, one, who, values, gradient, upstream, len(own))
            )
            both = _come_back(batch, one, who, values, both, taken=False)
            for like, got in zip(
                views_of(weights)[who.view], weight_gradients(batch, one, who, values, both)
            ):
                found.append(got[tuple(map(slice, like.shape))].contiguous())
            if upstream is not None:
                both = _come_back(batch, one, who, values, out, taken=batch.every)
            _to_hidden(batch, one, who, both, hidden_gradient)
    return hidden_gradient.view(hidden.shape), found


def _with_error(
    batch: Batch,
    own: Weights,
    who: Visitors,
    values: Scratch,
    gradient: Tensor,
    upstream: Tensor,
    number: int,
) -> Rows:
    tokens, channels = gradient.shape
    both = own.encoder.new_empty(tokens, channels)
    choices, width = own.inner_encoder.shape[0], own.encoder.shape[0]
    launch(
        _error_kernel,
        tokens,
        choices + 1,
        channels,
        width,
        is_wide(own),
        *(values.code, own.decoder, own.decoder_bias, batch.hidden, gradient, upstream, both),
        *(who.order, who.bounds, batch.views, values.code.stride(1), values.decoded, width, channels),
        *(who.view, 2 / channels / (number if batch.every else 1)),
        EVERY=batch.every,
        CHOICES=choices,
    )
    return Rows(both, False, values)


def _come_back(
    batch: Batch, own: Weights, who: Visitors, values: Scratch, rows: Rows, *, taken: bool
) -> Rows:
    """Rows before each tanh from those of y; `taken`: of the tokens that take the view."""
    tokens, channels = rows.top.shape
    choices, width, thin = own.inner_encoder.shape[0], own.encoder.shape[0], own.inner_encoder.shape[1]
    found = scratch_of(own, tokens)
    code, narrow = found.code.stride(1), found.narrow.stride(0)

    def pull(columns: int, depth: int, *arguments: Any, **constants: bool) -> None:
        by_choice = constants["BY_CHOICE"]
        launch(
            _pull_kernel,
            tokens,
            choices if by_choice else choices + 1,
            columns,
            depth,
            is_wide(own),
            *arguments,
            TAKEN=taken,
            DROP=batch.dropout > 0,
            CHOICES=choices,
            **constants,
        )

    places = (who.order, who.bounds, batch.views, batch.keys)
    outer = (who.view, *draws(batch, outer_site(batch.site, who.view)))
    inner = (who.view, *draws(batch, inner_site(batch.site, who.view)))
    pull(
        width,
        channels,
        *(rows.top, own.decoder, values.code, found.code, *places),
        *(channels, code, values.decoded, channels, width, *outer),
        GATHER=rows.gather,
        BY_CHOICE=False,
        DECODER=True,
    )
    if choices:
        pull(
            thin,
            width,
            *(found.code[1], own.inner_decoder, values.narrow, found.narrow, *places),
            *(code, narrow, 0, width, thin, *inner),
            GATHER=False,
            BY_CHOICE=True,
            DECODER=False,
        )
        pull(
            width,
            thin,
            *(found.narrow, own.inner_encoder, values.code, found.code, *places),
            *(narrow, code, 0, thin, width, *outer),
            GATHER=False,
            BY_CHOICE=True,
            DECODER=False,
        )
    return Rows(rows.top, rows.gather, found)


def _to_hidden(batch: Batch, own: Weights, who: Visitors, rows: Rows, hidden_gradient: Tensor) -> None:
    tokens, channels = hidden_gradient.shape
    choices, width = own.inner_encoder.shape[0], own.encoder.shape[0]
    code = rows.inside.code
    launch(
        _hidden_kernel,
        tokens,
        choices + 1,
        channels,
        width,
        is_wide(own),
        *(code, own.encoder, hidden_gradient, who.order, who.bounds, batch.views),
        *(code.stride(1), width, channels, who.view),
        EVERY=batch.every,
        CHOICES=choices,
    )
