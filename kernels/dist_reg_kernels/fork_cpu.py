"""fork.py's operation on the CPU: perturb_cpu.py's loop, which then writes both halves."""

from __future__ import annotations

from torch import Tensor

from dist_reg_kernels.perturb_cpu import perturb_or_fork


def fork_cpu(
    hidden: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
) -> Tensor:
    """The operation of fork.py on CPU tensors; the arguments of `fork.fork_torch`."""
    return perturb_or_fork(hidden, keys, spans, seed, site, sigma, distribution, relative, fork=True)
