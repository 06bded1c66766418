"""Kernel tests run on a GPU where there is one, and in Triton's interpreter on the CPU otherwise."""

import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Read when a kernel is decorated: the kernel files are imported later, by the tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU in this process"
)


class Backend(NamedTuple):
    """One implementation of `perturb` and the device of its tensors."""

    name: str
    run: Callable[..., Tensor]
    device: str


BACKENDS = [
    pytest.param(("cpu", "cpu"), id="numba"),
    pytest.param(("triton", "cpu"), id="triton-interpreter", marks=needs_interpreter),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=needs_gpu),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The fast paths, each to be held against the reference."""
    name, device = request.param
    if name == "cpu":
        pytest.importorskip("numba")
        from dist_reg_kernels.perturb_cpu import perturb_cpu

        return Backend(name, perturb_cpu, device)
    pytest.importorskip("triton")
    from dist_reg_kernels.perturb import perturb_triton

    return Backend(name, perturb_triton, device)
