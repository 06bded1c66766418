"""Public functional operations; each picks its Triton kernel, its CPU path or its plain torch reference.

The only importer of `dist_reg_kernels`. CUDA tensors take Triton, CPU tensors the CPU path, all others the reference;
the environment variable `DIST_REG_KERNELS` (triton, cpu or reference) forces one.

Every operation raises a ValueError that names the argument for a wrong shape, dtype, device or option.
"""

from dist_reg.ops.backend import BACKENDS
from dist_reg.ops.checks import DISTRIBUTIONS, SCALES
from dist_reg.ops.perturb import perturb
from dist_reg.ops.symmetric_kl import symmetric_kl

__all__ = ["BACKENDS", "DISTRIBUTIONS", "SCALES", "perturb", "symmetric_kl"]
