"""The public operations of the twin stream: gradients against autograd, compilation, checkpointing, errors."""

import subprocess

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dist_reg import noise, ops
from tests.test_ops import on_devices, run_python

NOISE = {"sigma": 0.1, "seed": 42, "site": 7}
DTYPES = [torch.float32, torch.bfloat16]


def inputs(device="cpu", dtype=torch.float32, shape=(2, 5, 36)):
    """hidden [B, T, D], twin [2B, T, D], keys [B], spans [B, 2]: the second example has padding on both sides."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
    step = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    twin = torch.cat((hidden, hidden + step))
    keys = noise.example_keys(torch.arange(shape[0], device=device), epoch=0)
    spans = torch.tensor([[0, 5], [2, 4]], dtype=torch.int32, device=device)
    return hidden.to(device, dtype), twin.to(device, dtype), keys, spans


def formula(twin, spans=None, detach_clean=False):
    """The distance [B, T] by plain autograd, example by example."""
    clean, noisy = twin.chunk(2)
    if detach_clean:
        clean = clean.detach()
    rows = []
    for i, (c, n) in enumerate(zip(clean, noisy)):
        first, end = (0, len(c)) if spans is None else spans[i].tolist()
        squares = ((n - c) ** 2).sum(-1)
        rows.append(torch.cat((squares[:first] * 0, squares[first:end], squares[end:] * 0)))
    return torch.stack(rows)


def drawn(keys, spans, shape, **options):
    """The noise itself, s * eps [B, T, D], as `perturb` adds it to zeros."""
    zeros = torch.zeros(shape, dtype=torch.float64, device=keys.device)
    return ops.perturb(zeros, **{**NOISE, **options}, example_keys=keys, spans=spans)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_spans", [False, True], ids=["no-spans", "spans"])
@pytest.mark.parametrize("operation", ["fork", "stability", "perturb_stability"])
def test_gradcheck_in_float64_on_the_reference(operation, with_spans, monkeypatch):
    monkeypatch.setenv("DIST_REG_KERNELS", "reference")
    hidden, twin, keys, spans = inputs(dtype=torch.float64, shape=(2, 5, 6))
    options = {"spans": spans if with_spans else None}
    if operation != "stability":
        options |= {**NOISE, "example_keys": keys}
    given = (hidden if operation == "fork" else twin).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: getattr(ops, operation)(x, **options), (given,))


@on_devices
def test_the_gradient_of_fork_is_the_sum_of_the_halves(device):
    hidden, _, keys, spans = inputs(device, torch.float64)
    left, right = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    upstream = torch.randn(4, 5, 36, dtype=torch.float64, device=device)
    twin = ops.fork(left, **NOISE, example_keys=keys, spans=spans)
    expected = torch.cat((right, right + drawn(keys, spans, hidden.shape)))
    close(twin, expected)
    twin.backward(upstream)
    expected.backward(upstream)
    close(left.grad, right.grad)


@on_devices
@pytest.mark.parametrize("detach_clean", [False, True], ids=["both", "detached"])
@pytest.mark.parametrize("with_spans", [False, True], ids=["no-spans", "spans"])
@pytest.mark.parametrize("noisy", [False, True], ids=["stability", "perturb_stability"])
def test_the_gradients_of_twin_and_distance_are_joined(device, noisy, with_spans, detach_clean):
    """Both outputs are used, under an upstream gradient that is neither one nor constant."""
    _, twin, keys, spans = inputs(device, torch.float64)
    spans = spans if with_spans else None
    left, right = twin.clone().requires_grad_(), twin.clone().requires_grad_()
    weights = torch.randn(2, 5, dtype=torch.float64, device=device)
    if noisy:
        out, distance = ops.perturb_stability(
            left, **NOISE, example_keys=keys, spans=spans, detach_clean=detach_clean
        )
        plain = right + drawn(keys, spans, (2, *twin.shape[1:])).repeat(2, 1, 1)
    else:
        out, distance = ops.stability(left, spans=spans, detach_clean=detach_clean)
        plain = right * 1
    expected = formula(right, spans, detach_clean)
    close(out, plain)
    close(distance, expected)
    ((out**3).sum() + (distance * weights).sum()).backward()
    ((plain**3).sum() + (expected * weights).sum()).backward()
    close(left.grad, right.grad)


@on_devices
@pytest.mark.parametrize("used", ["twin", "distance"])
@pytest.mark.parametrize("noisy", [False, True], ids=["stability", "perturb_stability"])
def test_one_output_alone_may_carry_the_gradient(device, noisy, used):
    _, twin, keys, spans = inputs(device)
    left, right = twin.clone().requires_grad_(), twin.clone().requires_grad_()
    if noisy:
        out, distance = ops.perturb_stability(left, **NOISE, example_keys=keys, spans=spans)
    else:
        out, distance = ops.stability(left, spans=spans)
    if used == "twin":
        out.backward(twin)
        assert torch.equal(left.grad, twin)
    else:
        distance.sum().backward()
        formula(right, spans).sum().backward()
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-6, atol=1e-6)


@on_devices
def test_double_use_in_one_graph(device):
    """Two stability operations in a row, the given twin used again beside the returned one, one distance twice."""
    _, twin, keys, spans = inputs(device, torch.float64)
    left, right = twin.clone().requires_grad_(), twin.clone().requires_grad_()

    source = left * 1.5
    first, one = ops.stability(source, spans=spans)
    second, two = ops.stability(first.sin(), spans=spans, detach_clean=True)
    third, three = ops.perturb_stability(second * first, **NOISE, example_keys=keys)
    again, four = ops.stability(first)
    loss = (one * two).sum() + (three + one).square().sum() + four.mean()
    loss = loss + (third * source).sum() + (again * first.cos()).sum()

    source = right * 1.5
    one = formula(source, spans)
    two = formula(source.sin(), spans, detach_clean=True)
    product = source.sin() * source
    third = product + drawn(keys, None, (2, *twin.shape[1:])).repeat(2, 1, 1)
    expected = (one * two).sum() + (formula(product) + one).square().sum() + formula(source).mean()
    expected = expected + (third * source).sum() + (source * source.cos()).sum()

    close(loss, expected)
    loss.backward()
    expected.backward()
    close(left.grad, right.grad)


@on_devices
def test_the_same_graph_may_be_walked_twice(device):
    _, twin, _, _ = inputs(device)
    twin.requires_grad_()
    out, distance = ops.stability(twin)
    loss = out.square().sum() + distance.sum()
    loss.backward(retain_graph=True)
    once = twin.grad.clone()
    loss.backward()
    assert torch.equal(twin.grad, 2 * once)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_spans", [False, True], ids=["no-spans", "spans"])
@pytest.mark.parametrize("name", ["fork", "stability", "stability_backward", "perturb_stability"])
def test_opcheck(device, dtype, with_spans, name):
    hidden, twin, keys, spans = inputs(device, dtype)
    spans = spans if with_spans else None
    hidden, twin = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (hidden, twin))
    noisy = (-5, 2**32 - 1, 0.1, "normal", True)
    upstream = torch.randn(2, 5, device=device)
    arguments = {
        "fork": (hidden, keys, spans, *noisy),
        # Its gradient is _Stability's, so the operator itself takes tensors without one.
        "stability": (twin.detach(), spans),
        "stability_backward": (twin.detach(), spans, torch.randn_like(twin), upstream, True),
        "perturb_stability": (twin, keys, spans, *noisy, False),
    }
    torch.library.opcheck(getattr(torch.ops.dist_reg, name), arguments[name])


def block(hidden, weight, keys, spans, site):
    """fork -> linear -> stability -> linear -> perturb_stability; the loss of a small twin-stream model."""
    twin = ops.fork(hidden * 2, sigma=0.1, seed=1, example_keys=keys, site=site, spans=spans)
    twin, near = ops.stability(twin @ weight, spans=spans)
    twin, far = ops.perturb_stability(
        torch.tanh(twin @ weight), sigma=0.1, seed=1, example_keys=keys, site=site + 1, spans=spans
    )
    return twin, twin.square().sum() + 0.3 * near.sum() + 0.7 * (far * near).sum()


@on_devices
def test_a_block_compiles_without_a_graph_break(device):
    hidden, _, keys, spans = inputs(device)
    weight = torch.randn(36, 36, device=device) / 6
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for site in (1, 2, 2**31):
        left, right = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
        got, expected = compiled(*left, keys, spans, site), block(*right, keys, spans, site)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        got[1].backward()
        expected[1].backward()
        for one, other in zip(left, right):
            assert torch.equal(one.grad, other.grad)


@on_devices
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_replays_the_block(device, reentrant):
    hidden, _, keys, spans = inputs(device)
    weight = torch.randn(36, 36, device=device) / 6
    left, right = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    block(*left, keys, spans, 3)[1].backward()
    checkpoint(block, *right, keys, spans, 3, use_reentrant=reentrant)[1].backward()
    for one, other in zip(left, right):
        assert torch.equal(one.grad, other.grad)


STEP = """
import os
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
import torch
from torch import nn
from dist_reg import noise, ops

torch.manual_seed(0)
start = nn.ModuleDict({"linear": nn.Linear(20, 20), "norm": nn.LayerNorm(20), "head": nn.Linear(20, 3)}).state_dict()
hidden, labels = torch.randn(2, 3, 20), torch.tensor([0, 2])
spans = torch.tensor([[0, 3], [1, 3]], dtype=torch.int32)

def train(backend, device):
    os.environ["DIST_REG_KERNELS"] = backend
    model = nn.ModuleDict({"linear": nn.Linear(20, 20), "norm": nn.LayerNorm(20), "head": nn.Linear(20, 3)})
    model.load_state_dict(start)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys = noise.example_keys(torch.arange(2), epoch=0).to(device)
    options = {"seed": 5, "example_keys": keys, "spans": spans.to(device)}
    losses = []
    for step in range(2):
        twin = ops.fork(hidden.to(device), sigma=0.1, site=2 * step, **options)
        twin = model["norm"](twin + model["linear"](twin))
        twin, near = ops.stability(twin, spans=spans.to(device))
        twin, far = ops.perturb_stability(twin, sigma=0.1, site=2 * step + 1, scale="relative", **options)
        twin = ops.perturb(twin, sigma=0.1, seed=5, example_keys=keys.repeat(2), site=9)
        logits = model["head"](twin.mean(1))
        loss = nn.functional.cross_entropy(logits, labels.to(device).repeat(2)) + near.sum() + 0.5 * far.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    gradients = {f"{n}.grad": p.grad.cpu() for n, p in model.named_parameters()}
    weights = {n: p.detach().cpu() for n, p in model.named_parameters()}
    return {"losses": torch.stack(losses), **gradients, **weights}

got, expected = train("triton", DEVICE), train("cpu", "cpu")
for name in expected:
    torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")
assert not torch.equal(expected["losses"][0], expected["losses"][1])
"""


@on_devices
def test_a_training_step_on_triton_equals_the_cpu_path(device):
    """Two whole steps: fork, linear and LayerNorm, stability, perturb_stability, perturb, loss, SGD."""
    pytest.importorskip("triton")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    done: subprocess.CompletedProcess = run_python(STEP.replace("DEVICE", repr(device)))
    assert done.returncode == 0, done.stderr[-2000:]


COMMON_ERRORS = [
    (
        {"spans": torch.zeros(2, 5, dtype=torch.int32)},
        r"spans must be int32 or int64 \[batch, 2\] = \[2, 2\]",
    ),
    ({"spans": torch.zeros(2, 2)}, "spans must be int32 or int64.*float32"),
    (
        {"spans": torch.zeros(2, 2, dtype=torch.int32, device="meta")},
        "spans must be on cpu like .*, got meta",
    ),
]
NOISE_ERRORS = [
    ({"example_keys": torch.zeros(3, dtype=torch.int64)}, r"example_keys must be int64 \[batch\] = \[2\]"),
    ({"example_keys": torch.zeros(2)}, "example_keys must be int64.*float32"),
    (
        {"example_keys": torch.zeros(2, dtype=torch.int64, device="meta")},
        "example_keys must be on cpu like .*, got meta",
    ),
    ({"sigma": -1.0}, "sigma must be a finite number not below 0, got -1.0"),
    ({"sigma": float("inf")}, "sigma must be a finite number not below 0, got inf"),
    ({"distribution": "nomal"}, "unknown distribution 'nomal': did you mean 'normal'"),
    ({"scale": "relativ"}, "unknown scale 'relativ': did you mean 'relative'"),
]
HIDDEN_ERRORS = [
    ({"hidden_states": torch.zeros(5, 36)}, r"hidden_states must be \[batch, tokens, channels\].*\[5, 36\]"),
    ({"hidden_states": torch.zeros(2, 5, 36, dtype=torch.int8)}, "hidden_states must be float32.*int8"),
]
TWIN_ERRORS = [
    ({"twin": torch.zeros(3, 5, 36)}, r"twin must hold two halves \[2 \* batch.*\[3, 5, 36\]"),
    ({"twin": torch.zeros(4, 36)}, r"twin must be \[batch, tokens, channels\].*\[4, 36\]"),
    ({"twin": torch.zeros(4, 5, 36, dtype=torch.int64)}, "twin must be float32.*int64"),
]
ERRORS = [
    *(("fork", *case) for case in HIDDEN_ERRORS + COMMON_ERRORS + NOISE_ERRORS),
    *(("stability", *case) for case in TWIN_ERRORS + COMMON_ERRORS),
    *(("perturb_stability", *case) for case in TWIN_ERRORS + COMMON_ERRORS + NOISE_ERRORS),
]


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    ERRORS,
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument_and_what_was_expected(operation, change, message):
    hidden, twin, keys, spans = inputs()
    arguments = {"hidden_states": hidden} if operation == "fork" else {"twin": twin}
    arguments["spans"] = spans
    if operation != "stability":
        arguments |= {**NOISE, "example_keys": keys}
    with pytest.raises(ValueError, match=message):
        getattr(ops, operation)(**(arguments | change))
