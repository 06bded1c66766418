"""Which implementation of an operation runs: Triton, the CPU path or the torch reference."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dist_reg.errors import UserError, nearest

BACKENDS = ("triton", "cpu", "reference")

REQUIREMENTS = {"triton": "triton>=3.6", "cpu": "numba>=0.62"}


def implementation(family: str, operation: str, tensor: Tensor) -> Callable[..., Any]:
    """`operation` of the kernel file `family` for tensors like `tensor`.

    The file `FAMILY.py` of dist_reg_kernels holds OPERATION_triton and OPERATION_torch, `FAMILY_cpu.py` holds
    OPERATION_cpu. Where what a backend needs is not installed, the torch form with one warning.
    """
    return _load(family, operation, backend_of(tensor))


def backend_of(tensor: Tensor) -> str:
    """The backend for tensors like `tensor`. Raises UserError where the forced one cannot take them."""
    forced = os.environ.get("DIST_REG_KERNELS")
    if not forced and tensor.is_cpu:
        return "cpu"
    device = tensor.device.type
    if not forced:
        return "triton" if device == "cuda" and tensor.dtype != torch.float64 else "reference"
    if forced not in BACKENDS:
        raise UserError(f"unknown DIST_REG_KERNELS={forced!r}: {nearest(forced, BACKENDS)}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if forced == "triton" and device != "cuda" and not interpreted:
        raise UserError(
            f"DIST_REG_KERNELS=triton needs CUDA tensors, got {device}; on a CPU set TRITON_INTERPRET=1 as well"
        )
    if forced == "triton" and tensor.dtype == torch.float64:
        raise UserError("DIST_REG_KERNELS=triton takes float32, bfloat16 or float16, got float64")
    if forced == "cpu" and device != "cpu":
        raise UserError(f"DIST_REG_KERNELS=cpu needs CPU tensors, got {device}")
    return forced


def nobody_watches(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` may run at once, past torch's dispatcher, which takes a tenth of a millisecond on
    caches gone cold: only who compiles, traces or counts operators would miss it."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and not _modes() and not _transforms()


_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active


@cache
def _load(family: str, operation: str, backend: str) -> Callable[..., Any]:
    # Imported at the first call: `import dist_reg` stays quick, and Triton reads TRITON_INTERPRET late.
    kernels = import_module(f"dist_reg_kernels.{family}")
    if backend == "triton":
        if _new_enough(kernels.triton):
            return getattr(kernels, f"{operation}_triton")
        _warn_slow(backend)
    elif backend == "cpu":
        try:
            return getattr(import_module(f"dist_reg_kernels.{family}_cpu"), f"{operation}_cpu")
        except ImportError:
            _warn_slow(backend)
    return getattr(kernels, f"{operation}_torch")


def _new_enough(triton: Any) -> bool:
    return triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


@cache
def _warn_slow(backend: str) -> None:
    warnings.warn(
        f"{REQUIREMENTS[backend]} is not installed: the slow torch reference does its work", stacklevel=2
    )
