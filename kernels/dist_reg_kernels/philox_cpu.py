"""philox.py's noise in compiled CPU code: four channels at a time, in registers."""

from __future__ import annotations

import numba
import numpy as np

from dist_reg_kernels import philox
from dist_reg_kernels.rows_cpu import fma, sqrt

# Numba's cache notices changes of the compiled file alone: touch the users of this file when a constant changes.
_A, _B = np.uint64(philox.MULTIPLIER_A), np.uint64(philox.MULTIPLIER_B)
_STEP_A, _STEP_B = np.uint32(philox.KEY_STEP_A), np.uint32(philox.KEY_STEP_B)
_LOG0, _LOG1, _LOG2, _LOG3, _LOG4, _LOG5, _LOG6, _LOG7 = (np.float32(c) for c in philox.LOG)
_SIN0, _SIN1, _SIN2, _SIN3 = (np.float32(c) for c in philox.SIN)
_COS0, _COS1, _COS2, _COS3 = (np.float32(c) for c in philox.COS)
_LN2, _SQRT_HALF_BITS = np.float32(philox.LN2), np.int32(philox.SQRT_HALF_BITS)
_UNIT, _HALF, _ONE, _MINUS_TWO = np.float32(2.0**-23), np.float32(0.5), np.float32(1), np.float32(-2)


@numba.njit(forceinline=True)
def bits(block, key_low, key_high, site, seed_low, seed_high):
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
def normal(r0, r1, r2, r3):
    z0, z1 = normal_pair(r0, r1)
    z2, z3 = normal_pair(r2, r3)
    return z0, z1, z2, z3


@numba.njit(forceinline=True)
def uniform(r0, r1, r2, r3):
    return _signed_unit(r0), _signed_unit(r1), _signed_unit(r2), _signed_unit(r3)


@numba.njit(forceinline=True)
def uniform_released(r0, r1, r2, r3):
    return _open_unit(r0), _open_unit(r1), _open_unit(r2), _open_unit(r3)
