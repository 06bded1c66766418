"""The fast paths of layer_mix against the formula in float64."""

import pytest
import torch
from dist_reg_kernels import layer_mix
from dist_reg_kernels.layer_mix import layer_mix_reference

from tests.kernels.test_perturb import HALF_PRECISION

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ULP = {torch.float32: 2.0**-23, **HALF_PRECISION}
SMALLEST_HALF = 2.0**-24
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 63), (5, 2, 2, 1000), (3, 1, 1, 4100)]  # L, B, T, D


def mix_of(shape, dtype=torch.float32, device="cpu"):
    """L states [B, T, D], gates [L, B] of which some are closed, and the gradient from above [B, T, D]."""
    generator = torch.Generator().manual_seed(sum(shape))
    layers, *stream = shape
    states = [torch.randn(stream, generator=generator).to(device, dtype) for _ in range(layers)]
    gates = torch.randn(shape[:2], generator=generator).relu().to(device)
    return states, gates, torch.randn(stream, generator=generator).to(device, dtype)


def exact(states, gates, gradient):
    """The sum and the gradients of states and gates in float64 by autograd."""
    wide = torch.stack([state.double() for state in states]).requires_grad_()
    own = gates.double().requires_grad_()
    mixed = layer_mix_reference(wide, own)
    mixed.backward(gradient.double())
    return mixed.detach(), wide.grad, own.grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(backend, shape, dtype):
    """At most twice eager PyTorch's error in that dtype, and one unit in the last place."""
    states, gates, gradient = mix_of(shape, dtype, backend.device)
    mixed, to_states, to_gates = exact(states, gates, gradient)
    eager = layer_mix_reference(torch.stack(states), gates.to(dtype)).double()
    got = backend.operation("layer_mix")(states, gates)
    assert got.dtype == dtype
    size = (gates[:, :, None, None] * torch.stack(states).float().abs()).sum(0)
    budget = 2 * (eager - mixed).abs().max() + ULP[dtype] * size
    assert ((got - mixed).abs() <= budget).all()

    got_states, got_gates = backend.operation("layer_mix", "layer_mix_backward")(gradient, states, gates)
    for one, expected in zip(got_states, to_states, strict=True):
        assert one.dtype == dtype
        assert ((one - expected).abs() <= ULP[dtype] * expected.abs() + SMALLEST_HALF).all()
    assert got_gates.dtype == torch.float32
    norms = torch.stack([state.double().flatten(1).norm(dim=1) for state in states])
    scale = norms * gradient.double().flatten(1).norm(dim=1)
    assert ((got_gates - to_gates).abs() <= 4 * ULP[torch.float32] * scale).all()


def test_any_strides(backend):
    states, gates, gradient = mix_of((3, 4, 5, 10), device=backend.device)
    strided = [state.transpose(0, 1).contiguous().transpose(0, 1) for state in states]
    gate_view = gates.T.contiguous().T
    pulled = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    operation = backend.operation("layer_mix")
    assert torch.equal(operation(strided, gate_view), operation(states, gates))
    back = backend.operation("layer_mix", "layer_mix_backward")
    got, expected = back(pulled, strided, gate_view), back(gradient, states, gates)
    assert torch.equal(got[1], expected[1])
    for one, other in zip(got[0], expected[0], strict=True):
        assert torch.equal(one, other)


def test_more_layers_than_a_launch_takes(backend, monkeypatch):
    monkeypatch.setattr(layer_mix, "STATES_PER_LAUNCH", 2)
    states, gates, gradient = mix_of((5, 2, 3, 40), torch.bfloat16, backend.device)
    mixed, to_states, to_gates = exact(states, gates, gradient)
    got = backend.operation("layer_mix")(states, gates)
    # Rounded once: the sum between two launches is not in half precision.
    assert ((got - mixed).abs() <= ULP[torch.bfloat16] * mixed.abs() + 1e-6).all()
    got_states, got_gates = backend.operation("layer_mix", "layer_mix_backward")(gradient, states, gates)
    torch.testing.assert_close(torch.stack(got_states).double(), to_states, rtol=ULP[torch.bfloat16], atol=0)
    torch.testing.assert_close(got_gates.double(), to_gates, rtol=1e-5, atol=1e-5)


def test_a_closed_gate_leaves_its_state_unread(backend):
    if backend.name == "cpu":
        pytest.skip("the CPU reads it, and 0 times NaN is NaN")
    states, gates, _ = mix_of((2, 3, 4, 20), device=backend.device)
    gates[1, 2] = 0.0
    states[1][2] = float("nan")
    assert torch.isfinite(backend.operation("layer_mix")(states, gates)).all()


def test_nothing_to_mix(backend):
    states, gates, gradient = mix_of((2, 0, 4, 20), device=backend.device)
    assert backend.operation("layer_mix")(states, gates).shape == (0, 4, 20)
    got_states, got_gates = backend.operation("layer_mix", "layer_mix_backward")(gradient, states, gates)
    assert [state.shape for state in got_states] == [(0, 4, 20)] * 2
    assert got_gates.shape == (2, 0)


def test_float64_on_the_cpu():
    from dist_reg_kernels.layer_mix_cpu import layer_mix_cpu

    states, gates, gradient = mix_of((3, 2, 4, 20), torch.float64)
    mixed, _, _ = exact(states, gates, gradient)
    torch.testing.assert_close(layer_mix_cpu(states, gates.double()), mixed, rtol=1e-15, atol=1e-15)
