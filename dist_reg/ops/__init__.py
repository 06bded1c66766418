"""Public functional operations; each picks its Triton kernel, its CPU path or its plain torch reference.

The only importer of `dist_reg_kernels`. CUDA tensors take Triton, CPU tensors the CPU path, all others the reference;
the environment variable `DIST_REG_KERNELS` (triton, cpu or reference) forces one.

Every operation raises a ValueError that names the argument for a wrong shape, dtype, device or option.
"""

from dist_reg.ops.backend import BACKENDS
from dist_reg.ops.bottleneck import bottleneck
from dist_reg.ops.checks import DISTRIBUTIONS, SCALES
from dist_reg.ops.fork import fork
from dist_reg.ops.layer_mix import layer_mix
from dist_reg.ops.norm_perturb import layer_norm_perturb, perturb_rms_norm
from dist_reg.ops.perturb import perturb
from dist_reg.ops.stability import perturb_stability, stability
from dist_reg.ops.symmetric_kl import symmetric_kl

__all__ = [
    "BACKENDS",
    "DISTRIBUTIONS",
    "SCALES",
    "bottleneck",
    "fork",
    "layer_mix",
    "layer_norm_perturb",
    "perturb",
    "perturb_rms_norm",
    "perturb_stability",
    "stability",
    "symmetric_kl",
]
