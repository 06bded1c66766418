"""bottleneck_keeping.py with dropout drawn in the compiled loop."""

from __future__ import annotations

from functools import partial

from dist_reg_kernels.bottleneck_cpu import uniform_cpu
from dist_reg_kernels.bottleneck_keeping import keeping_torch, kept_backward_torch

keeping_cpu = partial(keeping_torch, uniform=uniform_cpu)
kept_backward_cpu = kept_backward_torch
