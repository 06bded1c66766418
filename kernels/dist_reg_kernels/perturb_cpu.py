"""perturb.py's operation on the CPU: one compiled, vectorised pass over the rows, split over threads.

hidden and out are [B, T, D] in fp32, fp64, bf16 or fp16; the noise is made four channels at a time in registers
and never stored. Every row is computed by itself and in one order, so the result does not depend on the number
of threads, which is torch's. bf16 is read and rounded (to nearest even) as bit patterns inside the same loop;
fp16 goes through fp32 copies.
"""

from __future__ import annotations

import ctypes

import numba
import numpy as np
import torch
from numba.extending import intrinsic
from torch import Tensor

from dist_reg_kernels import philox
from dist_reg_kernels.rows_cpu import compiled, fma, for_rows, rows_of, store, wide

# Numba's cache notices changes of this file alone: touch it when philox.py or rows_cpu.py changes.
_A, _B = np.uint64(philox.MULTIPLIER_A), np.uint64(philox.MULTIPLIER_B)
_STEP_A, _STEP_B = np.uint32(philox.KEY_STEP_A), np.uint32(philox.KEY_STEP_B)
_LOG0, _LOG1, _LOG2, _LOG3, _LOG4, _LOG5, _LOG6, _LOG7 = (np.float32(c) for c in philox.LOG)
_SIN0, _SIN1, _SIN2, _SIN3 = (np.float32(c) for c in philox.SIN)
_COS0, _COS1, _COS2, _COS3 = (np.float32(c) for c in philox.COS)
_LN2, _SQRT_HALF_BITS = np.float32(philox.LN2), np.int32(philox.SQRT_HALF_BITS)
_UNIT, _HALF, _ONE, _MINUS_TWO = np.float32(2.0**-23), np.float32(0.5), np.float32(1), np.float32(-2)

_NO_SPANS = np.empty((0, 2), np.int32)


@intrinsic
def _sqrt(_context, x):
    """LLVM's own square root: the C library's may set errno, which forbids vector code."""

    def generate(_target, builder, _signature, arguments):
        function = builder.module.declare_intrinsic("llvm.sqrt", [arguments[0].type])
        return builder.call(function, arguments)

    return x(x), generate


@numba.njit(forceinline=True)
def _bits(block, key_low, key_high, site, seed_low, seed_high):
    c0, c1, c2, c3 = block, key_low, key_high, site
    k0, k1 = seed_low, seed_high
    for _ in range(10):
        product_a, product_b = _A * np.uint64(c0), _B * np.uint64(c2)
        c0 = np.uint32(np.uint32(product_b >> np.uint64(32)) ^ c1 ^ k0)
        c2 = np.uint32(np.uint32(product_a >> np.uint64(32)) ^ c3 ^ k1)
        c1, c3 = np.uint32(product_b), np.uint32(product_a)
        k0, k1 = np.uint32(k0 + _STEP_A), np.uint32(k1 + _STEP_B)
    return c0, c1, c2, c3


@numba.njit(forceinline=True)
def _open_unit(bits):
    return (np.float32(np.int32(bits >> np.uint32(9))) + _HALF) * _UNIT


@numba.njit(forceinline=True)
def _signed_unit(bits):
    return (np.float32(np.int32(np.int32(bits) >> np.int32(8))) + _HALF) * _UNIT


@numba.njit(forceinline=True)
def _normal_pair(radius_bits, angle_bits):
    u = _open_unit(radius_bits)
    pattern = np.float32(u).view(np.int32)
    exponent = np.int32(np.int32(pattern - _SQRT_HALF_BITS) >> np.int32(23))
    f = np.int32(pattern - np.int32(exponent << np.int32(23))).view(np.float32) - _ONE
    p = fma(f, _LOG7, _LOG6)
    p = fma(p, f, _LOG5)
    p = fma(p, f, _LOG4)
    p = fma(p, f, _LOG3)
    p = fma(p, f, _LOG2)
    p = fma(p, f, _LOG1)
    p = fma(p, f, _LOG0)
    radius = _sqrt(_MINUS_TWO * fma(np.float32(exponent), _LN2, fma(f * f, p, f)))

    quadrant = np.int32(angle_bits >> np.uint32(30))
    g = _signed_unit(np.uint32(angle_bits << np.uint32(2)))
    g2 = g * g
    sine = g * fma(fma(fma(g2, _SIN3, _SIN2), g2, _SIN1), g2, _SIN0)
    cosine = fma(fma(fma(fma(g2, _COS3, _COS2), g2, _COS1), g2, _COS0), g2, _ONE)
    swap = (quadrant & np.int32(1)) != 0
    x = sine if swap else cosine
    y = cosine if swap else sine
    x = -x if ((quadrant + np.int32(1)) & np.int32(2)) != 0 else x
    y = -y if (quadrant & np.int32(2)) != 0 else y
    return radius * x, radius * y


@numba.njit(forceinline=True)
def _normal(r0, r1, r2, r3):
    z0, z1 = _normal_pair(r0, r1)
    z2, z3 = _normal_pair(r2, r3)
    return z0, z1, z2, z3


@numba.njit(forceinline=True)
def _uniform(r0, r1, r2, r3):
    return _signed_unit(r0), _signed_unit(r1), _signed_unit(r2), _signed_unit(r3)


@numba.njit(forceinline=True)
def _uniform_released(r0, r1, r2, r3):
    return _open_unit(r0), _open_unit(r1), _open_unit(r2), _open_unit(r3)


@numba.njit(fastmath={"reassoc"})
def _root_mean_square(row, zero):
    total = zero
    for i in range(row.size):
        x = wide(row, i)
        total += x * x
    return _sqrt(total / (zero + row.size))


@numba.njit(inline="always")
def _add_row(convert, row, out, first_block, scale, key_low, key_high, site, seed_low, seed_high):
    whole = row.size // 4
    for b in range(whole):
        block = np.uint32(first_block + b)
        z0, z1, z2, z3 = convert(*_bits(block, key_low, key_high, site, seed_low, seed_high))
        store(out, 4 * b, fma(scale, z0, wide(row, 4 * b)))
        store(out, 4 * b + 1, fma(scale, z1, wide(row, 4 * b + 1)))
        store(out, 4 * b + 2, fma(scale, z2, wide(row, 4 * b + 2)))
        store(out, 4 * b + 3, fma(scale, z3, wide(row, 4 * b + 3)))
    if 4 * whole < row.size:
        rest = convert(*_bits(np.uint32(first_block + whole), key_low, key_high, site, seed_low, seed_high))
        for i in range(4 * whole, row.size):
            store(out, i, fma(scale, rest[i - 4 * whole], wide(row, i)))


@compiled
def _perturb_rows(
    begin, end, hidden, out, keys, spans, tokens, seed_low, seed_high, site, sigma, distribution, relative
):
    blocks = (hidden.shape[1] + 3) // 4
    for r in range(begin, end):
        row, target = hidden[r], out[r]
        example, token = r // tokens, r % tokens
        first, past = np.int64(0), np.int64(tokens)
        if spans.shape[0] > 0:
            first, past = np.int64(spans[example, 0]), np.int64(spans[example, 1])
        if token < first or token >= past:
            for i in range(row.size):
                target[i] = row[i]
            continue
        key = np.uint64(keys[example])
        low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
        first_block = (token - first) * blocks
        scale = sigma * _root_mean_square(row, sigma - sigma) if relative else sigma
        if distribution == 0:
            _add_row(_normal, row, target, first_block, scale, low, high, site, seed_low, seed_high)
        elif distribution == 1:
            _add_row(_uniform, row, target, first_block, scale, low, high, site, seed_low, seed_high)
        else:
            _add_row(_uniform_released, row, target, first_block, scale, low, high, site, seed_low, seed_high)


def perturb_cpu(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    """The operation of perturb.py on CPU tensors; the arguments of `perturb.perturb_torch`."""
    if hidden.dtype == torch.float16:
        wide = perturb_cpu(hidden.float(), keys, spans, seed, site, sigma, distribution, relative)
        return wide.to(torch.float16)
    batch, tokens, channels = hidden.shape
    out = torch.empty(hidden.shape, dtype=hidden.dtype)
    if out.numel() == 0:
        return out
    number = np.float64 if hidden.dtype == torch.float64 else np.float32
    seed_low, seed_high = philox.split_words(seed)
    arguments = (
        rows_of(hidden),
        rows_of(out),
        keys.contiguous().numpy(),
        _NO_SPANS if spans is None else spans.contiguous().numpy(),
        tokens,
        np.uint32(seed_low),
        np.uint32(seed_high),
        np.uint32(site & 0xFFFFFFFF),
        number(ctypes.c_float(sigma).value),
        philox.DISTRIBUTIONS.index(distribution),
        relative,
    )
    for_rows(_perturb_rows, batch * tokens, channels, arguments)
    return out
