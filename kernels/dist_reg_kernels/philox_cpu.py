"""philox.py's noise in compiled CPU code: a row at a time, in buffers that stay in the first cache."""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dist_reg_kernels import philox
from dist_reg_kernels.rows_cpu import fma, place, sqrt

# Numba's cache notices changes of the compiled file alone: touch the users of this file when a constant changes.
_LOG0, _LOG1, _LOG2, _LOG3, _LOG4, _LOG5, _LOG6, _LOG7 = (np.float32(c) for c in philox.LOG)
_SIN0, _SIN1, _SIN2, _SIN3 = (np.float32(c) for c in philox.SIN)
_COS0, _COS1, _COS2, _COS3 = (np.float32(c) for c in philox.COS)
_LN2, _SQRT_HALF_BITS = np.float32(philox.LN2), np.int32(philox.SQRT_HALF_BITS)
_QUARTER, _SIGN = np.uint32(1 << 30), np.uint32(1 << 31)
_UNIT, _HALF, _ONE, _MINUS_TWO = np.float32(2.0**-23), np.float32(0.5), np.float32(1), np.float32(-2)

LANES = 16  # blocks at once: two chains of AVX-512, four of AVX2
_WORD, _INDEX = ir.IntType(64), ir.IntType(32)


def _vector(kind, values):
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def _splat(builder, scalar):
    wide = builder.zext(scalar, _WORD) if scalar.type != _WORD else scalar
    one = builder.insert_element(ir.Constant(ir.VectorType(_WORD, LANES), ir.Undefined), wide, _INDEX(0))
    return builder.shuffle_vector(one, one, _vector(_INDEX, [0] * LANES))


def _interleave(builder, x, y):
    """x0, y0, x1, y1, ..."""
    turns = [i + side * x.type.count for i in range(x.type.count) for side in (0, 1)]
    return builder.shuffle_vector(x, y, _vector(_INDEX, turns))


@intrinsic
def _store_bits(_context, words, offset, block, key_low, key_high, site, seed_low, seed_high):
    """The random integers of LANES blocks from uint64 `block` on, in channel order, two of them a word.

    Written as LLVM vectors: a 32-bit word in a lane of 64 makes a round one multiplication, shift and exclusive or for
    each half, its upper half rubbish that the next multiplication leaves out, and LANES are several chains at once. The
    loop vectoriser gets neither from scalar code.
    """

    def generate(context, builder, signature, arguments):
        low, half = (_vector(_WORD, [value] * LANES) for value in (0xFFFFFFFF, 32))
        array = context.make_array(words)(context, builder, arguments[0])
        c0, c1, c2, c3, k0, k1 = (_splat(builder, word) for word in arguments[2:])
        c0 = builder.add(c0, _vector(_WORD, list(range(LANES))))
        for _ in range(philox.ROUNDS):
            product_a = builder.mul(builder.and_(c0, low), _vector(_WORD, [philox.MULTIPLIER_A] * LANES))
            product_b = builder.mul(builder.and_(c2, low), _vector(_WORD, [philox.MULTIPLIER_B] * LANES))
            c0 = builder.xor(builder.xor(builder.lshr(product_b, half), c1), k0)
            c2 = builder.xor(builder.xor(builder.lshr(product_a, half), c3), k1)
            c1, c3 = product_b, product_a
            k0 = builder.and_(builder.add(k0, _vector(_WORD, [philox.KEY_STEP_A] * LANES)), low)
            k1 = builder.and_(builder.add(k1, _vector(_WORD, [philox.KEY_STEP_B] * LANES)), low)
        pairs = [
            builder.or_(builder.and_(even, low), builder.shl(odd, half)) for even, odd in ((c0, c1), (c2, c3))
        ]
        result = _interleave(builder, *pairs)
        target = builder.gep(array.data, [arguments[1]])
        builder.store(result, builder.bitcast(target, result.type.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(words, offset, block, key_low, key_high, site, seed_low, seed_high), generate


@numba.njit(forceinline=True)
def _open_unit(bits):
    return (np.float32(np.int32(bits >> np.uint32(9))) + _HALF) * _UNIT


@numba.njit(forceinline=True)
def _signed_unit(bits):
    return (np.float32(np.int32(np.int32(bits) >> np.int32(8))) + _HALF) * _UNIT


@numba.njit(forceinline=True)
def normal_pair(radius_bits, angle_bits):
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
    radius = sqrt(_MINUS_TWO * fma(np.float32(exponent), _LN2, fma(f * f, p, f)))

    g = _signed_unit(np.uint32(angle_bits << np.uint32(2)))
    g2 = g * g
    sine = g * fma(fma(fma(g2, _SIN3, _SIN2), g2, _SIN1), g2, _SIN0)
    cosine = fma(fma(fma(fma(g2, _COS3, _COS2), g2, _COS1), g2, _COS0), g2, _ONE)
    # The two uppermost bits are the quadrant: odd ones swap, the second and third turn x, the last two y.
    swap = np.uint32(angle_bits & _QUARTER) != np.uint32(0)
    x = np.float32(sine if swap else cosine).view(np.uint32)
    y = np.float32(cosine if swap else sine).view(np.uint32)
    x = np.uint32(x ^ np.uint32(np.uint32(angle_bits + _QUARTER) & _SIGN)).view(np.float32)
    y = np.uint32(y ^ np.uint32(angle_bits & _SIGN)).view(np.float32)
    return radius * x, radius * y


@numba.njit(forceinline=True)
def fill_bits(words, first_block, key_low, key_high, site, seed_low, seed_high):
    """The random integers from block `first_block` on; `words` is a multiple of 2 * LANES uint64."""
    for i in range(0, words.size, 2 * LANES):
        block = np.uint64(first_block + i // 2)
        _store_bits(words, i, block, key_low, key_high, site, seed_low, seed_high)


@numba.njit
def noise_buffers(channels):
    """What `draw` takes for rows of so many channels: the noise, and the integers that it is made from."""
    words = (channels + 4 * LANES - 1) // (4 * LANES) * (2 * LANES)
    return np.empty(2 * words, np.float32), np.empty(words, np.uint64)


@numba.njit(forceinline=True)
def draw(buffers, channels, r, keys, spans, tokens, seed_low, seed_high, site, distribution):
    """Row `r`'s noise at unit sigma, for a row that lies in its example's span."""
    noise, words = buffers
    example, token = place(r, tokens)
    if spans.shape[0] > 0:
        token -= spans[example, 0]
    key = np.uint64(keys[example])
    low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
    fill_bits(words, token * ((channels + 3) // 4), low, high, site, seed_low, seed_high)
    bits = words.view(np.uint32)
    if distribution == 0:
        for i in range(noise.size // 2):
            noise[2 * i], noise[2 * i + 1] = normal_pair(bits[2 * i], bits[2 * i + 1])
    elif distribution == 1:
        for i in range(noise.size):
            noise[i] = _signed_unit(bits[i])
    else:
        for i in range(noise.size):
            noise[i] = _open_unit(bits[i])
    return noise
