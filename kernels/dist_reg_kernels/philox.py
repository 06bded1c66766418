"""The noise: Philox-4x32-10 counted by (token, channel, example, site), then made uniform or normal.

    block   = token_in_example * ceil(D / 4) + channel // 4             (uint32)
    r0..r3  = Philox-4x32-10(counter = (block, example_key low, example_key high, site), key = (seed low, seed high))

`token_in_example` counts from the example's first real token, so padding does not change the noise. The four
32-bit outputs belong to the four neighbouring channels `4 * (channel // 4) + 0..3`:

    uniform           U(-1, 1)   ((int32(r) >> 8) + 1/2) * 2^-23
    uniform_released  U(0, 1)    ((r >> 9) + 1/2) * 2^-23
    normal            N(0, 1)    Box-Muller on (r0, r1) and (r2, r3); from one pair (a, b):
                                 u = ((a >> 9) + 1/2) * 2^-23,   q = b >> 30,   g = ((int32(b << 2) >> 8) + 1/2) * 2^-23
                                 angle = q pi/2 + g pi/4,   z = sqrt(-2 ln u) * (cos angle, sin angle),   |z| < 5.8

Both uniforms are exact in fp32, hence the same bits on every backend. The normals are rounded from float64 in
the torch reference here; the fast paths evaluate the short polynomials below in fp32 and stay within 1e-6 of it.
One 24-bit radius and a 26-bit angle need no table and no library logarithm, so the loops vectorise.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DISTRIBUTIONS = ("normal", "uniform", "uniform_released")

MULTIPLIER_A, MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
KEY_STEP_A, KEY_STEP_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

# ln(1 + f) = f + f^2 * sum LOG[k] f^k on [sqrt(1/2) - 1, sqrt(2) - 1]: relative error 3.0e-8
LOG = (
    -0.49999991059303284,
    0.33333951234817505,
    -0.25001755356788635,
    0.19962072372436523,
    -0.16570508480072021,
    0.14917974174022675,
    -0.14307521283626556,
    0.08734840899705887,
)
# sin(g pi/4) = g * sum SIN[k] g^2k on [-1, 1]: error 2.5e-9
SIN = (0.7853981852531433, -0.08074543625116348, 0.002490007085725665, -3.595450834836811e-05)
# cos(g pi/4) = 1 + g^2 * sum COS[k] g^2k on [-1, 1]: error 5.4e-11
COS = (-0.3084251284599304, 0.015854327008128166, -0.00032594200456514955, 3.5313346415932756e-06)
LN2 = 0.6931471805599453
SQRT_HALF_BITS = 0x3F3504F3  # the fp32 pattern of sqrt(1/2): mantissas are taken from [sqrt(1/2), sqrt(2))

_LOW = 0xFFFFFFFF


def split_words(value: int) -> tuple[int, int]:
    """The (low, high) 32-bit words of a 64-bit integer, signed or not, each in [0, 2^32)."""
    return value & _LOW, (value >> 32) & _LOW


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox-4x32-10, word for word as published.

    `counter` is int64 [..., 4] with values in [0, 2^32), `key` is (low word, high word). Returns int64 [..., 4],
    values in [0, 2^32). Works on any device that multiplies int64.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(ROUNDS):
        product_a, product_b = c0 * MULTIPLIER_A, c2 * MULTIPLIER_B
        c0, c1 = ((product_b >> 32) & _LOW) ^ c1 ^ k0, product_b & _LOW
        c2, c3 = ((product_a >> 32) & _LOW) ^ c3 ^ k1, product_a & _LOW
        k0, k1 = (k0 + KEY_STEP_A) & _LOW, (k1 + KEY_STEP_B) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def random_bits(keys: Tensor, token_in_example: Tensor, channels: int, *, seed: int, site: int) -> Tensor:
    """The raw 32-bit integers of the noise, as int64 [B, T, ceil(channels / 4), 4].

    `keys` is int64 [B], `token_in_example` int64 [B, T] or [B, 1], `seed` 64 bit, `site` 32 bit.
    """
    blocks = -(-channels // 4)
    block = (token_in_example[..., None] * blocks + torch.arange(blocks, device=keys.device)) & _LOW
    low, high = (keys & _LOW)[:, None, None], ((keys >> 32) & _LOW)[:, None, None]
    words = (block, low.expand_as(block), high.expand_as(block), torch.full_like(block, site & _LOW))
    return philox4x32(torch.stack(words, dim=-1), split_words(seed))


def from_bits(bits: Tensor, distribution: str) -> Tensor:
    """Noise at unit sigma, fp32 [..., 4], from the raw integers [..., 4] of `philox4x32`."""
    if distribution == "uniform":
        return ((_signed(bits) >> 8).double().add_(0.5) * 2.0**-23).float()
    if distribution == "uniform_released":
        return _open_unit(bits).float()
    if distribution != "normal":
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    radius = torch.sqrt(-2.0 * torch.log(_open_unit(bits[..., 0::2])))
    turn = bits[..., 1::2]
    within = ((_signed((turn << 2) & _LOW) >> 8).double() + 0.5) * 2.0**-23
    angle = (turn >> 30).double() * (math.pi / 2) + within * (math.pi / 4)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2).float()


def noise_reference(
    keys: Tensor, spans: Tensor, tokens: int, channels: int, *, seed: int, site: int, distribution: str
) -> Tensor:
    """The noise of a batch at unit sigma, fp32 [B, tokens, channels], zero outside the spans.

    `keys` is int64 [B]; `spans` [B, 2] holds the first real token and one past the last. Raises ValueError for an
    unknown distribution. This is the definition that every fast path is tested against.
    """
    token_in_example = torch.arange(tokens, device=keys.device) - spans[:, :1]
    bits = random_bits(keys, token_in_example, channels, seed=seed, site=site)
    noise = from_bits(bits, distribution).flatten(-2)[..., :channels]
    return torch.where(inside_spans(spans, tokens)[..., None], noise, 0.0)


def inside_spans(spans: Tensor, tokens: int) -> Tensor:
    """True where a token lies in its example's span: bool [B, tokens] from `spans` [B, 2]."""
    position = torch.arange(tokens, device=spans.device)
    return (position >= spans[:, :1]) & (position < spans[:, 1:])


def _signed(bits: Tensor) -> Tensor:
    return bits - ((bits >> 31) << 32)


def _open_unit(bits: Tensor) -> Tensor:
    return ((bits >> 9).double() + 0.5) * 2.0**-23


def _device_function(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


def _constant(value: float) -> Any:
    return value if triton is None else tl.constexpr(value)


_A, _B = _constant(MULTIPLIER_A), _constant(MULTIPLIER_B)
_STEP_A, _STEP_B = _constant(KEY_STEP_A), _constant(KEY_STEP_B)
_LOG0, _LOG1, _LOG2, _LOG3, _LOG4, _LOG5, _LOG6, _LOG7 = map(_constant, LOG)
_SIN0, _SIN1, _SIN2, _SIN3 = map(_constant, SIN)
_COS0, _COS1, _COS2, _COS3 = map(_constant, COS)
_LN2, _SQRT_HALF_BITS = _constant(LN2), _constant(SQRT_HALF_BITS)
_UNIT = _constant(2.0**-23)


@_device_function
def triton_bits(block, key_low, key_high, site, seed_low, seed_high):
    """Philox for a vector of uint32 `block`s; the other words are uint32 scalars. Returns four uint32 vectors."""
    c0 = block
    c1 = tl.full(block.shape, 0, tl.uint32) + key_low
    c2 = tl.full(block.shape, 0, tl.uint32) + key_high
    c3 = tl.full(block.shape, 0, tl.uint32) + site
    a = tl.full(block.shape, _A, tl.uint32)
    b = tl.full(block.shape, _B, tl.uint32)
    k0 = seed_low
    k1 = seed_high
    for _ in tl.static_range(10):
        next0 = tl.umulhi(b, c2) ^ c1 ^ k0
        next2 = tl.umulhi(a, c0) ^ c3 ^ k1
        c1 = tl.mul(b, c2, sanitize_overflow=False)
        c3 = tl.mul(a, c0, sanitize_overflow=False)
        c0 = next0
        c2 = next2
        k0 = tl.add(k0, _STEP_A, sanitize_overflow=False)
        k1 = tl.add(k1, _STEP_B, sanitize_overflow=False)
    return c0, c1, c2, c3


@_device_function
def _triton_open_unit(bits):
    return ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * _UNIT


@_device_function
def _triton_signed_unit(bits):
    return ((bits.to(tl.int32, bitcast=True) >> 8).to(tl.float32) + 0.5) * _UNIT


@_device_function
def _triton_normal_pair(radius_bits, angle_bits):
    u = _triton_open_unit(radius_bits)
    pattern = u.to(tl.int32, bitcast=True)
    exponent = (pattern - _SQRT_HALF_BITS) >> 23
    f = (pattern - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, _LOG7, _LOG6)
    p = tl.fma(p, f, _LOG5)
    p = tl.fma(p, f, _LOG4)
    p = tl.fma(p, f, _LOG3)
    p = tl.fma(p, f, _LOG2)
    p = tl.fma(p, f, _LOG1)
    p = tl.fma(p, f, _LOG0)
    log_u = tl.fma(exponent.to(tl.float32), _LN2, tl.fma(f * f, p, f))
    radius = tl.sqrt_rn(-2.0 * log_u)

    quadrant = angle_bits >> 30
    g = _triton_signed_unit(angle_bits << 2)
    g2 = g * g
    sine = g * tl.fma(tl.fma(tl.fma(g2, _SIN3, _SIN2), g2, _SIN1), g2, _SIN0)
    cosine = tl.fma(tl.fma(tl.fma(tl.fma(g2, _COS3, _COS2), g2, _COS1), g2, _COS0), g2, 1.0)
    swap = (quadrant & 1) != 0
    x = tl.where(swap, sine, cosine)
    y = tl.where(swap, cosine, sine)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return radius * x, radius * y


@_device_function
def triton_noise(block, key_low, key_high, site, seed_low, seed_high, DISTRIBUTION: tl.constexpr):
    """Noise at unit sigma for the channels of a vector of blocks: fp32 [4 * len(block)], in channel order.

    `DISTRIBUTION` is an index into `DISTRIBUTIONS`.
    """
    r0, r1, r2, r3 = triton_bits(block, key_low, key_high, site, seed_low, seed_high)
    if DISTRIBUTION == 0:
        z0, z1 = _triton_normal_pair(r0, r1)
        z2, z3 = _triton_normal_pair(r2, r3)
    elif DISTRIBUTION == 1:
        z0, z1, z2, z3 = (
            _triton_signed_unit(r0),
            _triton_signed_unit(r1),
            _triton_signed_unit(r2),
            _triton_signed_unit(r3),
        )
    else:
        z0, z1, z2, z3 = (
            _triton_open_unit(r0),
            _triton_open_unit(r1),
            _triton_open_unit(r2),
            _triton_open_unit(r3),
        )
    pairs = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(pairs, (4 * block.shape[0],))
