"""Kernel tests run on a GPU where there is one, and in Triton's interpreter on the CPU otherwise."""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU in this process"
)


class Backend(NamedTuple):
    """One fast path of every operation, and the device of its tensors."""

    name: str
    device: str

    def operation(self, family: str, name: str | None = None) -> Callable[..., Any]:
        """The operation `name` (the family's own, if not given) of a kernel file."""
        file = f"{family}_cpu" if self.name == "cpu" else family
        return getattr(import_module(f"dist_reg_kernels.{file}"), f"{name or family}_{self.name}")

    @property
    def run(self) -> Callable[..., Tensor]:
        """`perturb`."""
        return self.operation("perturb")


BACKENDS = [
    pytest.param(("cpu", "cpu"), id="numba"),
    pytest.param(("triton", "cpu"), id="triton-interpreter", marks=needs_interpreter),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=needs_gpu),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The fast paths, each to be held against the reference."""
    name, device = request.param
    pytest.importorskip("numba" if name == "cpu" else "triton")
    return Backend(name, device)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that is not initialised holds NaN, so an element left out shows."""
    empty = torch.empty

    def poisoned_empty(*arguments, **options):
        tensor = empty(*arguments, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned_empty)
