"""The gated sum of all layers' hidden states: `dist_reg_kernels.layer_mix`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_reg.errors import UserError
from dist_reg.ops.backend import implementation
from dist_reg.ops.checks import check_device, check_same, check_stream


def layer_mix(states: Sequence[Tensor], gates: Tensor) -> Tensor:
    """sum_l gates[l, b] * states[l][b], without a stack of the states.

    `states` are L tensors [B, T, D] of one shape, dtype (fp32, bf16, fp16 or fp64) and device, any strides; `gates` [L, B]
    is fp32, or float64 where the states are. Returns [B, T, D] in the dtype of the states. Differentiable in both.

    Raises ValueError, naming the argument, for a wrong shape, dtype or device.
    """
    if not states:
        raise UserError("states must hold the hidden states of one layer or more, got none")
    for i, state in enumerate(states):
        check_stream(f"states[{i}]", state)
        check_same(f"states[{i}]", state, "states[0]", states[0])
    expected = torch.float64 if states[0].dtype == torch.float64 else torch.float32
    shape = [len(states), states[0].shape[0]]
    if gates.dtype != expected or list(gates.shape) != shape:
        raise UserError(
            f"gates must be {expected} [layers, batch] = {shape}, got {gates.dtype} {list(gates.shape)}"
        )
    check_device("gates", gates, states[0])
    return _layer_mix(list(states), gates)


@torch.library.custom_op("dist_reg::layer_mix", mutates_args=())
def _layer_mix(states: list[Tensor], gates: Tensor) -> Tensor:
    return implementation("layer_mix", "layer_mix", states[0])(states, gates)


@_layer_mix.register_fake
def _(states: list[Tensor], gates: Tensor) -> Tensor:
    return states[0].new_empty(states[0].shape)


@torch.library.custom_op("dist_reg::layer_mix_backward", mutates_args=())
def _layer_mix_backward(gradient: Tensor, states: list[Tensor], gates: Tensor) -> tuple[list[Tensor], Tensor]:
    return implementation("layer_mix", "layer_mix_backward", gradient)(gradient, states, gates)


@_layer_mix_backward.register_fake
def _(gradient: Tensor, states: list[Tensor], gates: Tensor) -> tuple[list[Tensor], Tensor]:
    return [state.new_empty(state.shape) for state in states], gates.new_empty(gates.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    states, gates = inputs
    ctx.save_for_backward(gates, *states)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    gates, *states = ctx.saved_tensors
    return _layer_mix_backward(gradient, states, gates)


_layer_mix.register_autograd(_gradients, setup_context=_save)
