"""The public operation: registration, compilation, checkpointing, use twice, training on Triton, errors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dist_reg import ops
from tests.test_ops import on_devices, run_python

NUMBER, CHOICES, CHANNELS = 2, 2, 12


def inputs(device="cpu", dtype=torch.float32):
    """The arguments of `ops.bottleneck`, the tensors with a gradient as leaves."""
    generator, shape = torch.Generator().manual_seed(0), (2, 5)
    weights = []
    for d, h in ((6, 3), (9, 2)):
        shapes = ((d, CHANNELS), (d,), (CHOICES, h, d), (CHOICES, h), (CHOICES, d, h), (CHOICES, d))
        for one in (*shapes, (CHANNELS, d), (CHANNELS,)):
            weight = torch.randn(one, generator=generator) / one[-1] ** 0.5
            weights.append(weight.to(device, dtype).requires_grad_())
    return {
        "hidden_states": torch.randn((*shape, CHANNELS), generator=generator)
        .to(device, dtype)
        .requires_grad_(),
        "weights": weights,
        "views": (torch.arange(10, device=device) % (NUMBER + 1)).view(shape),
        "inner": torch.randint(0, CHOICES + 1, (*shape, NUMBER), generator=generator).to(device),
        "token_keys": torch.randint(-(2**63), 2**63 - 1, shape, generator=generator).to(device),
        "spans": torch.tensor([[0, 5], [2, 4]], dtype=torch.int32, device=device),
        "seed": 42,
        "site": 7,
        "dropout": 0.2,
    }


def leaves(given) -> list[torch.Tensor]:
    return [given["hidden_states"], *given["weights"]]


def block(given, site=7):
    """sin -> bottleneck; the loss of a small model."""
    given = given | {"hidden_states": given["hidden_states"].sin() * 2, "site": site}
    first, near = ops.bottleneck(given.pop("hidden_states"), given.pop("weights"), **given)
    return first, (first * first.cos()).sum() + (near.sqrt() * 0.3).sum()


def gradients(loss, given) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, leaves(given))


@on_devices
@pytest.mark.parametrize("reconstruct", ["all", "sampled", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, dtype, reconstruct):
    given = inputs(device, dtype)
    hidden = given["hidden_states"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    places = (given["views"], given["inner"], given["token_keys"], given["spans"])
    options = (-5, 2**32 - 1, 0.2, reconstruct)
    torch.library.opcheck(torch.ops.dist_reg.bottleneck, (hidden, given["weights"], *places, *options))
    apart = [one.detach() for one in given["weights"]]
    upstream = (torch.randn_like(hidden).detach(), torch.randn(hidden.shape[:2], device=device))
    arguments = (*upstream, hidden.detach(), apart, *places, *options)
    torch.library.opcheck(torch.ops.dist_reg.bottleneck_backward, arguments)


@on_devices
@pytest.mark.parametrize("reconstruct", ["all", "sampled", "none"])
def test_a_block_compiles_without_a_graph_break(device, reconstruct):
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    given = inputs(device) | {"reconstruct": reconstruct}
    for site in (1, 2, 2**31):
        given["views"] = given["views"].roll(1, 1)  # other numbers of tokens for each view
        got, expected = compiled(given, site), block(given, site)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        for one, other in zip(gradients(got[1], given), gradients(expected[1], given)):
            assert torch.equal(one, other)


@on_devices
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_replays_the_block(device, reentrant):
    given, replayed = inputs(device), inputs(device)
    block(given)[1].backward()

    def again(hidden):
        return block(replayed | {"hidden_states": hidden})[1]

    checkpoint(again, replayed["hidden_states"], use_reentrant=reentrant).backward()
    for one, other in zip(leaves(given), leaves(replayed)):
        assert torch.equal(one.grad, other.grad)


@on_devices
def test_double_use_in_one_graph(device):
    """Two calls in a row with the same weights have the sum of the gradients that each has with weights of its own."""
    given, apart = inputs(device), inputs(device)
    others = [one.detach().clone().requires_grad_() for one in apart["weights"]]

    def twice(given, second):
        given = dict(given)
        hidden, weights = given.pop("hidden_states"), given.pop("weights")
        first, near = ops.bottleneck(hidden, weights, **given)
        out, far = ops.bottleneck(first.sin(), second, **given | {"site": 8, "reconstruct": "all"})
        return (out * out.cos()).sum() + (near * far).sum() + (first * out).mean()

    twice(given, given["weights"]).backward()
    twice(apart, others).backward()
    torch.testing.assert_close(given["hidden_states"].grad, apart["hidden_states"].grad)
    for one, first, second in zip(given["weights"], apart["weights"], others):
        torch.testing.assert_close(one.grad, first.grad + second.grad)


@on_devices
def test_one_output_alone_may_carry_the_gradient(device):
    given = inputs(device)
    options = {name: value for name, value in given.items() if name not in ("hidden_states", "weights")}
    out, error = ops.bottleneck(given["hidden_states"], given["weights"], **options)
    pulled, *found = torch.autograd.grad(error.sum(), leaves(given), retain_graph=True)
    assert (pulled == 0).all()
    assert all((one != 0).any() for one in (found[0], found[8]))
    upstream = torch.randn_like(out)
    from_out = torch.autograd.grad(out, leaves(given), upstream, retain_graph=True)
    both = torch.autograd.grad((out, error), leaves(given), (upstream, torch.ones_like(error)))
    assert torch.equal(from_out[0], both[0])
    for one, other, total in zip(from_out[1:], found, both[1:]):
        torch.testing.assert_close(one + other, total, rtol=1e-5, atol=1e-5)


STEP = """
import os
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
import torch
from dist_reg import ops
from tests.test_bottleneck_op import inputs, leaves

def train(backend, device):
    os.environ["DIST_REG_KERNELS"] = backend
    given = inputs(device)
    optimizer = torch.optim.SGD(leaves(given), lr=0.1)
    losses = []
    for step in range(2):
        options = {name: value for name, value in given.items() if name not in ("hidden_states", "weights", "site")}
        out, error = ops.bottleneck(given["hidden_states"], given["weights"], site=step, **options)
        loss = out.tanh().square().mean() + 0.1 * error.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(one.grad for one in leaves(given)), *(one.detach() for one in leaves(given))]

got, expected = train("triton", DEVICE), train("cpu", "cpu")
for one, other in zip(got, expected, strict=True):
    torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
assert expected[0][0] != expected[0][1]
"""


@on_devices
def test_a_training_step_on_triton_equals_the_cpu_path(device):
    pytest.importorskip("triton")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    done = run_python(STEP.replace("DEVICE", repr(device)))
    assert done.returncode == 0, done.stderr[-2000:]


def replaced(weights, place, tensor):
    return [tensor if i == place else one for i, one in enumerate(weights)]


ERRORS = [
    (
        lambda given: {"hidden_states": torch.zeros(5, 12)},
        r"hidden_states must be \[batch, tokens, channels\]",
    ),
    (
        lambda given: {"hidden_states": torch.zeros(2, 5, 12, dtype=torch.int8)},
        "hidden_states must be float32.*int8",
    ),
    (
        lambda given: {"spans": torch.zeros(2, 5, dtype=torch.int32)},
        r"spans must be int32 or int64 \[batch, 2\]",
    ),
    (lambda given: {"weights": []}, "weights must be 8 tensors an autoencoder, got 0"),
    (lambda given: {"weights": given["weights"][:9]}, "weights must be 8 tensors an autoencoder, got 9"),
    (
        lambda given: {"weights": replaced(given["weights"], 8, torch.zeros(9, 11))},
        r"weights\[8\] must be torch.float32 \[9, 12\], got torch.float32 \[9, 11\]",
    ),
    (
        lambda given: {"weights": replaced(given["weights"], 13, torch.zeros(2, 9).half())},
        r"weights\[13\] must be torch.float32 \[2, 9\], got torch.float16 \[2, 9\]",
    ),
    (
        lambda given: {"weights": replaced(given["weights"], 2, torch.zeros(3, 6))},
        r"weights\[2\] must be torch.float32 \[3, 0, 6\], got torch.float32 \[3, 6\]",
    ),
    (
        lambda given: {"weights": replaced(given["weights"], 1, torch.zeros(6, device="meta"))},
        r"weights\[1\] must be on cpu like hidden_states, got meta",
    ),
    (
        lambda given: {"weights": [one.long() for one in given["weights"]]},
        r"weights\[0\] must be float32.*int64",
    ),
    (lambda given: {"views": given["views"][:1]}, r"views must be int64 \[2, 5\], got torch.int64 \[1, 5\]"),
    (lambda given: {"views": given["views"].int()}, r"views must be int64 \[2, 5\], got torch.int32"),
    (lambda given: {"views": given["views"].to("meta")}, "views must be on cpu like hidden_states, got meta"),
    (lambda given: {"inner": given["views"]}, r"inner must be int64 \[2, 5, 2\], got torch.int64 \[2, 5\]"),
    (lambda given: {"inner": given["inner"].to("meta")}, "inner must be on cpu like hidden_states, got meta"),
    (
        lambda given: {"token_keys": torch.zeros(2)},
        r"token_keys must be int64 \[2, 5\], got torch.float32 \[2\]",
    ),
    (lambda given: {"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    (lambda given: {"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
    (lambda given: {"dropout": float("nan")}, "dropout must be at least 0 and below 1, got nan"),
    (lambda given: {"reconstruct": "sample"}, "unknown reconstruct 'sample': did you mean 'sampled'"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors_name_the_argument_and_what_was_expected(change, message):
    given = inputs()
    given |= change(given)
    with pytest.raises(ValueError, match=message):
        ops.bottleneck(given.pop("hidden_states"), given.pop("weights"), **given)
