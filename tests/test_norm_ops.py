"""The public operations layer_norm_perturb and perturb_rms_norm: gradients, compilation, checkpointing, errors."""

import pytest
import torch
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from dist_reg import ops
from tests.test_ops import inputs, on_devices

EPSILON = 1e-5
CHANNELS = 36


def streams(device="cpu", dtype=torch.float32, shape=(2, 5, CHANNELS)):
    """(hidden, residual, weight, bias) that ask for gradients, and what the noise needs."""
    hidden, keys, spans = inputs(device, dtype, shape)
    generator = torch.Generator().manual_seed(1)
    residual = torch.randn(hidden.shape, generator=generator).to(device, dtype)
    weight, bias = (torch.randn(shape[2:], generator=generator).to(device, dtype) for _ in range(2))
    leaves = [tensor.requires_grad_() for tensor in (hidden, residual, weight, bias)]
    return leaves, {"example_keys": keys, "spans": spans, "seed": 42, "site": 7, "epsilon": EPSILON}


def normed(hidden, residual, weight, bias, *, sigma=0.1, **options):
    return ops.layer_norm_perturb(hidden, weight, bias, residual=residual, sigma=sigma, **options)


def both(hidden, residual, weight, bias, *, sigma=0.1, **options):
    """Both results of perturb_rms_norm in one, the bias unused."""
    stream, normed = ops.perturb_rms_norm(hidden, weight, residual=residual, sigma=sigma, **options)
    return torch.cat((stream + 0 * bias, normed))


on_both = pytest.mark.parametrize("operation", [normed, both], ids=["layer-norm", "rms-norm"])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@on_both
def test_gradcheck(operation, residual, backend, monkeypatch):
    monkeypatch.setenv("DIST_REG_KERNELS", backend)
    leaves, options = streams(dtype=torch.float64, shape=(2, 3, 6))
    if not residual:
        leaves[1] = None
    torch.autograd.gradcheck(lambda *leaves: operation(*leaves, **options), leaves)


@on_devices
@pytest.mark.parametrize("scale", ops.SCALES)
def test_the_gradients_are_the_norms(device, scale):
    """The noise is a constant, relative or not; both summands of the stream get one gradient."""
    leaves, options = streams(device)
    upstream = torch.randn_like(leaves[0])
    got = torch.autograd.grad(normed(*leaves, scale=scale, **options), leaves, upstream)
    hidden, residual, weight, bias = leaves
    plain = layer_norm(hidden + residual, (CHANNELS,), weight, bias, EPSILON)
    for ours, torchs in zip(got, torch.autograd.grad(plain, leaves, upstream)):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[0], got[1])


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rms_norm_is_transformers(device, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    (hidden, _, weight, _), options = streams(device, dtype)
    module = LlamaRMSNorm(CHANNELS, eps=EPSILON).to(device, dtype)
    module.weight.data.copy_(weight)
    options_of_perturb = {name: value for name, value in options.items() if name != "epsilon"}
    stream, got = ops.perturb_rms_norm(hidden, weight, sigma=0.1, **options)
    assert torch.equal(stream, ops.perturb(hidden, sigma=0.1, **options_of_perturb))
    rounding = 2.0**-22 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(got, module(stream), rtol=rounding, atol=0)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_opcheck(device, dtype, residual):
    (hidden, other, weight, bias), options = streams(device, dtype)
    other = other if residual else None
    noise = (options["example_keys"], options["spans"], -5, 2**32 - 1, 0.1, EPSILON, "normal", True)
    registered = torch.ops.dist_reg
    torch.library.opcheck(registered.layer_norm_perturb, (hidden, other, weight, bias, *noise))
    torch.library.opcheck(registered.perturb_rms_norm, (hidden, other, weight, *noise))
    hidden, other, weight = (part if part is None else part.detach() for part in (hidden, other, weight))
    statistic = torch.rand(hidden.shape[0] * hidden.shape[1], device=device)
    gradient = torch.randn_like(hidden).transpose(1, 2).contiguous().transpose(1, 2)
    for with_weight in (True, False):
        arguments = (hidden, other, weight, statistic, statistic, gradient, with_weight)
        torch.library.opcheck(registered.layer_norm_backward, arguments)
        arguments = (hidden, weight, statistic, gradient, gradient, with_weight)
        torch.library.opcheck(registered.rms_norm_backward, arguments)


@on_devices
@on_both
def test_compiles_without_a_graph_break(device, operation):
    leaves, options = streams(device)

    def layer(site, *leaves):
        return operation(*(2 * leaf for leaf in leaves), **(options | {"site": site})) * 3

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for site in (1, 2, 2**32 - 1):
        got, expected = compiled(site, *leaves), layer(site, *leaves)
        assert torch.equal(got, expected)
        pairs = (torch.autograd.grad(out.square().sum(), leaves) for out in (got, expected))
        for ours, eagers in zip(*pairs):
            torch.testing.assert_close(ours, eagers, rtol=1e-6, atol=1e-5)


@on_devices
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@on_both
def test_checkpointing_replays_the_noise(device, operation, reentrant):
    leaves, options = streams(device)

    def layer(*leaves):
        return operation(*leaves, **options).square()

    layer(*leaves).sum().backward()
    plain = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(layer, *leaves, use_reentrant=reentrant).sum().backward()
    for leaf, expected in zip(leaves, plain):
        assert torch.equal(leaf.grad, expected)


@on_devices
@on_both
def test_twice_in_one_graph(device, operation):
    """Weight shared by two calls, the second on the first one's result: the gradients of float64 autograd."""
    leaves, options = streams(device)

    def twice(operation, hidden, residual, weight, bias):
        once = operation(hidden, residual, weight, bias, **options)[: hidden.shape[0]]
        again = operation(once, hidden, weight, bias, **(options | {"site": 8}))
        return again.square().sum()

    got = torch.autograd.grad(twice(operation, *leaves), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(twice(IN_TORCH[operation], *wide), wide)
    for ours, exact in zip(got, expected):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def normed_in_torch(hidden, residual, weight, bias, *, epsilon, **noise):
    return ops.perturb(layer_norm(hidden + residual, (CHANNELS,), weight, bias, epsilon), sigma=0.1, **noise)


def both_in_torch(hidden, residual, weight, bias, *, epsilon, **noise):
    stream = ops.perturb(hidden + residual, sigma=0.1, **noise)
    rstd = (stream.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return torch.cat((stream + 0 * bias, stream * rstd * weight))


IN_TORCH = {normed: normed_in_torch, both: both_in_torch}


@on_devices
@on_both
def test_weights_keep_their_dtype_and_frozen_ones_get_no_gradient(device, operation):
    (hidden, residual, weight, bias), options = streams(device, torch.bfloat16)
    weight, bias = (leaf.detach().float().requires_grad_() for leaf in (weight, bias))
    out = operation(hidden, residual, weight, bias, **options)
    out.sum().backward()
    assert (hidden.grad.dtype, residual.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (weight.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    gradient, hidden.grad = hidden.grad, None
    operation(hidden, residual, weight.detach(), bias.detach(), **options).sum().backward()
    assert torch.equal(hidden.grad, gradient)


@on_devices
@on_both
@pytest.mark.parametrize("scale", ops.SCALES)
def test_the_default_backend_agrees_with_the_reference(device, operation, scale, monkeypatch):
    leaves, options = streams(device)
    got = operation(*leaves, sigma=1.0, scale=scale, **options)
    monkeypatch.setenv("DIST_REG_KERNELS", "reference")
    torch.testing.assert_close(got, operation(*leaves, sigma=1.0, scale=scale, **options), rtol=0, atol=5e-6)


@on_both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(5, CHANNELS)}, r"hidden_states must be \[batch, tokens, channels\]"),
        (
            {"residual": torch.zeros(2, 4, CHANNELS)},
            r"residual must be torch.float32 \[2, 5, 36\].*\[2, 4, 36\]",
        ),
        ({"residual": torch.zeros(2, 5, CHANNELS).half()}, "residual must be torch.float32.*torch.float16"),
        ({"residual": torch.zeros(2, 5, CHANNELS, device="meta")}, "residual must be on cpu.*meta"),
        ({"weight": torch.zeros(1, CHANNELS)}, r"weight must be \[channels\] = \[36\].*\[1, 36\]"),
        ({"weight": torch.zeros(35)}, r"weight must be \[channels\] = \[36\].*\[35\]"),
        ({"weight": torch.zeros(CHANNELS, dtype=torch.int64)}, "weight must be float32.*int64"),
        ({"weight": torch.zeros(CHANNELS, device="meta")}, "weight must be on cpu.*meta"),
        ({"epsilon": -1e-5}, "epsilon must be a finite number not below 0, got -1e-05"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number not below 0, got nan"),
        ({"example_keys": torch.zeros(2)}, "example_keys must be int64.*float32"),
        ({"spans": torch.zeros(2, 2)}, "spans must be int32 or int64.*float32"),
        ({"sigma": -1.0}, "sigma must be a finite number not below 0, got -1.0"),
        ({"distribution": "nomal"}, "unknown distribution 'nomal': did you mean 'normal'"),
        ({"scale": "relativ"}, "unknown scale 'relativ': did you mean 'relative'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_the_argument_and_what_was_expected(operation, change, message):
    leaves, options = streams()
    arguments = dict(zip(("hidden", "residual", "weight", "bias"), leaves)) | options
    with pytest.raises(ValueError, match=message):
        operation(**(arguments | change))


def test_a_wrong_bias_is_named():
    leaves, options = streams()
    with pytest.raises(ValueError, match=r"bias must be \[channels\] = \[36\].*\[2\]"):
        normed(*leaves[:3], torch.zeros(2), **options)
