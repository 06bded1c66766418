"""Both directions of KL between two tensors of logits: `dist_reg_kernels.symmetric_kl`."""

from typing import Any

import torch
from torch import Tensor

from dist_reg.ops.backend import implementation
from dist_reg.ops.checks import check_logits, check_mask, check_same


def symmetric_kl(logits: Tensor, other_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """KL(p || q) + KL(q || p) with p = softmax(logits), q = softmax(other_logits) over the last dimension.

    `logits` and `other_logits` [..., V] have one shape, dtype (fp32, bf16, fp16 or fp64) and device, any strides;
    the result [...] is fp32 (fp64 for fp64). Where `mask`, bool [...], is False the result and both gradients are 0,
    whatever the logits are. An entry that is -inf on both sides contributes nothing; -inf on one side only
    makes the result inf and its gradient NaN. Differentiable once, in both arguments.

    Raises ValueError, naming the argument, for a wrong shape, dtype or device.
    """
    check_logits("logits", logits)
    check_same("other_logits", other_logits, "logits", logits)
    check_mask(mask, logits.shape[:-1], "logits", logits)
    return _symmetric_kl(logits, other_logits, mask)[0]


@torch.library.custom_op("dist_reg::symmetric_kl", mutates_args=())
def _symmetric_kl(logits: Tensor, other: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return implementation("symmetric_kl", "symmetric_kl", logits)(logits, other, mask)


@_symmetric_kl.register_fake
def _(logits: Tensor, other: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = logits.shape[:-1]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((*rows, 7), dtype=dtype)


@torch.library.custom_op("dist_reg::symmetric_kl_backward", mutates_args=())
def _symmetric_kl_backward(
    gradient: Tensor, logits: Tensor, other: Tensor, mask: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor]:
    function = implementation("symmetric_kl", "symmetric_kl_backward", logits)
    return function(gradient, logits, other, mask, saved)


@_symmetric_kl_backward.register_fake
def _(
    gradient: Tensor, logits: Tensor, other: Tensor, mask: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), other.new_empty(other.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_symmetric_kl_backward(gradient, *ctx.saved_tensors), None


_symmetric_kl.register_autograd(_gradients, setup_context=_save)
