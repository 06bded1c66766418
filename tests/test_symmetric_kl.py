"""The public operation: gradient, compilation, checkpointing, errors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dist_reg import ops
from dist_reg.errors import UserError

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
on_devices = pytest.mark.parametrize("device", DEVICES)


def inputs(device="cpu", dtype=torch.float32, shape=(2, 3, 17)):
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in "pq")
    mask = torch.ones(shape[:-1], dtype=torch.bool, device=device)
    mask[0, 1] = False
    return logits, other, mask


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)], ids=str)
def test_leading_dimensions_stay_and_the_sum_is_both_directions(shape):
    logits, other = torch.randn(2, *shape)
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1) + (log_q.exp() * (log_q - log_p)).sum(-1)
    got = ops.symmetric_kl(logits, other)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradcheck_in_float64(backend, masked, monkeypatch):
    monkeypatch.setenv("DIST_REG_KERNELS", backend)
    logits, other, mask = inputs(dtype=torch.float64)
    mask = mask if masked else None
    torch.autograd.gradcheck(lambda p, q: ops.symmetric_kl(p, q, mask=mask), (logits, other))


@on_devices
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype, masked):
    logits, other, mask = inputs(device, dtype)
    mask = mask if masked else None
    torch.library.opcheck(torch.ops.dist_reg.symmetric_kl, (logits, other, mask))
    with torch.no_grad():
        loss, saved = torch.ops.dist_reg.symmetric_kl(logits, other, mask)
        arguments = (loss, logits.detach(), other.detach(), mask, saved)
    torch.library.opcheck(torch.ops.dist_reg.symmetric_kl_backward, arguments)


@on_devices
def test_compiles_without_a_graph_break(device):
    logits, other, mask = inputs(device)

    def loss(logits, other):
        return ops.symmetric_kl(logits * 2, other, mask=mask).mean() / 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(logits, other), (logits, other))
    expected = torch.autograd.grad(loss(logits, other), (logits, other))
    for left, right in zip(got, expected):
        assert torch.equal(left, right)


@on_devices
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(device, reentrant):
    logits, other, _ = inputs(device)

    def loss(logits, other):
        return ops.symmetric_kl(logits * 2, other).square().sum()

    expected = torch.autograd.grad(loss(logits, other), (logits, other))
    checkpoint(loss, logits, other, use_reentrant=reentrant).backward()
    assert torch.equal(logits.grad, expected[0])
    assert torch.equal(other.grad, expected[1])


@on_devices
def test_double_use_in_one_graph_adds_the_gradients(device):
    logits, other, _ = inputs(device)
    once = torch.autograd.grad(ops.symmetric_kl(logits, other).sum(), (logits, other))
    twice = ops.symmetric_kl(logits, other) + 2 * ops.symmetric_kl(other, logits)
    for got, expected in zip(torch.autograd.grad(twice.sum(), (logits, other)), once):
        torch.testing.assert_close(got, 3 * expected)


@on_devices
def test_symmetric_in_its_arguments(device):
    logits, other, mask = inputs(device)
    forth, back = ops.symmetric_kl(logits, other, mask=mask), ops.symmetric_kl(other, logits, mask=mask)
    torch.testing.assert_close(forth, back, rtol=1e-6, atol=0)


@on_devices
def test_one_side_may_be_a_constant(device):
    logits, other, _ = inputs(device)
    both = torch.autograd.grad(ops.symmetric_kl(logits, other).sum(), logits)[0]
    ops.symmetric_kl(logits, other.detach()).sum().backward()
    assert torch.equal(logits.grad, both)
    assert other.grad is None


@on_devices
def test_masked_rows_may_hold_anything(device):
    logits, other, mask = inputs(device)
    expected = ops.symmetric_kl(logits, other)
    with torch.no_grad():
        logits[0, 1] = float("nan")
    got = ops.symmetric_kl(logits, other, mask=mask)
    assert torch.equal(got, expected.where(mask, 0.0))
    (got * torch.where(mask, 1.0, float("nan"))).nansum().backward()
    assert not logits.grad.isnan().any()
    assert not logits.grad[0, 1].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_agree(backend, monkeypatch):
    logits, other, _ = inputs()
    exact = ops.symmetric_kl(logits.double(), other.double())
    monkeypatch.setenv("DIST_REG_KERNELS", backend)
    torch.testing.assert_close(ops.symmetric_kl(logits, other).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.tensor(1.0)}, r"logits must be \[..., V\] with V of 1 or more.*\[\]"),
        ({"logits": torch.zeros(3, 0)}, r"logits must be \[..., V\] with V of 1 or more.*\[3, 0\]"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, "logits must be float32.*int64"),
        (
            {"other_logits": torch.zeros(3, 6)},
            r"other_logits must have the shape of logits, \[3, 5\], got \[3, 6\]",
        ),
        (
            {"other_logits": torch.zeros(3, 5).half()},
            "other_logits must have the dtype of logits.*float32.*float16",
        ),
        (
            {"other_logits": torch.zeros(3, 5, device="meta")},
            "other_logits must have the device of logits.*meta",
        ),
        ({"mask": torch.ones(3)}, r"mask must be bool \[3\], got torch.float32 \[3\]"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, r"mask must be bool \[3\], got torch.bool \[3, 5\]"),
        (
            {"mask": torch.ones(3, dtype=torch.bool, device="meta")},
            "mask must be on cpu like logits, got meta",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument_and_what_was_expected(change, message):
    arguments = {"logits": torch.zeros(3, 5), "other_logits": torch.zeros(3, 5), "mask": None}
    with pytest.raises(UserError, match=message):
        ops.symmetric_kl(**(arguments | change))
