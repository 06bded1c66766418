"""bottleneck.py's forward operation in Triton: one launch a layer, over tiles of sorted tokens and columns.

Tokens are sorted by view and inner choice on the device, and stay sorted from the first layer to the last; `bounds` says
where each inner choice begins. Nothing of that is known to the host: tiles are launched for the largest number
there can be, and one that finds no tokens returns at once. A tile belongs to one inner choice, hence to one matrix.

    code     [N, d]   Drop(tanh(W_e x + b_e)) of every visitor
    narrow   [N, h]   Drop(tanh(U_k code + a_k)) of those with an inner choice
    decoded  [N, d]   tanh(V_k narrow + c_k) of the same

in the dtype of the weights, for one view at a time, d and h padded to multiples of 16. The decoder writes y or leaves x, and adds
up the squared differences of its columns. Sums are fp32; products of fp32 weights are "ieee" and run without tensor
cores: with tf32 they would hold to three digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dist_reg_kernels import rows
from dist_reg_kernels.autoencoders import Weights, inner_site, outer_site, views_of
from dist_reg_kernels.philox import inside_spans, triton_noise
from dist_reg_kernels.rows import add, device_function

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@device_function
def tile_place(bounds_ptr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """(inner choice, sorted positions [ROWS], which of them are its tokens) of a program; no tokens, choice -1."""
    tile = tl.program_id(0)
    choice = tile * 0 - 1
    first = tile * 0
    end = tile * 0
    before = tile * 0
    for k in range(GROUPS):
        begin = tl.load(bounds_ptr + k)
        stop = tl.load(bounds_ptr + k + 1)
        tiles = (stop - begin + ROWS - 1) // ROWS
        here = (tile >= before) & (tile < before + tiles)
        choice = tl.where(here, k, choice)
        first = tl.where(here, begin + (tile - before) * ROWS, first)
        end = tl.where(here, stop, end)
        before += tiles
    position = first + tl.arange(0, ROWS)
    return choice, position, position < end


@device_function
def product(
    rows_ptr,
    row_offset,
    inside,
    matrix_ptr,
    column,
    columns,
    depth,
    column_stride,
    depth_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Rows [ROWS, depth] times `column`s of a matrix: fp32 [ROWS, COLUMNS]. Rows are rounded to the matrix's dtype."""
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(
            rows_ptr + row_offset[:, None] + k[None, :],
            mask=inside[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        right = tl.load(
            matrix_ptr
            + k.to(tl.int64)[:, None] * depth_stride
            + column.to(tl.int64)[None, :] * column_stride,
            mask=(k < depth)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        total = multiply(left, right, total, WIDE)
    return total


@device_function
def multiply(left, right, total, WIDE: tl.constexpr):
    """total + left @ right, in fp32 where WIDE, else in the dtype of `right`."""
    if WIDE:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    return tl.dot(left.to(right.dtype), right, total)


@device_function
def tanh(x):
    """To 2e-7 of its value."""
    square = x * x
    series = tl.fma(square, tl.fma(square, tl.fma(square, 62 / 2835, -17 / 315), 2 / 15), -1 / 3)
    power = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - power) / (1.0 + power)
    return tl.where(tl.abs(x) < 0.25, tl.fma(x * square, series, x), tl.where(x < 0, -far, far))


@device_function
def drop(keys, start, site, seed_low, seed_high, limit, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The factors [ROWS, COLUMNS] of the columns from `start` on: bottleneck.drop_factor of the tokens' keys [ROWS]."""
    BLOCKS: tl.constexpr = COLUMNS // 4
    zeros = tl.full((ROWS, BLOCKS), 0, tl.int64)
    block = tl.reshape(zeros + (start // 4 + tl.arange(0, BLOCKS))[None, :], (ROWS * BLOCKS,))
    key = tl.reshape(zeros + keys[:, None], (ROWS * BLOCKS,))
    uniform = triton_noise(
        block.to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
        site.to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
        1,
    )
    return tl.reshape(tl.where(uniform < limit, scale, 0.0), (ROWS, COLUMNS))


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


def compiled(function: Any) -> Any:
    """`function` as a kernel that a new seed, site, view, batch size or place of the bounds never compiles again."""
    names = {"seed_low", "seed_high", "site", "view", "tokens"} & set(signature(function).parameters)
    return triton.jit(
        function, do_not_specialize=sorted(names), do_not_specialize_on_alignment=["bounds_ptr"]
    )


if triton is not None:
    _layer_kernel = compiled(_layer_kernel)
    _decoder_kernel = compiled(_decoder_kernel)


class Batch(NamedTuple):
    """What every launch needs to know of a call."""

    hidden: Tensor
    """[N, D]."""
    views: Tensor
    """[N]."""
    keys: Tensor
    """[N]."""
    seed: int
    site: int
    dropout: float
    every: bool
    """Whether every token visits every view."""


class Visitors(NamedTuple):
    """The tokens that go through one autoencoder; the first ones of each inner choice are those that take it."""

    view: int
    order: Tensor
    """int64 [N], the tokens in sorted order."""
    bounds: Tensor
    """int32 [K + 2], where each inner choice begins in `order`."""


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


def visitors(
    views: Tensor, inner: Tensor, spans: Tensor | None, choices: int, number: int, every: bool
) -> list[Visitors]:
    """Who visits which of the `number` autoencoders with `choices` inner ones, without a word to the host."""
    batch, tokens = views.shape
    real = torch.ones_like(views, dtype=torch.bool) if spans is None else inside_spans(spans, tokens)
    views, real = torch.where(real, views, number).flatten(), real.flatten()
    inner = inner.reshape(batch * tokens, number)
    groups = choices + 1
    if every:
        found = []
        for m in range(number):
            group = torch.where(real, 2 * inner[:, m] + (views != m), 2 * groups)
            found.append(
                Visitors(m, *_sorted(group, torch.arange(0, 2 * groups + 1, 2, device=views.device)))
            )
        return found
    own = inner.gather(1, views.clamp(max=number - 1)[:, None])[:, 0]
    group = torch.where(views < number, views * groups + own, number * groups)
    order, bounds = _sorted(group, torch.arange(number * groups + 1, device=views.device))
    return [Visitors(m, order, bounds[m * groups : (m + 1) * groups + 1]) for m in range(number)]


def _sorted(group: Tensor, firsts: Tensor) -> tuple[Tensor, Tensor]:
    """The order that sorts by group, and where in it each of `firsts` begins."""
    group, order = group.sort(stable=True)
    return order, torch.searchsorted(group, firsts, out_int32=True)


@lru_cache
def blocks(columns: int, depth: int, wide: bool) -> dict[str, int]:
    """The tile of a product with [depth, columns]; `wide` where it is taken in fp32."""
    most, deep = (64, 32) if wide else (128, 64)
    return {
        "COLUMNS": min(max(triton.next_power_of_2(columns), 16), most),
        "DEPTH": min(max(triton.next_power_of_2(depth), 16), deep),
    }


def rows_of_tile(wide: bool) -> int:
    """Tokens of one tile, alike in every layer."""
    return 32 if wide else 64


def is_wide(weights: Weights) -> bool:
    """Whether products are taken in fp32: of fp32 weights, and always in the interpreter, which has no bf16."""
    return weights.encoder.dtype == torch.float32 or triton.knobs.runtime.interpret


def launch(
    kernel: triton.JITFunction,
    tokens: int,
    groups: int,
    columns: int,
    depth: int,
    wide: bool,
    *arguments: Any,
    **constants: Any,
) -> None:
    """One program for each tile of tokens and of columns that there may be."""
    tile = blocks(columns, depth, wide)
    height = rows_of_tile(wide)
    grid = (-(-tokens // height) + groups, -(-columns // tile["COLUMNS"]))
    kernel[grid](*arguments, WIDE=wide, ROWS=height, **tile, **constants, num_warps=4, num_stages=3)


def draws(batch: Batch, site: int) -> tuple[int, int, int, float, float]:
    """The arguments of `drop` behind the keys and the columns."""
    words = (rows.int32(batch.seed), rows.int32(batch.seed >> 32), rows.int32(site))
    return *words, 1 - 2 * batch.dropout, 1 / (1 - batch.dropout)


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


def scratch_of(own: Weights, tokens: int, codes: int = 2) -> Scratch:
    """Uninitialised. With one array of `codes` the decoded ones take the place of the codes."""
    empty = own.encoder.new_empty
    return Scratch(empty(codes, tokens, own.encoder.shape[0]), empty(tokens, own.inner_encoder.shape[1]))


def prepare(
    hidden: Tensor, weights: Sequence[Tensor], views: Tensor, keys: Tensor, *options: Any
) -> tuple[Batch, list[Weights]]:
    """The call as the launches read it: flat and contiguous."""
    seed, site, dropout, reconstruct = options
    flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    places = (views.reshape(-1).contiguous(), keys.reshape(-1).contiguous())
    batch = Batch(flat, *places, seed, site, dropout, reconstruct == "all")
    return batch, [padded(own) for own in views_of(weights)]


def padded(own: Weights) -> Weights:
    """Contiguous, with widths d and h that are multiples of 16: zeros where there were none, which stay zeros throughout.

    So every row that a kernel reads begins at 16 bytes. A copy of the weights where the widths are others.
    """
    d, h = (-size % 16 for size in (own.encoder.shape[0], own.inner_encoder.shape[1]))
    if not d + h:
        return Weights(*(tensor.contiguous() for tensor in own))
    sides = ((0, 0, 0, d), (0, d), (0, d, 0, h), (0, h), (0, h, 0, d), (0, d), (0, d), (0, 0))
    return Weights(*(pad(tensor, side) for tensor, side in zip(own, sides)))


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
