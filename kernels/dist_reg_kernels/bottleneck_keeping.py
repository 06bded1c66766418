"""bottleneck.py's operation where memory is cheaper than arithmetic: the backward reads what the forward computed on the way.

A token that takes a view of width d keeps at most 2 D + 5 d numbers; a transformer layer keeps some 30 D for its own backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dist_reg_kernels.bottleneck import Inside, Uniform, Visit, come_back, forward, uniform_torch


def keeping_torch(
    *arguments: Any, uniform: Uniform = uniform_torch
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Any]]:
    """As `bottleneck.bottleneck_torch` of the same arguments, with the tensors that were computed on the way and what tells them apart."""
    kept: list[tuple[Visit, Inside]] = []
    out, error = forward(*arguments, uniform, kept)
    tensors: list[Tensor | None] = []
    plan: list[Any] = []
    for visit, inside in kept:
        plan.append((visit.view, visit.bounds, visit.taken_bounds, len(inside.narrow)))
        tensors += [visit.rows, visit.taken, *inside.narrow]
        tensors += [getattr(inside, name) for name in _PLAIN]
    return out, error, tensors, plan


def kept_backward_torch(
    gradient: Tensor,
    error_gradient: Tensor,
    hidden: Tensor,
    weights: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    plan: Sequence[Any],
    reconstruct: str,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of `hidden` and of the weights, from what `keeping_torch` gave."""
    found: list[tuple[Visit, Inside]] = []
    rest: Any = list(tensors)
    for view, bounds, taken_bounds, narrow in plan:
        end = 2 + narrow + len(_PLAIN)
        (rows, taken, *own), rest = rest[:end], rest[end:]
        plain = dict(zip(_PLAIN, own[narrow:], strict=True))
        found.append((Visit(view, rows, bounds, taken, taken_bounds), Inside(**plain, narrow=own[:narrow])))
    return come_back(gradient, error_gradient, hidden, weights, found, reconstruct)


_PLAIN = tuple(name for name in Inside._fields if name != "narrow")
