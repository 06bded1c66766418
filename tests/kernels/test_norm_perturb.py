"""The fast paths of layer_norm_perturb and perturb_rms_norm, forward and backward, against float64."""

from typing import NamedTuple

import pytest
import torch
from dist_reg_kernels import norm_backward, norm_perturb, philox
from dist_reg_kernels.norm_perturb import (
    layer_norm_perturb_torch,
    layer_norm_reference,
    perturb_rms_norm_torch,
    rms_norm_reference,
    rms_norm_torch,
)
from dist_reg_kernels.perturb import perturb_reference
from torch import Tensor
from torch.nn.functional import layer_norm

from tests.kernels.conftest import Backend
from tests.kernels.test_perturb import HALF_PRECISION, SEED, SITE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (1, 3, 63), (2, 2, 1000), (1, 1, 4100)]
ULP = {torch.float32: 2.0**-23, **HALF_PRECISION}
EPSILON, SIGMA = 1e-5, 0.1


class Block(NamedTuple):
    """What enters a block's norm, and what comes back to it."""

    hidden: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    keys: Tensor
    gradient: Tensor
    stream_gradient: Tensor

    def double(self) -> "Block":
        return Block(*(part if part is None or part is self.keys else part.double() for part in self))

    @property
    def sum(self) -> Tensor:
        return self.hidden if self.residual is None else self.hidden + self.residual


def block_of(shape, dtype=torch.float32, device="cpu", *, residual=True) -> Block:
    generator = torch.Generator().manual_seed(sum(shape))
    hidden, other, gradient, stream_gradient = (torch.randn(shape, generator=generator) for _ in range(4))
    weight, bias = (torch.randn(shape[-1:], generator=generator) for _ in range(2))
    keys = torch.randint(-(2**63), 2**63 - 1, shape[:1], generator=generator).to(device)
    hidden, other, weight, bias, gradient, stream_gradient = (
        tensor.to(device, dtype)
        for tensor in (hidden, other, 1 + 0.3 * weight, bias, gradient, stream_gradient)
    )
    return Block(hidden, other if residual else None, weight, bias, keys, gradient, stream_gradient)


def options(sigma=SIGMA, distribution="normal", relative=False):
    return SEED, SITE, sigma, EPSILON, distribution, relative


def noise_of(block: Block) -> Tensor:
    batch, tokens, channels = block.hidden.shape
    spans = block.keys.new_tensor([[0, tokens]] * batch)
    return philox.noise_reference(
        block.keys, spans, tokens, channels, seed=SEED, site=SITE, distribution="normal"
    )


def layer_norm_of(backend, block: Block, spans=None, **settings):
    operation = backend.operation("norm_perturb", "layer_norm_perturb")
    return operation(*block[:5], spans, *options(**settings))


def rms_norm_of(backend, block: Block, spans=None, **settings):
    operation = backend.operation("norm_perturb", "perturb_rms_norm")
    return operation(*block[:3], block.keys, spans, *options(**settings))


def layer_norm_gradients(backend, block: Block, with_weight=True):
    _, mean, rstd = layer_norm_perturb_torch(*block[:5], None, *options())
    operation = backend.operation("norm_backward", "layer_norm_backward")
    return operation(*block[:3], mean, rstd, block.gradient, with_weight)


def rms_norm_gradients(backend, block: Block, with_weight=True):
    _, rstd = rms_norm_torch(block.hidden, block.weight, EPSILON)
    operation = backend.operation("norm_backward", "rms_norm_backward")
    return operation(block.hidden, block.weight, rstd, block.stream_gradient, block.gradient, with_weight)


def eager_rms_norm(stream, weight):
    """As Transformers writes it for Llama."""
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(stream.dtype)


def assert_within_budget(got, exact, eager, dtype, floor=0.0):
    """At most twice eager PyTorch's largest error, and one unit in the last place (of `floor` at least).

    And the rounding of a row's sum in fp32: the interpreter adds one element after the other.
    """
    assert got.dtype == dtype
    budget = 2 * (eager.double() - exact).abs().max() + ULP[dtype] * exact.abs().clamp_min(floor)
    budget += ULP[torch.float32] * exact.shape[-1] ** 0.5 / 8 * exact.abs()
    assert ((got.double() - exact).abs() <= budget).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_error_budget(backend, shape, dtype):
    block = block_of(shape, dtype, backend.device, residual=shape != SHAPES[1])
    relative = shape == SHAPES[2]
    wide, noise = block.double(), noise_of(block)
    exact = layer_norm_reference(wide.sum, wide.weight, wide.bias, EPSILON)
    exact = perturb_reference(exact, noise.double(), sigma=SIGMA, relative=relative)
    eager = layer_norm(block.sum, shape[-1:], block.weight, block.bias, EPSILON)
    eager = perturb_reference(eager, noise.to(dtype), sigma=SIGMA, relative=relative)
    out, mean, rstd = layer_norm_of(backend, block, relative=relative)
    assert_within_budget(out, exact, eager, dtype, floor=1.0)
    torch.testing.assert_close(mean.double(), wide.sum.mean(-1).flatten(), rtol=1e-5, atol=1e-6)
    deviation = (wide.sum.var(-1, correction=0) + EPSILON).rsqrt().flatten()
    torch.testing.assert_close(rstd.double(), deviation, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_error_budget(backend, shape, dtype):
    block = block_of(shape, dtype, backend.device, residual=shape != SHAPES[1])
    relative = shape == SHAPES[2]
    wide, noise = block.double(), noise_of(block)
    exact_stream = perturb_reference(wide.sum, noise.double(), sigma=SIGMA, relative=relative)
    exact = rms_norm_reference(exact_stream, wide.weight, EPSILON)
    eager_stream = perturb_reference(block.sum, noise.to(dtype), sigma=SIGMA, relative=relative)
    eager = eager_rms_norm(eager_stream, block.weight)
    stream, normed, rstd = rms_norm_of(backend, block, relative=relative)
    assert_within_budget(stream, exact_stream, eager_stream, dtype, floor=1.0)
    assert_within_budget(normed, exact, eager, dtype, floor=1.0)
    expected = (stream.double().square().mean(-1) + EPSILON).rsqrt().flatten()
    torch.testing.assert_close(rstd.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 3, 20)], ids=str)
def test_layer_norm_gradients_error_budget(backend, shape, dtype):
    block = block_of(shape, dtype, backend.device, residual=shape != SHAPES[1])
    exact = autograd(lambda z, w, b: layer_norm_reference(z, w, b, EPSILON), block.double(), block.bias)
    eager = autograd(lambda z, w, b: layer_norm(z, shape[-1:], w, b, EPSILON), block, block.bias)
    got = layer_norm_gradients(backend, block)
    assert_within_budget(got[0], exact[0], eager[0], dtype, floor=1.0)
    for got_sum, exact_sum, eager_sum in zip(got[1:], exact[1:], eager[1:]):
        assert_within_budget(got_sum, exact_sum, eager_sum, torch.float32, floor=1.0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 3, 20)], ids=str)
def test_rms_norm_gradients_error_budget(backend, shape, dtype):
    block = block_of(shape, dtype, backend.device, residual=False)
    exact = autograd(lambda z, w: rms_norm_reference(z, w, EPSILON), block.double())
    eager = autograd(eager_rms_norm, block)
    exact_pull, eager_pull = exact[0] + block.stream_gradient.double(), eager[0] + block.stream_gradient
    got = rms_norm_gradients(backend, block)
    assert_within_budget(got[0], exact_pull, eager_pull, dtype, floor=1.0)
    assert_within_budget(got[1], exact[1], eager[1], torch.float32, floor=1.0)


def autograd(norm, block: Block, bias=None):
    """The gradients of the sum that is normed, of the weight and of the bias."""
    parameters = [block.sum, block.weight] + ([] if bias is None else [block.bias])
    parameters = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    return torch.autograd.grad(norm(*parameters), parameters, block.gradient)


@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
def test_the_noise_of_the_normed_output_is_perturbs(backend, distribution):
    block = block_of((2, 3, 50), device=backend.device)
    noisy, plain = (layer_norm_of(backend, block, sigma=s, distribution=distribution)[0] for s in (1.0, 0.0))
    zeros = torch.zeros_like(block.hidden)
    noise = backend.run(zeros, block.keys, None, SEED, SITE, 1.0, distribution, False)
    torch.testing.assert_close(noisy - plain, noise, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
def test_the_noisy_stream_is_perturbs(backend, distribution, dtype):
    block = block_of((2, 2, 50), dtype, backend.device, residual=False)
    settings = {"distribution": distribution}
    stream = rms_norm_of(backend, block, **settings)[0]
    arguments = (block.hidden, block.keys, None, SEED, SITE, SIGMA, distribution)
    assert torch.equal(stream, backend.run(*arguments, False))
    relative = rms_norm_of(backend, block, relative=True, **settings)[0]
    torch.testing.assert_close(relative, backend.run(*arguments, True), rtol=ULP[dtype], atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_padding_is_normed_without_noise_whatever_the_strides(backend, relative):
    block = block_of((2, 3, 10), device=backend.device)
    hidden = block.hidden.transpose(1, 2).contiguous().transpose(1, 2)
    residual = block.residual.transpose(0, 1).contiguous().transpose(0, 1)
    gradients = (gradient.transpose(0, 1).contiguous().transpose(0, 1) for gradient in block[5:])
    strided = Block(hidden, residual, block.weight, block.bias, block.keys, *gradients)
    spans = torch.tensor([[1, 2], [0, 0]], dtype=torch.int32, device=backend.device)
    outside = ~philox.inside_spans(spans, 3)

    out = layer_norm_of(backend, strided, spans, relative=relative)[0]
    plain = layer_norm_of(backend, block, sigma=0.0)[0]
    reference = layer_norm_perturb_torch(*block[:5], spans, *options(relative=relative))[0]
    assert torch.equal(out[outside], plain[outside])
    torch.testing.assert_close(out, reference, rtol=1e-6, atol=2e-6)

    stream, normed, _ = rms_norm_of(backend, strided, spans, relative=relative)
    rms_options = (*block[:3], block.keys, spans, *options(relative=relative))
    reference = perturb_rms_norm_torch(*rms_options)
    assert torch.equal(stream[outside], block.sum[outside])
    torch.testing.assert_close(stream, reference[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(normed, reference[1], rtol=1e-6, atol=2e-6)

    for gradients_of in (layer_norm_gradients, rms_norm_gradients):
        for got, expected in zip(gradients_of(backend, strided), gradients_of(backend, block)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_zero_is_torchs_layer_norm(backend, dtype):
    block = block_of((1, 4, 100), dtype, backend.device, residual=False)
    wide = block.double()
    exact = layer_norm(wide.hidden, (100,), wide.weight, wide.bias, EPSILON)
    eager = layer_norm(block.hidden, (100,), block.weight, block.bias, EPSILON)
    assert_within_budget(layer_norm_of(backend, block, sigma=0.0)[0], exact, eager, dtype)


def test_a_large_mean_costs_no_accuracy(backend, monkeypatch):
    """E[x^2] - E[x]^2 would lose all digits of a variance of 1e-4 at a mean of 1e3. Then in blocks of 64."""
    block = block_of((1, 2, 200), device=backend.device, residual=False)
    block = block._replace(hidden=1e3 + 1e-2 * block.hidden)
    wide = block.double()
    exact = layer_norm_reference(wide.hidden, wide.weight, wide.bias, EPSILON)
    eager = layer_norm(block.hidden, (200,), block.weight, block.bias, EPSILON)
    error = (
        2 * (eager - exact).abs().max() + 2e-2
    )  # the mean itself is rounded to 6e-5, half a percent of a step
    assert (layer_norm_of(backend, block, sigma=0.0)[0] - exact).abs().max() <= error
    monkeypatch.setattr(norm_perturb, "block_and_warps", lambda channels: (16, 1))
    assert (layer_norm_of(backend, block, sigma=0.0)[0] - exact).abs().max() <= error


@pytest.mark.parametrize("parameters", [torch.float32, torch.float16], ids=str)
def test_weights_of_another_dtype(backend, parameters):
    block = block_of((1, 3, 63), torch.bfloat16, backend.device)
    other = block._replace(weight=block.weight.to(parameters), bias=block.bias.to(parameters))
    same = block._replace(weight=other.weight.bfloat16(), bias=other.bias.bfloat16())
    for operation in (layer_norm_of, rms_norm_of, layer_norm_gradients, rms_norm_gradients):
        for got, expected in zip(operation(backend, other), operation(backend, same)):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_rows_longer_than_a_block_differ_by_rounding_only(backend, relative, monkeypatch):
    if backend.name != "triton":
        pytest.skip("only the Triton kernels have blocks")
    block = block_of((1, 2, 150), device=backend.device)
    operations = [
        lambda: layer_norm_of(backend, block, relative=relative),
        lambda: rms_norm_of(backend, block, relative=relative),
        lambda: layer_norm_gradients(backend, block),
        lambda: rms_norm_gradients(backend, block),
    ]
    whole = [operation() for operation in operations]
    monkeypatch.setattr(norm_perturb, "block_and_warps", lambda channels: (16, 1))
    for operation, expected in zip(operations, whole):
        for got, one_block in zip(operation(), expected):
            torch.testing.assert_close(got, one_block, rtol=2.0**-20, atol=2e-6)


def test_frozen_weights_cost_nothing(backend):
    block = block_of((2, 2, 30), device=backend.device)
    for gradients_of in (layer_norm_gradients, rms_norm_gradients):
        pull, *sums = gradients_of(backend, block, with_weight=False)
        assert torch.equal(pull, gradients_of(backend, block)[0])
        assert all(part.shape == (0,) for part in sums)


def test_the_groups_follow_from_the_shape():
    assert [norm_backward.groups_of_rows(rows, 4) for rows in (0, 1, 4, 9, 100_000)] == [0, 1, 1, 3, 1024]


def numba_backend() -> Backend:
    pytest.importorskip("numba")
    return Backend("cpu", "cpu")


def test_the_thread_count_does_not_change_the_result():
    cpu = numba_backend()
    block = block_of((7, 50, 385))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            operations = (layer_norm_of, rms_norm_of, layer_norm_gradients, rms_norm_gradients)
            results.append([part for operation in operations for part in operation(cpu, block)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(got, expected) for got, expected in zip(other, results[0]))


def test_float64_stays_float64():
    cpu = numba_backend()
    block = block_of((2, 4, 100), torch.float64)
    reference = (
        (layer_norm_of, layer_norm_perturb_torch(*block[:5], None, *options(distribution="uniform"))),
        (rms_norm_of, perturb_rms_norm_torch(*block[:3], block.keys, None, *options(distribution="uniform"))),
    )
    for operation, expected in reference:
        for got, part in zip(operation(cpu, block, distribution="uniform"), expected):
            torch.testing.assert_close(got, part, rtol=1e-13, atol=1e-13)


def test_empty_batches(backend):
    block = block_of((1, 3, 8), device=backend.device)
    nothing = Block(*(part if part.ndim == 1 else part[:0] for part in block))._replace(keys=block.keys[:0])
    assert [part.shape for part in layer_norm_of(backend, nothing)] == [(0, 3, 8), (0,), (0,)]
    assert [part.shape for part in rms_norm_of(backend, nothing)] == [(0, 3, 8), (0, 3, 8), (0,)]
    pull, *sums = layer_norm_gradients(backend, nothing)
    assert pull.shape == (0, 3, 8)
    assert all(torch.equal(part, torch.zeros_like(block.weight)) for part in sums)
    pull, weight_sum = rms_norm_gradients(backend, nothing)
    assert pull.shape == (0, 3, 8)
    assert torch.equal(weight_sum, torch.zeros_like(block.weight))
