"""Public functional operations; each picks its Triton kernel, its CPU path or its plain torch reference.

The only importer of `dist_reg_kernels`. CUDA tensors take Triton, CPU tensors Numba, all others the reference;
the environment variable `DIST_REG_KERNELS` (triton, cpu or reference) forces one.
"""

import math
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dist_reg.errors import UserError, nearest

DISTRIBUTIONS = ("normal", "uniform", "uniform_released")
SCALES = ("absolute", "relative")
BACKENDS = ("triton", "cpu", "reference")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def perturb(
    hidden_states: Tensor,
    *,
    sigma: float,
    seed: int,
    example_keys: Tensor,
    site: int,
    spans: Tensor | None = None,
    distribution: str = "normal",
    scale: str = "absolute",
) -> Tensor:
    """hidden_states + s * eps, with eps a function of (seed, example key, site, token, channel) alone.

    `hidden_states` [B, T, D] is fp32, bf16, fp16 or fp64, any strides; the result is contiguous, of the same
    dtype. `seed` is a 64-bit integer, `site` a 32-bit one (`noise.site_id`). `example_keys` is int64 [B]
    (`noise.example_keys`). `spans` int32 or int64 [B, 2] holds the first real token and one past the last; tokens
    outside are copied, and None means all. `distribution` at unit sigma is "normal" N(0, 1), "uniform" U(-1, 1)
    or "uniform_released" U(0, 1), the form in HyPe's released code. `scale` "absolute" makes s = sigma,
    "relative" makes it sigma times the token's root mean square over D. The gradient is the identity.

    Raises ValueError, naming the argument, for a wrong shape, dtype, device or option.
    """
    _check(hidden_states, sigma, example_keys, spans, distribution, scale)
    return _perturb(
        hidden_states,
        example_keys,
        spans,
        seed - (1 << 64) if seed >= 1 << 63 else seed,
        site,
        sigma,
        distribution,
        scale == "relative",
    )


@torch.library.custom_op("dist_reg::perturb", mutates_args=())
def _perturb(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    function = _implementation(_backend(hidden))
    return function(hidden, keys, spans, seed, site, sigma, distribution, relative)


@_perturb.register_fake
def _(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _identity_gradient(_context: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None, None, None, None


_perturb.register_autograd(_identity_gradient)


def _check(
    hidden: Tensor, sigma: float, keys: Tensor, spans: Tensor | None, distribution: str, scale: str
) -> None:
    if hidden.ndim != 3:
        raise UserError(f"hidden_states must be [batch, tokens, channels], got shape {list(hidden.shape)}")
    if hidden.dtype not in _DTYPES:
        raise UserError(f"hidden_states must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    batch = hidden.shape[0]
    if keys.dtype != torch.int64 or keys.ndim != 1 or keys.shape[0] != batch:
        raise UserError(
            f"example_keys must be int64 [batch] = [{batch}], got {keys.dtype} {list(keys.shape)}"
        )
    if keys.device != hidden.device:
        raise UserError(f"example_keys must be on {hidden.device} like hidden_states, got {keys.device}")
    if spans is not None:
        if spans.dtype not in (torch.int32, torch.int64) or spans.shape != (batch, 2):
            raise UserError(
                f"spans must be int32 or int64 [batch, 2] = [{batch}, 2], got {spans.dtype} {list(spans.shape)}"
            )
        if spans.device != hidden.device:
            raise UserError(f"spans must be on {hidden.device} like hidden_states, got {spans.device}")
    if not 0 <= sigma < math.inf:
        raise UserError(f"sigma must be a finite number not below 0, got {sigma}")
    if distribution not in DISTRIBUTIONS:
        raise UserError(f"unknown distribution {distribution!r}: {nearest(distribution, DISTRIBUTIONS)}")
    if scale not in SCALES:
        raise UserError(f"unknown scale {scale!r}: {nearest(scale, SCALES)}")


def _backend(hidden: Tensor) -> str:
    forced = os.environ.get("DIST_REG_KERNELS")
    device = hidden.device.type
    if not forced:
        if device == "cpu":
            return "cpu"
        return "triton" if device == "cuda" and hidden.dtype != torch.float64 else "reference"
    if forced not in BACKENDS:
        raise UserError(f"unknown DIST_REG_KERNELS={forced!r}: {nearest(forced, BACKENDS)}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if forced == "triton" and device != "cuda" and not interpreted:
        raise UserError(
            f"DIST_REG_KERNELS=triton needs CUDA tensors, got {device}; on a CPU set TRITON_INTERPRET=1 as well"
        )
    if forced == "triton" and hidden.dtype == torch.float64:
        raise UserError("DIST_REG_KERNELS=triton takes float32, bfloat16 or float16, got float64")
    if forced == "cpu" and device != "cpu":
        raise UserError(f"DIST_REG_KERNELS=cpu needs CPU tensors, got {device}")
    return forced


@cache
def _implementation(backend: str) -> Callable[..., Tensor]:
    # Imported at the first call: `import dist_reg` stays quick, and Triton reads TRITON_INTERPRET late.
    from dist_reg_kernels import perturb as kernels

    if backend == "triton":
        if kernels.triton is not None:
            return kernels.perturb_triton
        _warn_slow("triton>=3.6")
    elif backend == "cpu":
        try:
            from dist_reg_kernels.perturb_cpu import perturb_cpu
        except ImportError:
            _warn_slow("numba>=0.62")
        else:
            return perturb_cpu
    return kernels.perturb_torch


def _warn_slow(requirement: str) -> None:
    warnings.warn(
        f"{requirement} is not installed: the noise is made by the slow torch reference", stacklevel=2
    )
