"""The sum of all layers' hidden states, each weighed by a gate of its layer and example, and the way back.

    mixed[b, t, :] = sum_l gates[l, b] * states[l][b, t, :]

`states` are L separate tensors [B, T, D] of one dtype, read where they lie: no stack [L, B, T, D] is written. gates is
[L, B] in fp32 (float64 for float64 states). The sum is taken in fp32 registers. One pass reads L * N elements, N = B * T *
D, and writes N; on a GPU a state whose gate is 0, as a closed ReLU leaves it, is not read.

Backward, with the gradient g [B, T, D] of `mixed`, in one pass that reads (L + 1) N and writes L * N:

    states[l]: gates[l, b] * g[b, t, :]          gates[l, b]: sum_(t, d) g[b, t, d] * states[l][b, t, d]

Source: the complementary representation of HIRE, arXiv 1911.01940.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from dist_reg_kernels import rows
from dist_reg_kernels.rows import add, row_load, row_store

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

STATES_PER_LAUNCH = 16
"""A launch takes that many pointers (24 spilled registers on sm_80); of more layers the sum is carried on in fp32."""


def layer_mix_reference(states: Tensor, gates: Tensor) -> Tensor:
    """The formula: `states` stacked [L, B, T, D], gates [L, B]."""
    return (gates[:, :, None, None] * states).sum(0)


def layer_mix_torch(states: Sequence[Tensor], gates: Tensor) -> Tensor:
    """The fallback in plain torch, on any device and floating dtype: [B, T, D] in the dtype of the states."""
    mixed = torch.zeros(states[0].shape, dtype=gates.dtype, device=gates.device)
    for state, gate in zip(states, gates):
        mixed.addcmul_(state.to(gates.dtype), gate[:, None, None])
    return mixed.to(states[0].dtype)


def layer_mix_backward_torch(
    gradient: Tensor, states: Sequence[Tensor], gates: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the states, L tensors [B, T, D], and of the gates [L, B], in plain torch."""
    wide = gradient.to(gates.dtype)
    to_states = [(wide * gate[:, None, None]).to(gradient.dtype) for gate in gates]
    to_gates = [(wide * state.to(gates.dtype)).sum((1, 2)) for state in states]
    return to_states, torch.stack(to_gates)


def _layer_mix_kernel(
    states,
    gates_ptr,
    carried_ptr,
    out_ptr,
    tokens,
    batch,
    channels,
    STATES: tl.constexpr,
    CARRIED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    example = row // tokens
    offset = row * channels
    for start in range(0, channels, 4 * BLOCKS):
        total = tl.full((4 * BLOCKS,), 0.0, tl.float32)
        if CARRIED:
            total = row_load(carried_ptr + offset, start, 1, channels, BLOCKS)
        for state in tl.static_range(STATES):
            gate = tl.load(gates_ptr + state * batch + example)
            if gate != 0:
                total += gate * row_load(states[state] + offset, start, 1, channels, BLOCKS)
        row_store(out_ptr + offset, start, channels, total, BLOCKS)


def _layer_mix_backward_kernel(
    states,
    outs,
    gradient_ptr,
    gates_ptr,
    dots_ptr,
    tokens,
    batch,
    channels,
    STATES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows_of_batch = tl.num_programs(0).to(tl.int64)
    example = row // tokens
    offset = row * channels
    for state in tl.static_range(STATES):
        gate = tl.load(gates_ptr + state * batch + example)
        products = tl.full((4 * BLOCKS,), 0.0, tl.float32)
        for start in range(0, channels, 4 * BLOCKS):
            gradient = row_load(gradient_ptr + offset, start, 1, channels, BLOCKS)
            products += gradient * row_load(states[state] + offset, start, 1, channels, BLOCKS)
            row_store(outs[state] + offset, start, channels, gate * gradient, BLOCKS)
        tl.store(dots_ptr + state * rows_of_batch + row, tl.reduce(products, 0, add))


if triton is not None:
    _layer_mix_kernel = triton.jit(_layer_mix_kernel, do_not_specialize=["tokens", "batch"])
    _layer_mix_backward_kernel = triton.jit(_layer_mix_backward_kernel, do_not_specialize=["tokens", "batch"])


def layer_mix_triton(states: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Launch the forward kernel: one program a token. fp32, bf16 and fp16."""
    batch, tokens, channels = states[0].shape
    out = torch.empty(states[0].shape, dtype=states[0].dtype, device=gates.device)
    if out.numel() == 0:
        return out
    blocks, warps = rows.block_and_warps(channels)
    carried = None
    with torch.cuda.device(gates.device) if gates.is_cuda else nullcontext():
        for first in range(0, len(states), STATES_PER_LAUNCH):
            some = tuple(state.contiguous() for state in states[first : first + STATES_PER_LAUNCH])
            last = first + len(some) == len(states)
            target = out if last else torch.empty(out.shape, dtype=torch.float32, device=out.device)
            _layer_mix_kernel[(batch * tokens,)](
                some,
                gates[first:].contiguous(),
                carried,
                target,
                tokens,
                batch,
                channels,
                STATES=len(some),
                CARRIED=carried is not None,
                BLOCKS=blocks,
                num_warps=warps,
            )
            carried = target
    return out


def layer_mix_backward_triton(
    gradient: Tensor, states: Sequence[Tensor], gates: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Launch the backward kernel: one program a token, all layers of it."""
    batch, tokens, channels = gradient.shape
    outs = [torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device) for _ in states]
    dots = torch.empty(len(states), batch, tokens, dtype=torch.float32, device=gradient.device)
    if gradient.numel() == 0:
        return outs, torch.zeros_like(gates)
    blocks, warps = rows.block_and_warps(channels)
    gradient = gradient.contiguous()
    with torch.cuda.device(gates.device) if gates.is_cuda else nullcontext():
        for first in range(0, len(states), STATES_PER_LAUNCH):
            some = tuple(state.contiguous() for state in states[first : first + STATES_PER_LAUNCH])
            _layer_mix_backward_kernel[(batch * tokens,)](
                some,
                tuple(outs[first : first + len(some)]),
                gradient,
                gates[first:].contiguous(),
                dots[first:],
                tokens,
                batch,
                channels,
                STATES=len(some),
                BLOCKS=blocks,
                num_warps=warps,
            )
    return outs, dots.sum(2)
