"""What the arguments of an operation must be; every check raises a UserError that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_reg.errors import UserError, nearest

DISTRIBUTIONS = ("normal", "uniform", "uniform_released")
SCALES = ("absolute", "relative")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_stream(name: str, tensor: Tensor) -> None:
    """A stream of hidden states [batch, tokens, channels] in a floating dtype that the kernels know."""
    if tensor.ndim != 3:
        raise UserError(f"{name} must be [batch, tokens, channels], got shape {list(tensor.shape)}")
    check_dtype(name, tensor)


def check_dtype(name: str, tensor: Tensor) -> None:
    """One of the floating dtypes that the kernels know."""
    if tensor.dtype not in DTYPES:
        raise UserError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, stream: Tensor) -> None:
    """Of the shape, dtype and device of the stream called hidden_states."""
    if tensor.shape != stream.shape or tensor.dtype != stream.dtype:
        raise UserError(
            f"{name} must be {stream.dtype} {list(stream.shape)} like hidden_states, "
            f"got {tensor.dtype} {list(tensor.shape)}"
        )
    check_device(name, tensor, stream)


def check_channels(name: str, tensor: Tensor, stream: Tensor) -> None:
    """A number a channel of the stream called hidden_states, in a floating dtype that the kernels know."""
    if tensor.ndim != 1 or tensor.shape[0] != stream.shape[2]:
        raise UserError(f"{name} must be [channels] = [{stream.shape[2]}], got shape {list(tensor.shape)}")
    check_dtype(name, tensor)
    check_device(name, tensor, stream)


def check_device(name: str, tensor: Tensor, stream: Tensor) -> None:
    """On the device of the stream called hidden_states."""
    if tensor.device != stream.device:
        raise UserError(f"{name} must be on {stream.device} like hidden_states, got {tensor.device}")


def check_epsilon(epsilon: float) -> None:
    """What a norm adds to the variance."""
    if not 0 <= epsilon < math.inf:
        raise UserError(f"epsilon must be a finite number not below 0, got {epsilon}")


def check_logits(name: str, tensor: Tensor) -> None:
    """Logits [..., V] with V of 1 or more, in a floating dtype that the kernels know."""
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise UserError(f"{name} must be [..., V] with V of 1 or more, got shape {list(tensor.shape)}")
    check_dtype(name, tensor)


def check_same(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """The shape, dtype and device of the tensor called `like_name`."""
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(like, what), getattr(tensor, what)
        if got != expected:
            if what == "shape":
                expected, got = list(expected), list(got)
            raise UserError(f"{name} must have the {what} of {like_name}, {expected}, got {got}")


def check_mask(mask: Tensor | None, shape: torch.Size, like_name: str, like: Tensor) -> None:
    """`mask`: None, or bool of `shape` on the device of the tensor called `like_name`."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != shape:
        raise UserError(f"mask must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    if mask.device != like.device:
        raise UserError(f"mask must be on {like.device} like {like_name}, got {mask.device}")


def check_keys(keys: Tensor, batch: int, stream: Tensor, name: str = "hidden_states") -> None:
    """`example_keys`: int64 [batch], on the device of the stream called `name`."""
    if keys.dtype != torch.int64 or keys.ndim != 1 or keys.shape[0] != batch:
        raise UserError(
            f"example_keys must be int64 [batch] = [{batch}], got {keys.dtype} {list(keys.shape)}"
        )
    if keys.device != stream.device:
        raise UserError(f"example_keys must be on {stream.device} like {name}, got {keys.device}")


def check_spans(spans: Tensor | None, batch: int, stream: Tensor, name: str = "hidden_states") -> None:
    """`spans`: None, or int32 or int64 [batch, 2] on the device of the stream called `name`."""
    if spans is None:
        return
    if spans.dtype not in (torch.int32, torch.int64) or spans.shape != (batch, 2):
        raise UserError(
            f"spans must be int32 or int64 [batch, 2] = [{batch}, 2], got {spans.dtype} {list(spans.shape)}"
        )
    if spans.device != stream.device:
        raise UserError(f"spans must be on {stream.device} like {name}, got {spans.device}")


def check_noise(sigma: float, distribution: str, scale: str) -> None:
    """The size and kind of the noise."""
    if not 0 <= sigma < math.inf:
        raise UserError(f"sigma must be a finite number not below 0, got {sigma}")
    if distribution not in DISTRIBUTIONS:
        raise UserError(f"unknown distribution {distribution!r}: {nearest(distribution, DISTRIBUTIONS)}")
    if scale not in SCALES:
        raise UserError(f"unknown scale {scale!r}: {nearest(scale, SCALES)}")


def signed_seed(seed: int) -> int:
    """The 64-bit `seed`, signed or not, as the signed integer that a custom operator takes."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
