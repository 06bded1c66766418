"""The fast paths of stability and perturb_stability against the formula in float64."""

import pytest
import torch
from dist_reg_kernels import philox
from dist_reg_kernels.perturb_stability import perturb_stability_torch
from dist_reg_kernels.stability import stability_backward_torch, stability_reference, stability_torch

from tests.kernels.test_perturb import HALF_PRECISION, options

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (1, 3, 63), (2, 2, 1000), (1, 1, 4100)]
ULP = {torch.float32: 2.0**-23, **HALF_PRECISION}


def twin_of(shape, dtype=torch.float32, device="cpu"):
    """A twin stream [2B, T, D], keys [B], the gradient from above [2B, T, D] and that of the distance [B, T]."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, tokens, channels = shape
    clean, gradient, step = (
        torch.randn((n * batch, tokens, channels), generator=generator) for n in (1, 2, 1)
    )
    twin = torch.cat((clean, clean + 0.3 * step)).to(device, dtype)
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator).to(device)
    upstream = torch.randn((batch, tokens), generator=generator).to(device)
    return twin, keys, gradient.to(device, dtype), upstream


def exact(twin, gradient, upstream, detach_clean=False):
    """Distance and gradient in float64 by autograd, token by token."""
    clean, noisy = (half.double().requires_grad_() for half in twin.chunk(2))
    source = clean.detach() if detach_clean else clean
    distance = torch.stack(
        [torch.stack([((n - c) ** 2).sum() for c, n in zip(cs, ns)]) for cs, ns in zip(source, noisy)]
    )
    total = (distance * upstream).sum() + (torch.cat((clean, noisy)) * gradient.double()).sum()
    total.backward()
    return distance.detach(), torch.cat((clean.grad, noisy.grad))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(backend, shape, dtype):
    """At most twice eager PyTorch's error in that dtype, and one unit in the last place."""
    twin, _, gradient, upstream = twin_of(shape, dtype, backend.device)
    real = torch.ones(1, 1, dtype=torch.bool, device=backend.device)
    distance, pulled = exact(twin, gradient, upstream)
    eager = stability_reference(twin, real).double()
    got = backend.operation("stability")(twin, None)
    assert got.dtype == torch.float32
    budget = 2 * (eager - distance).abs().max() + ULP[torch.float32] * distance * shape[-1] ** 0.5
    assert ((got - distance).abs() <= budget).all()

    clean, noisy = (half.clone().requires_grad_() for half in twin.chunk(2))
    loss = (stability_reference(torch.cat((clean, noisy)), real) * upstream.to(dtype)).sum()
    loss = loss + (torch.cat((clean, noisy)) * gradient).sum()
    loss.backward()
    eager_gradient = torch.cat((clean.grad, noisy.grad)).double()
    got = backend.operation("stability", "stability_backward")(twin, None, gradient, upstream, False)
    assert got.dtype == dtype
    budget = 2 * (eager_gradient - pulled).abs().max() + ULP[dtype] * pulled.abs()
    assert ((got - pulled).abs() <= budget).all()


@pytest.mark.parametrize("detach_clean", [False, True], ids=["both", "detached"])
def test_spans_strides_and_detaching(backend, detach_clean):
    twin, keys, gradient, upstream = twin_of((3, 4, 10), device=backend.device)
    spans = torch.tensor([[1, 3], [0, 0], [0, 4]], device=backend.device)
    outside = ~philox.inside_spans(spans, 4)
    twin = twin.transpose(0, 1).contiguous().transpose(0, 1)
    gradient = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    distance = backend.operation("stability")(twin, spans)
    pulled = backend.operation("stability", "stability_backward")(
        twin, spans, gradient, upstream, detach_clean
    )
    expected, expected_gradient = exact(twin, gradient, upstream * ~outside, detach_clean)
    assert (distance[outside] == 0).all()
    torch.testing.assert_close(distance.double(), expected * ~outside, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pulled.double(), expected_gradient, rtol=1e-6, atol=1e-6)
    both = outside.repeat(2, 1)
    assert torch.equal(pulled[both], gradient[both])
    if detach_clean:
        assert torch.equal(pulled[:3], gradient[:3])
    out, again = backend.operation("perturb_stability")(twin, keys, spans, *options())
    torch.testing.assert_close(again, distance, rtol=1e-6, atol=0)
    assert torch.equal(out[both], twin[both])


def test_padding_may_hold_anything(backend):
    twin, keys, gradient, upstream = twin_of((1, 3, 8), device=backend.device)
    twin[:, 2] = torch.tensor([float("inf"), float("nan")], device=backend.device)[:, None]
    spans = torch.tensor([[0, 2]], device=backend.device)
    for distance in (
        backend.operation("stability")(twin, spans),
        backend.operation("perturb_stability")(twin, keys, spans, *options())[1],
        stability_torch(twin, spans),
    ):
        assert distance[0, 2] == 0
        assert distance.isfinite().all()
    arguments = (twin, spans, gradient, upstream, False)
    assert torch.equal(backend.operation("stability", "stability_backward")(*arguments)[:, 2], gradient[:, 2])
    assert torch.equal(stability_backward_torch(*arguments)[:, 2], gradient[:, 2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb_stability_is_the_two_operations_at_once(backend, dtype, distribution, relative):
    twin, keys, _, _ = twin_of((2, 2, 63), dtype, backend.device)
    settings = options(0.1, distribution, relative)
    out, distance = backend.operation("perturb_stability")(twin, keys, None, *settings)
    clean, noisy = twin.chunk(2)
    apart = torch.cat([backend.run(half, keys, None, *settings) for half in (clean, noisy)])
    assert torch.equal(out, apart)
    torch.testing.assert_close(distance, backend.operation("stability")(twin, None), rtol=1e-6, atol=0)
    reference, reference_distance = perturb_stability_torch(twin, keys, None, *settings)
    torch.testing.assert_close(distance, reference_distance, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, reference, rtol=2 * ULP[dtype], atol=1e-6)


def test_equal_halves_have_distance_zero(backend):
    twin, _, gradient, upstream = twin_of((2, 2, 100), device=backend.device)
    twin[2:] = twin[:2]
    assert (backend.operation("stability")(twin, None) == 0).all()
    got = backend.operation("stability", "stability_backward")(twin, None, gradient, upstream, False)
    assert torch.equal(got, gradient)


def test_the_block_size_changes_the_sum_by_rounding_only(backend, monkeypatch):
    if backend.name != "triton":
        pytest.skip("only the Triton kernel has blocks")
    from dist_reg_kernels import rows

    twin, keys, gradient, upstream = twin_of((1, 2, 300), device=backend.device)
    operations = [
        lambda: backend.operation("stability")(twin, None),
        lambda: backend.operation("stability", "stability_backward")(twin, None, gradient, upstream, False),
        lambda: backend.operation("perturb_stability")(twin, keys, None, *options())[1],
    ]
    whole = [operation() for operation in operations]
    monkeypatch.setattr(rows, "block_and_warps", lambda channels: (16, 1))
    for operation, expected in zip(operations, whole):
        torch.testing.assert_close(operation(), expected, rtol=2.0**-20, atol=1e-6)


def test_the_thread_count_does_not_change_the_result():
    stability_cpu = pytest.importorskip("dist_reg_kernels.stability_cpu")
    twin, _, gradient, upstream = twin_of((7, 50, 385))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            pulled = stability_cpu.stability_backward_cpu(twin, None, gradient, upstream, False)
            results.append((stability_cpu.stability_cpu(twin, None), pulled))
    finally:
        torch.set_num_threads(before)
    for distance, pulled in results[1:]:
        assert torch.equal(distance, results[0][0])
        assert torch.equal(pulled, results[0][1])


def test_empty_batches(backend):
    nothing = torch.empty(0, 3, 8, device=backend.device)
    keys = torch.empty(0, dtype=torch.int64, device=backend.device)
    assert backend.operation("stability")(nothing, None).shape == (0, 3)
    out, distance = backend.operation("perturb_stability")(nothing, keys, None, *options())
    assert (out.shape, distance.shape) == ((0, 3, 8), (0, 3))
