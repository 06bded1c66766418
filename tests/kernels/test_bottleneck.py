"""The fast paths of bottleneck against a loop over tokens in float64 with autograd."""

from typing import NamedTuple

import pytest
import torch
from dist_reg_kernels import bottleneck
from dist_reg_kernels.philox import inside_spans, noise_reference
from torch import Tensor

from tests.kernels.conftest import needs_gpu
from tests.kernels.test_perturb import HALF_PRECISION

WEIGHTS = bottleneck.Weights._fields
ULP = {torch.float32: 2.0**-23, **HALF_PRECISION}
SIZES = ((6, 3), (9, 2))  # d and h of each view


class Case(NamedTuple):
    """The arguments of the operation, in its order."""

    hidden: Tensor
    weights: list[Tensor]
    views: Tensor
    inner: Tensor
    keys: Tensor
    spans: Tensor | None
    seed: int
    site: int
    dropout: float
    reconstruct: str


def case_of(
    device="cpu",
    *,
    shape=(2, 5, 11),
    sizes=SIZES,
    choices=2,
    dtype=torch.float32,
    weight_dtype=None,
    spans=((1, 4), (0, 5)),
    dropout=0.2,
    reconstruct="sampled",
) -> Case:
    """A batch of which every token draws its view and its inner choices."""
    generator = torch.Generator().manual_seed(sum(shape))
    batch, tokens, channels = shape
    number = len(sizes)
    weights = []
    for d, h in sizes:
        shapes = (
            (d, channels),
            (d,),
            (choices, h, d),
            (choices, h),
            (choices, d, h),
            (choices, d),
            (channels, d),
        )
        for one in (*shapes, (channels,)):
            weights.append(torch.randn(one, generator=generator) / one[-1] ** 0.5)
    return Case(
        torch.randn(shape, generator=generator).to(device, dtype),
        [weight.to(device, weight_dtype or dtype) for weight in weights],
        torch.randint(0, number + 1, (batch, tokens), generator=generator).to(device),
        torch.randint(0, choices + 1, (batch, tokens, number), generator=generator).to(device),
        torch.randint(-(2**63), 2**63 - 1, (batch, tokens), generator=generator).to(device),
        None if spans is None else torch.tensor(spans, dtype=torch.int32, device=device),
        -5,
        2**31 + 9,
        dropout,
        reconstruct,
    )


def upstream_of(case: Case) -> tuple[Tensor, Tensor]:
    """The gradients of out and of error."""
    generator = torch.Generator().manual_seed(7)
    gradient = torch.randn(case.hidden.shape, generator=generator)
    return (
        gradient.to(case.hidden.device, case.hidden.dtype),
        torch.randn(case.views.shape, generator=generator).to(case.hidden.device),
    )


def factor(case: Case, key: Tensor, width: int, site: int) -> Tensor | None:
    """The dropout [width] of one token behind a layer."""
    if not case.dropout:
        return None
    spans = torch.tensor([[0, 1]], device=key.device)
    uniform = noise_reference(
        key.view(1), spans, 1, width, seed=case.seed, site=case.site + site, distribution="uniform"
    )
    return (uniform[0, 0] < 1 - 2 * case.dropout) / (1 - case.dropout)


def exact(case: Case, gradient: Tensor, error_gradient: Tensor) -> list[Tensor]:
    """(out, error, gradient of hidden, gradients of the weights) in float64, token by token."""
    hidden = case.hidden.double().requires_grad_()
    weights = [weight.double().requires_grad_() for weight in case.weights]
    own = [bottleneck.Weights(*weights[i : i + 8]) for i in range(0, len(weights), 8)]
    batch, tokens, _ = hidden.shape
    spans = [[0, tokens]] * batch if case.spans is None else case.spans.tolist()
    out, error = [], []
    for b, t in [(b, t) for b in range(batch) for t in range(tokens)]:
        x, view = hidden[b, t], case.views[b, t]
        real = spans[b][0] <= t < spans[b][1]

        def reached(x, m, b=b, t=t):
            d, h = own[m].encoder.shape[0], own[m].inner_encoder.shape[1]
            drops = (
                factor(case, case.keys[b, t], d, 2 * m << 16),
                factor(case, case.keys[b, t], h, 2 * m + 1 << 16),
            )
            return bottleneck.bottleneck_reference(x, own[m], case.inner[b, t, m], *drops)

        asked = range(len(own)) if case.reconstruct == "all" else [m for m in range(len(own)) if m == view]
        asked = asked if real and case.reconstruct != "none" else []
        squares = [(reached(x.detach(), m) - x.detach()).square().mean() for m in asked]
        error.append(sum(squares) / max(len(squares), 1) + 0 * x.detach()[0])
        out.append(reached(x, view) if real and view < len(own) else x)
    out, error = torch.stack(out).view_as(hidden), torch.stack(error).view(batch, tokens)
    total = (out * gradient.double()).sum() + (error * error_gradient.double()).sum()
    found = torch.autograd.grad(total, [hidden, *weights], allow_unused=True, materialize_grads=True)
    return [out.detach(), error.detach(), *found]


def results(backend, case: Case, gradient: Tensor, error_gradient: Tensor) -> list[Tensor]:
    """What `exact` returns, from a fast path."""
    operations = [backend.operation("bottleneck", name) for name in ("bottleneck", "bottleneck_backward")]
    pulled, found = operations[1](gradient, error_gradient, *case)
    return [*operations[0](*case), pulled, *found]


def names(case: Case) -> list[str]:
    views = range(len(case.weights) // len(WEIGHTS))
    return ["out", "error", "hidden", *(f"{name} of view {m}" for m in views for name in WEIGHTS)]


def check(backend, case: Case) -> None:
    """All results to 1e-5 of the largest."""
    upstream = upstream_of(case)
    for name, got, expected in zip(names(case), results(backend, case, *upstream), exact(case, *upstream)):
        assert got.shape == expected.shape, name
        largest = expected.abs().max().clamp_min(1.0) if expected.numel() else torch.ones(())
        torch.testing.assert_close(
            got.double(), expected, rtol=0, atol=1e-5 * largest.item(), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("reconstruct", bottleneck.RECONSTRUCT)
def test_everything_against_the_loop(backend, reconstruct, dropout):
    case = case_of(backend.device, reconstruct=reconstruct, dropout=dropout)
    upstream = upstream_of(case)
    pulled, found = backend.operation("bottleneck", "bottleneck_backward")(*upstream, *case)
    assert pulled.dtype == torch.float32
    assert [one.shape for one in found] == [one.shape for one in case.weights]
    check(backend, case)


SPECIAL = {
    "every token real": {"spans": None},
    "an example without a real token": {"spans": ((2, 2), (3, 5))},
    "no inner autoencoders": {"choices": 0, "reconstruct": "all"},
    "one inner autoencoder": {"choices": 1, "reconstruct": "all"},
    "one view": {"sizes": ((4, 2),)},
    "one token, one channel": {
        "shape": (1, 1, 1),
        "spans": None,
        "reconstruct": "all",
        "sizes": ((1, 1), (2, 1)),
    },
    "odd sizes": {"shape": (1, 3, 67), "sizes": ((37, 5), (17, 33)), "spans": None},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("change", SPECIAL.values(), ids=SPECIAL)
def test_special_cases(backend, change):
    check(backend, case_of(backend.device, **change))


@pytest.mark.usefixtures("poisoned")
def test_views_that_nobody_takes_have_gradients_of_zero(backend):
    case = case_of(backend.device, spans=None)
    for views in (torch.full_like(case.views, 1), torch.full_like(case.views, 2)):
        changed = case._replace(views=views)
        check(backend, changed)
        pulled, found = backend.operation("bottleneck", "bottleneck_backward")(*upstream_of(case), *changed)
        assert all((one == 0).all() for one in found[: 8 if views[0, 0] == 1 else 16])
    out, error = backend.operation("bottleneck")(*changed)
    assert torch.equal(out, case.hidden)
    assert (error == 0).all()
    assert torch.equal(pulled, upstream_of(case)[0])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_error_budget(backend, dtype, weight_dtype):
    """At most twice torch's error in those dtypes, and two units in the last place: the interpreter truncates to bf16."""
    case = case_of(backend.device, dtype=dtype, weight_dtype=weight_dtype, reconstruct="all")
    upstream = upstream_of(case)
    eager = [*bottleneck.bottleneck_torch(*case)]
    pulled, found = bottleneck.bottleneck_backward_torch(*upstream, *case)
    eager += [pulled, *found]
    got = results(backend, case, *upstream)
    assert (got[0].dtype, got[1].dtype, got[2].dtype) == (dtype, torch.float32, dtype)
    for name, one, plain, expected in zip(names(case), got, eager, exact(case, *upstream)):
        coarse = max(ULP[dtype], ULP[weight_dtype])
        budget = 2 * (plain - expected).norm() + 2 * coarse * expected.norm()
        assert (one - expected).norm() <= budget, name
        if name not in ("out", "error", "hidden"):
            assert one.dtype == weight_dtype


def test_strides_do_not_matter(backend):
    case = case_of(backend.device)
    upstream = upstream_of(case)
    expected = results(backend, case, *upstream)
    turned = case._replace(
        hidden=case.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        weights=[one.mT.contiguous().mT if one.ndim > 1 else one for one in case.weights],
        views=case.views.T.contiguous().T,
        inner=case.inner.transpose(0, 2).contiguous().transpose(0, 2),
        keys=case.keys.T.contiguous().T,
    )
    gradient, error_gradient = upstream
    gradient = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    before = turned.hidden.clone()
    for got, one in zip(results(backend, turned, gradient, error_gradient.T.contiguous().T), expected):
        torch.testing.assert_close(got, one, rtol=1e-6, atol=1e-6)
    assert torch.equal(turned.hidden, before)


@pytest.mark.parametrize("reconstruct", bottleneck.RECONSTRUCT)
def test_padding_is_copied_and_may_hold_anything(backend, reconstruct):
    case = case_of(backend.device, reconstruct=reconstruct)
    gradient, error_gradient = upstream_of(case)
    clean = results(backend, case, gradient, error_gradient)
    outside = ~inside_spans(case.spans, 5)
    hidden = case.hidden.masked_fill(outside[..., None], float("nan"))
    gradient = gradient.masked_fill(outside[..., None], float("inf"))
    error_gradient = error_gradient.masked_fill(outside, float("nan"))
    got = results(backend, case._replace(hidden=hidden), gradient, error_gradient)
    assert torch.equal(clean[0][outside], case.hidden[outside])
    assert torch.equal(got[0].view(torch.int32)[outside], hidden.view(torch.int32)[outside])
    assert torch.equal(got[2][outside], gradient[outside])
    assert (got[1][outside] == 0).all()
    for i, (one, other) in enumerate(zip(got, clean)):
        same = slice(None) if i > 2 else ~outside
        assert torch.equal(one[same], other[same])


@pytest.mark.parametrize("reconstruct", ["sampled", "all"])
def test_the_gradient_of_the_error_never_reaches_hidden(backend, reconstruct):
    case = case_of(backend.device, reconstruct=reconstruct)
    gradient, error_gradient = upstream_of(case)
    backward = backend.operation("bottleneck", "bottleneck_backward")
    with_error = backward(gradient, error_gradient, *case)
    without = backward(gradient, torch.zeros_like(error_gradient), *case)
    assert torch.equal(with_error[0], without[0])
    assert not torch.equal(with_error[1][0], without[1][0])
    none = backward(gradient, error_gradient, *case._replace(reconstruct="none"))
    torch.testing.assert_close(none[0], without[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(none[1], without[1]):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", [2, 1], ids=["outer", "inner"])
def test_dropout_has_the_same_bits_everywhere(backend, choice):
    """Layers that give ones, so that the factors themselves come out: behind the outer encoder, behind an inner one."""
    width = 39
    case = case_of(backend.device, shape=(1, 3, width), sizes=((width, width),) * 2, spans=None)
    one = torch.eye(width, device=backend.device)
    weights = []
    for _ in range(2):
        own = [torch.zeros_like(weight) for weight in case.weights[:8]]
        own[1].fill_(100.0)
        own[3].fill_(100.0)
        own[4] += one
        own[6] += one
        weights += own
    views = torch.tensor([[0, 1, 1]], device=backend.device)
    case = case._replace(weights=weights, views=views, inner=torch.full_like(case.inner, choice))
    out, _ = backend.operation("bottleneck")(*case)
    for t, m in enumerate(views[0].tolist()):
        site = 2 * m + (choice < 2) << 16
        expected = factor(case, case.keys[0, t], width, site).float()
        if choice < 2:
            assert torch.equal(out[0, t] != 0, expected != 0)
        else:
            assert torch.equal(out[0, t], expected)
    assert 0.5 < (out != 0).float().mean() < 1


def test_an_example_alone_gives_the_same_rows(backend):
    case = case_of(backend.device)
    upstream = upstream_of(case)
    whole = results(backend, case, *upstream)
    parts = []
    for i in range(2):
        own = slice(i, i + 1)
        alone = case._replace(
            **{name: getattr(case, name)[own] for name in ("hidden", "views", "inner", "keys", "spans")}
        )
        parts.append(results(backend, alone, *(one[own] for one in upstream)))
    for i, (one, *two) in enumerate(zip(whole, *parts)):
        joined = torch.cat(two) if i < 3 else two[0] + two[1]
        torch.testing.assert_close(joined, one, rtol=1e-5, atol=1e-6)


def test_the_tile_changes_the_sums_by_rounding_only(backend, monkeypatch):
    if backend.name != "triton":
        pytest.skip("only the Triton kernels have tiles")
    from dist_reg_kernels import bottleneck_tiles, bottleneck_triton, bottleneck_weights

    case = case_of(backend.device, shape=(2, 5, 35), sizes=((20, 17),), reconstruct="all")
    upstream = upstream_of(case)
    expected = results(backend, case, *upstream)
    for module in (bottleneck_tiles, bottleneck_triton, bottleneck_weights):
        monkeypatch.setattr(module, "blocks", lambda *_: {"COLUMNS": 16, "DEPTH": 16})
    monkeypatch.setattr(bottleneck_tiles, "rows_of_tile", lambda wide: 16 if backend.device == "cuda" else 2)
    for got, one in zip(results(backend, case, *upstream), expected):
        torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-6)


def test_empty_batches(backend):
    for shape in ((0, 5, 11), (2, 0, 11)):
        case = case_of(backend.device, shape=shape, spans=None)
        out, error, pulled, *found = results(backend, case, *upstream_of(case))
        assert (out.shape, error.shape, pulled.shape) == (shape, shape[:2], shape)
        assert all((one == 0).all() for one in found)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_the_device_is_never_waited_for(device):
    case = case_of(device, reconstruct="all")
    upstream = upstream_of(case)
    for mode in ("default", "error"):  # the first round compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            bottleneck.bottleneck_triton(*case)
            bottleneck.bottleneck_backward_triton(*upstream, *case)
        finally:
            torch.cuda.set_sync_debug_mode("default")
