"""symmetric_kl's fast paths against the reference beside them."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from dist_reg_kernels.symmetric_kl import (
    symmetric_kl_backward_torch,
    symmetric_kl_reference,
    symmetric_kl_torch,
)
from torch import Tensor

from tests.kernels.conftest import BACKENDS

# NumPy's, in the interpreter: -inf - -inf and the like are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(1, 1), (3, 63), (4, 1000), (2, 2, 65)]
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
INFINITY = float("inf")


class Kernel(NamedTuple):
    """One implementation, forward and backward, and the device of its tensors."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]
    device: str

    def run(self, a, b, mask=None, gradient=None):
        """S and the gradients of a and b."""
        loss, saved = self.forward(a, b, mask)
        gradient = torch.ones_like(loss) if gradient is None else gradient
        return loss, *self.backward(gradient, a, b, mask, saved)


@pytest.fixture(params=[pytest.param(("torch", "cpu"), id="torch"), *BACKENDS])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    name, device = request.param
    if name == "torch":
        return Kernel(name, symmetric_kl_torch, symmetric_kl_backward_torch, device)
    if name == "cpu":
        pytest.importorskip("numba")
        from dist_reg_kernels.symmetric_kl_cpu import symmetric_kl_backward_cpu, symmetric_kl_cpu

        return Kernel(name, symmetric_kl_cpu, symmetric_kl_backward_cpu, device)
    pytest.importorskip("triton")
    from dist_reg_kernels.symmetric_kl import symmetric_kl_backward_triton, symmetric_kl_triton

    return Kernel(name, symmetric_kl_triton, symmetric_kl_backward_triton, device)


def logits(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    a, b = ((2 * torch.randn(shape, generator=generator)).to(dtype).to(device) for _ in "ab")
    gradient = (torch.rand(shape[:-1], generator=generator) - 0.3).to(device)
    return a, b, gradient


def eager(a, b, gradient, dtype):
    """S and the gradients by autograd through the reference computed in `dtype`."""
    a, b = (x.to(dtype).detach().clone().requires_grad_() for x in (a, b))
    loss = symmetric_kl_reference(a, b)
    return loss.detach(), *torch.autograd.grad(loss, (a, b), gradient.to(dtype))


def assert_within_budget(got, exact, rough, ulp):
    error, budget = (got.double() - exact).abs(), 2 * (rough.double() - exact).abs().max()
    assert (error <= budget + ulp * exact.abs()).all(), (error.max().item(), budget.item())


def assert_close(kernel, a, b, **tolerance):
    for got, exact in zip(kernel.run(a, b), eager(a, b, torch.ones(a.shape[:-1]).to(a), torch.float64)):
        torch.testing.assert_close(got.double(), exact, **tolerance)


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(kernel, shape, dtype):
    a, b, gradient = logits(shape, dtype, kernel.device)
    got = kernel.run(a, b, None, gradient)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    exact, rough = eager(a, b, gradient, torch.float64), eager(a, b, gradient, dtype)
    for value, true, usual, ulp in zip(got, exact, rough, (ULP[torch.float32], ULP[dtype], ULP[dtype])):
        assert_within_budget(value, true, usual, ulp)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_long_row_in_small_blocks(kernel, parts, monkeypatch):
    from dist_reg_kernels import symmetric_kl

    monkeypatch.setattr(symmetric_kl, "parts_of_a_row", lambda *_: parts)
    monkeypatch.setattr(symmetric_kl, "lanes_width_and_warps", lambda *_: (64, 4, 1))
    # The interpreter adds number by number.
    columns = 40000 if (kernel.name, kernel.device) != ("triton", "cpu") else 6000
    a, b, gradient = logits((1, columns), device=kernel.device)
    got = kernel.run(a, b, None, gradient)
    exact, rough = eager(a, b, gradient, torch.float64), eager(a, b, gradient, torch.float32)
    for value, true, usual in zip(got, exact, rough):
        # Eager's error in the one S of this test is a single draw, and may be a lucky one.
        assert_within_budget(value, true, usual, 4 * ULP[torch.float32])


@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["same-level", "shifted"])
@pytest.mark.parametrize("columns", [63, 1000])
def test_nearly_equal_rows_are_no_worse_than_eager(kernel, columns, offset):
    """R3F's case: S is around 1e-10, where a difference of two means would leave no digit."""
    a, noise, gradient = logits((2, columns), device=kernel.device)
    b = a + offset + 1e-5 * noise
    got = kernel.run(a, b, None, gradient)
    exact, rough = eager(a, b, gradient, torch.float64), eager(a, b, gradient, torch.float32)
    for value, true, usual in zip(got, exact, rough):
        error, usual_error = (value.double() - true).abs().max(), (usual.double() - true).abs().max()
        assert error <= usual_error
        if offset == 0:
            assert error <= 2e-6 * true.abs().max()


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_identical_logits_give_exactly_zero(kernel, dtype):
    a, _, gradient = logits((3, 300), dtype, kernel.device)
    a[1, 5] = -INFINITY
    for value in kernel.run(a, a.clone(), None, gradient):
        assert not value.any()


def test_symmetric_in_its_arguments(kernel):
    a, b, gradient = logits((3, 300), device=kernel.device)
    loss, gradient_a, gradient_b = kernel.run(a, b, None, gradient)
    swapped = kernel.run(b, a, None, gradient)
    for got, expected in zip(swapped, (loss, gradient_b, gradient_a)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("scale_a", "shift_a", "scale_b", "shift_b"),
    [(1, 1e4, 1, 1e4), (1, 1e4, 1, -1e4), (5e3, 0, 5e3, 0), (30, 0, 0, 0)],
    ids=["same-shift", "opposite-shifts", "huge", "sharp-and-flat"],
)
def test_large_logits_do_not_overflow(kernel, scale_a, shift_a, scale_b, shift_b):
    a, b, _ = logits((2, 300), device=kernel.device)
    atol = 8 * ULP[torch.float32] * (scale_a + scale_b)
    assert_close(kernel, scale_a * a + shift_a, scale_b * b + shift_b, rtol=1e-5, atol=atol)


def test_a_vocabulary_entry_masked_in_both_rows_contributes_nothing(kernel):
    a, b, gradient = logits((2, 300), device=kernel.device)
    keep = torch.ones(300, dtype=torch.bool, device=kernel.device)
    keep[[0, 7, 150, 299]] = False
    expected = kernel.run(a[:, keep].contiguous(), b[:, keep].contiguous(), None, gradient)
    a[:, ~keep], b[:, ~keep] = -INFINITY, -INFINITY
    loss, *gradients = kernel.run(a, b, None, gradient)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    for got, without in zip(gradients, expected[1:]):
        torch.testing.assert_close(got[:, keep], without, rtol=1e-5, atol=1e-7)
        assert not got[:, ~keep].any()


@pytest.mark.parametrize("logit", [0.0, -500.0], ids=["likely", "underflowing"])
@pytest.mark.parametrize("side", [0, 1], ids=["a", "b"])
def test_a_vocabulary_entry_masked_in_one_row_makes_that_row_infinite(kernel, side, logit):
    pair = logits((3, 300), device=kernel.device)[:2]
    expected = kernel.run(*pair)
    pair[side][1, 9], pair[1 - side][1, 9] = -INFINITY, logit
    got = kernel.run(*pair)
    assert got[0][1] == INFINITY
    assert all(gradient[1].isnan().all() for gradient in got[1:])
    for value, before in zip(got, expected):
        assert torch.equal(value[[0, 2]], before[[0, 2]])


def test_what_softmax_cannot_take_is_nan_in_that_row_alone(kernel):
    a, b, _ = logits((4, 300), device=kernel.device)
    a[0, 3], b[1, 4], a[2], b[2] = float("nan"), INFINITY, -INFINITY, -INFINITY
    loss, gradient_a, _ = kernel.run(a, b)
    assert loss.isnan().tolist() == [True, True, True, False]
    assert gradient_a.isnan().any(dim=-1).tolist() == [True, True, True, False]


def test_the_lowest_finite_number_as_a_mask(kernel):
    a, b, gradient = logits((2, 300), device=kernel.device)
    a[:, 200:], b[:, 200:] = torch.finfo(a.dtype).min, torch.finfo(a.dtype).min
    loss, *_ = kernel.run(a, b, None, gradient)
    expected, *_ = kernel.run(a[:, :200].contiguous(), b[:, :200].contiguous(), None, gradient)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_masked_rows_are_zero_whatever_they_hold(kernel):
    a, b, gradient = logits((2, 3, 65), device=kernel.device)
    expected = kernel.run(a, b, None, gradient)
    mask = torch.tensor([[True, False], [False, True], [True, True]], device=kernel.device).T
    a[~mask], gradient[~mask] = float("nan"), float("nan")
    for got, whole in zip(kernel.run(a, b, mask, gradient), expected):
        assert torch.equal(got[mask], whole[mask])
        assert not got[~mask].any()


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
        lambda x: torch.cat((x, x), dim=2)[..., : x.shape[2]],
        lambda x: x[:1, :1].expand_as(x),
        lambda x: x.view(2, 1, 3, 65).transpose(0, 1),
    ],
    ids=["rows-first", "columns-first", "shifted-tokens", "slice", "expanded", "four-dimensional"],
)
def test_non_contiguous_input(kernel, layout):
    a, b, gradient = logits((2, 3, 65), device=kernel.device)
    left, right = layout(a), layout(b)
    gradient = gradient.T.contiguous().T.view(left.shape[:-1]) if left.ndim == 3 else gradient[None]
    plain = kernel.run(left.contiguous(), right.contiguous(), None, gradient.contiguous())
    for got, expected in zip(kernel.run(left, right.contiguous(), None, gradient), plain):
        assert got.is_contiguous()
        assert torch.equal(got, expected)
    for got, expected in zip(kernel.run(left.contiguous(), right, None, gradient.contiguous()), plain):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_and_parts_change_the_rounding_only(kernel, dtype, parts, monkeypatch):
    if kernel.name != "triton":
        pytest.skip("only the Triton kernel has lanes and parts")
    from dist_reg_kernels import symmetric_kl

    a, b, gradient = logits((2, 700), dtype, kernel.device)
    mask = torch.tensor([True, False], device=kernel.device)
    whole = kernel.run(a, b, mask, gradient)
    monkeypatch.setattr(symmetric_kl, "parts_of_a_row", lambda *_: parts)
    monkeypatch.setattr(symmetric_kl, "lanes_width_and_warps", lambda *_: (32, 4, 1))
    monkeypatch.setattr(symmetric_kl, "block_and_warps", lambda _: (256, 1))
    cut = kernel.run(a, b, mask, gradient)
    torch.testing.assert_close(cut[0], whole[0], rtol=2e-6, atol=0)
    for got, expected in zip(cut[1:], whole[1:]):
        torch.testing.assert_close(got, expected, rtol=ULP[dtype] * 8, atol=1e-8)


def test_parts_fill_the_device_and_stay_long():
    from dist_reg_kernels.symmetric_kl import parts_of_a_row

    pytest.importorskip("triton")
    assert parts_of_a_row(8192, 256000, 1024, 132) == 1
    assert parts_of_a_row(64, 256000, 1024, 132) == 16
    assert parts_of_a_row(1, 32000, 1024, 132) == 4
    assert parts_of_a_row(1, 1000, 1024, 132) == 1


def test_every_element_is_written(kernel, monkeypatch):
    """The outputs start as NaN here, so an element left out shows."""
    from dist_reg_kernels import symmetric_kl

    a, b, gradient = logits((2, 300), device=kernel.device)
    mask = torch.tensor([True, False], device=kernel.device)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *x, **k: empty(*x, **k).fill_(float("nan")))
    for parts in (1, 8):
        monkeypatch.setattr(symmetric_kl, "parts_of_a_row", lambda *_, parts=parts: parts)
        loss, saved = kernel.forward(a, b, mask)
        for value in (loss, saved, *kernel.backward(gradient, a, b, mask, saved)):
            assert not value.isnan().any()


def test_no_rows(kernel):
    a = torch.empty(0, 3, 8, device=kernel.device)
    assert [x.shape for x in kernel.run(a, a)] == [(0, 3), (0, 3, 8), (0, 3, 8)]


def test_input_is_left_alone(kernel):
    a, b, gradient = logits((2, 65), device=kernel.device)
    before = a.clone(), b.clone(), gradient.clone()
    kernel.run(a, b, None, gradient)
    for now, then in zip((a, b, gradient), before):
        assert torch.equal(now, then)


def test_float64_stays_float64():
    pytest.importorskip("numba")
    from dist_reg_kernels.symmetric_kl_cpu import symmetric_kl_backward_cpu, symmetric_kl_cpu

    a, b, gradient = logits((3, 63), torch.float64)
    kernel = Kernel("cpu", symmetric_kl_cpu, symmetric_kl_backward_cpu, "cpu")
    for got, exact in zip(kernel.run(a, b, None, gradient.double()), eager(a, b, gradient, torch.float64)):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-14)


def test_exp_is_within_one_ulp():
    symmetric_kl_cpu = pytest.importorskip("dist_reg_kernels.symmetric_kl_cpu")
    x = torch.cat((torch.linspace(-87, 0, 4001), torch.tensor([-87.5, -INFINITY, float("nan")])))
    got = torch.tensor([symmetric_kl_cpu._exp(v) for v in x.numpy()])
    exact = x.double().exp()
    assert ((got[:4001] - exact[:4001]).abs() <= 2.0**-23 * exact[:4001]).all()
    assert got[4001:4003].tolist() == [0, 0]
    assert got[4003].isnan()


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_the_thread_count_does_not_change_the_result(dtype):
    pytest.importorskip("numba")
    from dist_reg_kernels.symmetric_kl_cpu import symmetric_kl_backward_cpu, symmetric_kl_cpu

    kernel = Kernel("cpu", symmetric_kl_cpu, symmetric_kl_backward_cpu, "cpu")
    a, b, gradient = logits((37, 5001), dtype)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(kernel.run(a, b, None, gradient))
    for result in results[1:]:
        for got, expected in zip(result, results[0]):
            assert torch.equal(got, expected)
