"""What the Triton kernels of bottleneck.py share: who visits which view, a program's tile of tokens, its product, its dropout.

Tokens are sorted by view and inner choice on the device, and stay sorted from the first layer to the last; `bounds` says
where each inner choice begins. Nothing of that is known to the host: tiles are launched for the largest number there
can be, and one that finds no tokens returns at once. A tile belongs to one inner choice, hence to one matrix.

Sums are fp32. Products of fp32 weights are "ieee" and run without tensor cores: with tf32 they would hold to three digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dist_reg_kernels import rows
from dist_reg_kernels.autoencoders import Weights, views_of
from dist_reg_kernels.philox import inside_spans, triton_noise
from dist_reg_kernels.rows import device_function

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


def compiled(function: Any) -> Any:
    """`function` as a kernel that a new seed, site, view, batch size or place of the bounds never compiles again."""
    names = {"seed_low", "seed_high", "site", "view", "tokens"} & set(signature(function).parameters)
    return triton.jit(
        function, do_not_specialize=sorted(names), do_not_specialize_on_alignment=["bounds_ptr"]
    )


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
    group, order = group.int().sort(stable=True)
    return order, torch.searchsorted(group, firsts.int(), out_int32=True)


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
