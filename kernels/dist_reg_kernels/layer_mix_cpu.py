"""layer_mix.py's operations on the CPU: one compiled pass over the tokens, which reads every layer's row where it lies.

fp32, fp64 and bf16 are read as they lie; fp16 goes through fp32 copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from dist_reg_kernels.rows_cpu import as_rows, compiled, for_rows, place, store, wide


@intrinsic
def pointer_like(_context, address, array):
    """A pointer to elements of the dtype of `array` at the integer `address`."""
    pointer = types.CPointer(array.dtype)

    def generate(context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, array), generate


@numba.njit(inline="always")
def row_at(address, row, like):
    """Row number `row` of the contiguous rows at `address`, as wide as those of `like`."""
    columns = like.shape[1]
    return numba.carray(pointer_like(address + row * columns * like.itemsize, like), (columns,))


@numba.njit(inline="always")
def _add_weighed(total, row, gate):
    for i in range(total.size):
        total[i] += gate * wide(row, i)


@compiled
def _mix(begin, end, addresses, gates, out, tokens):
    total = np.empty(out.shape[1], gates.dtype)
    for r in range(begin, end):
        example, _ = place(r, tokens)
        total[:] = 0
        for state in range(addresses.size):
            gate = gates[state, example]
            if gate != 0:
                _add_weighed(total, row_at(addresses[state], r, out), gate)
        row = out[r]
        for i in range(total.size):
            store(row, i, total[i])


@numba.njit(fastmath={"reassoc"})
def _product(one, other, zero):
    total = zero
    for i in range(one.size):
        total += wide(one, i) * wide(other, i)
    return total


@numba.njit(inline="always")
def _weigh(out, row, gate):
    for i in range(out.size):
        store(out, i, gate * wide(row, i))


@compiled
def _mix_backward(begin, end, addresses, targets, gates, gradient, dots, tokens):
    for r in range(begin, end):
        example, _ = place(r, tokens)
        for state in range(addresses.size):
            gate = gates[state, example]
            dots[state, r] = _product(gradient[r], row_at(addresses[state], r, gradient), dots.dtype.type(0))
            _weigh(row_at(targets[state], r, gradient), gradient[r], gate)


def layer_mix_cpu(states: Sequence[Tensor], gates: Tensor) -> Tensor:
    """The forward operation of layer_mix.py on CPU tensors; the arguments of `layer_mix.layer_mix_torch`."""
    if states[0].dtype == torch.float16:
        return layer_mix_cpu([state.float() for state in states], gates).half()
    batch, tokens, channels = states[0].shape
    out = torch.empty(states[0].shape, dtype=states[0].dtype)
    if out.numel() == 0:
        return out
    held = [state.detach().contiguous() for state in states]
    arguments = (_addresses(held), gates.detach().contiguous().numpy(), as_rows(out), tokens)
    for_rows(_mix, batch * tokens, channels * len(states) // 4, arguments)
    return out


def layer_mix_backward_cpu(
    gradient: Tensor, states: Sequence[Tensor], gates: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The backward operation on CPU tensors; the arguments of `layer_mix.layer_mix_backward_torch`."""
    if gradient.dtype == torch.float16:
        outs, dots = layer_mix_backward_cpu(gradient.float(), [state.float() for state in states], gates)
        return [out.half() for out in outs], dots
    batch, tokens, channels = gradient.shape
    outs = [torch.empty(gradient.shape, dtype=gradient.dtype) for _ in states]
    if gradient.numel() == 0:
        return outs, torch.zeros_like(gates)
    held = [state.detach().contiguous() for state in states]
    dots = torch.empty(len(states), batch * tokens, dtype=gates.dtype)
    arguments = (
        _addresses(held),
        _addresses(outs),
        gates.detach().contiguous().numpy(),
        as_rows(gradient),
        dots.numpy(),
        tokens,
    )
    for_rows(_mix_backward, batch * tokens, channels * len(states) // 4, arguments)
    return outs, dots.view(len(states), batch, tokens).sum(2)


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
