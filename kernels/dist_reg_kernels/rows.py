"""What the Triton kernels share: one program a row (a token), its place in the batch, its noise, its size.

A row is `channels` neighbouring elements, read 4 * BLOCKS at a time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from dist_reg_kernels.philox import triton_noise

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def device_function(function: Any) -> Any:
    """`function` as device code, or as it is where Triton is not installed."""
    return function if triton is None else triton.jit(function)


@device_function
def add(x, y):
    return x + y


@device_function
def row_place(row, tokens, spans_ptr, HAS_SPANS: tl.constexpr):
    """(example, token, token counted from the example's first real one, whether it is real) of a row."""
    example = row // tokens
    token = (row % tokens).to(tl.int32)
    token_in_example = token
    real = token >= 0
    if HAS_SPANS:
        first = tl.load(spans_ptr + 2 * example).to(tl.int32)
        end = tl.load(spans_ptr + 2 * example + 1).to(tl.int32)
        real = (token >= first) & (token < end)
        token_in_example = token - first
    return example, token, token_in_example, real


@device_function
def row_noise(
    start, token, channels, key, site, seed_low, seed_high, DISTRIBUTION: tl.constexpr, BLOCKS: tl.constexpr
):
    """Noise at unit sigma for the channels `start` to `start + 4 * BLOCKS` of a token: fp32 [4 * BLOCKS]."""
    block = token * ((channels + 3) // 4) + start // 4 + tl.arange(0, BLOCKS)
    return triton_noise(
        block.to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
        site.to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
        DISTRIBUTION,
    )


@device_function
def row_load(row_ptr, start, stride_channel, channels, BLOCKS: tl.constexpr):
    """The elements `start` to `start + 4 * BLOCKS` of a row in fp32, 0 past its end."""
    channel = start + tl.arange(0, 4 * BLOCKS)
    return tl.load(row_ptr + channel.to(tl.int64) * stride_channel, mask=channel < channels, other=0.0).to(
        tl.float32
    )


@device_function
def row_store(row_ptr, start, channels, values, BLOCKS: tl.constexpr):
    """Write `values` to the elements `start` to `start + 4 * BLOCKS` of a contiguous row, rounded to its dtype."""
    channel = start + tl.arange(0, 4 * BLOCKS)
    tl.store(row_ptr + channel, values.to(row_ptr.dtype.element_ty), mask=channel < channels)


@device_function
def row_scale(row_ptr, stride_channel, channels, sigma, RELATIVE: tl.constexpr, BLOCKS: tl.constexpr):
    """sigma, or sigma times the root mean square of the row when RELATIVE."""
    scale = sigma
    if RELATIVE:
        squares = tl.full((4 * BLOCKS,), 0.0, tl.float32)
        for start in range(0, channels, 4 * BLOCKS):
            x = row_load(row_ptr, start, stride_channel, channels, BLOCKS)
            squares += x * x
        scale = sigma * tl.sqrt_rn(tl.reduce(squares, 0, add) / channels)
    return scale


@lru_cache
def block_and_warps(channels: int) -> tuple[int, int]:
    """Channel blocks (of four) that one program handles at a time, and its warps: two blocks a thread.

    With four a thread the kernels took up to 128 registers on sm_90, and stability's backward spilled.
    """
    blocks = min(max(triton.next_power_of_2(-(-channels // 4)), 16), 512)
    return blocks, min(max(blocks // 64, 1), 8)


def int32(word: int) -> int:
    """The low 32 bits as a signed integer: one argument type for every seed, so one compiled kernel."""
    return ((word + 2**31) & 0xFFFFFFFF) - 2**31
