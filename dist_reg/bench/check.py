"""Whether an operation still computes its formula: outputs and gradients against float64, in the run that times it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from dist_reg import ops
from dist_reg.bench.operations import Batch, Operation, Outputs


class Errors(NamedTuple):
    """Largest difference from the formula in float64, as a share of its largest value."""

    ours: float
    plain: float
    """The plain form's in the same dtype, with the same noise."""


class CheckFailed(Exception):
    """An operation is further from its formula than rounding allows."""


def check(operation: Operation, batch: Batch) -> dict[str, Errors]:
    """The errors of each pass. Raises CheckFailed for a value out of bounds.

    Allowed is twice the error of the plain form in that dtype and a unit in the last place, of the sum for a sum.
    """
    streams = operation.streams(batch)
    drawn = _reference_noise(operation, batch)
    wide = batch._replace(mask=batch.mask.double())
    upstream = upstream_of(operation.ours(batch, *streams))

    def plain(batch: Batch) -> Callable[..., Outputs]:
        return lambda *given: operation.plain(lambda like: drawn.to(like.dtype), batch, *given)

    exact = _results(plain(wide), [stream.double() for stream in streams], upstream)
    eager = _results(plain(batch), streams, upstream)
    ours = _results(lambda *given: operation.ours(batch, *given), streams, upstream)

    found = {}
    for which, *triples in zip(("forward", "backward"), ours, eager, exact):
        pairs = [_errors(which, *three, columns=streams[0].shape[-1]) for three in zip(*triples)]
        found[which] = Errors(*(max(errors) for errors in zip(*pairs)))
    found["both"] = Errors(*(max(errors) for errors in zip(*found.values())))
    return found


def upstream_of(outputs: Outputs) -> list[Tensor]:
    """A gradient for every output, the same for outputs of the same shapes."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    narrow = outputs[0].dtype  # the values that every variant's output dtype holds
    return [
        torch.randn(output.shape, generator=generator, device=output.device).to(narrow) for output in outputs
    ]


def _results(
    function: Callable[..., Outputs], streams: Sequence[Tensor], upstream: list[Tensor]
) -> tuple[Outputs, Outputs]:
    leaves = [stream.detach().requires_grad_() for stream in streams]
    outputs = function(*leaves)
    given = [gradient.to(output.dtype) for gradient, output in zip(upstream, outputs)]
    return outputs, torch.autograd.grad(outputs, leaves, given)


def _errors(which: str, ours: Tensor, plain: Tensor, exact: Tensor, columns: int) -> tuple[float, float]:
    ours_error, plain_error = ((value.detach() - exact.detach()).abs() for value in (ours, plain))
    terms = columns**0.5 if ours.ndim < 3 else 1.0
    allowed = 2 * plain_error.max() + terms * torch.finfo(ours.dtype).eps * exact.abs()
    largest = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    found = (ours_error.max() / largest).item(), (plain_error.max() / largest).item()
    if ours.shape != exact.shape or not (ours_error <= allowed).all():
        raise CheckFailed(
            f"{which} is off by {found[0]:.1e} of the largest value, plain torch by {found[1]:.1e}"
        )
    return found


def _reference_noise(operation: Operation, batch: Batch) -> Tensor:
    zeros = torch.zeros_like(batch.hidden, dtype=torch.float64)
    if operation.distribution is None:
        return zeros
    with forced_backend("reference"):
        return ops.perturb(zeros, **batch.noise, distribution=operation.distribution)


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """DIST_REG_KERNELS set to `name` for a while."""
    before = os.environ.get("DIST_REG_KERNELS")
    os.environ["DIST_REG_KERNELS"] = name
    try:
        yield
    finally:
        del os.environ["DIST_REG_KERNELS"]
        if before is not None:
            os.environ["DIST_REG_KERNELS"] = before
