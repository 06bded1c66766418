"""How far the halves of a twin stream lie apart, with and without the next layer's noise:
`dist_reg_kernels.stability` and `dist_reg_kernels.perturb_stability`."""

from typing import Any

import torch
from torch import Tensor

from dist_reg.errors import UserError
from dist_reg.ops.backend import implementation, nobody_watches
from dist_reg.ops.checks import check_keys, check_noise, check_spans, check_stream, signed_seed


def stability(
    twin: Tensor, *, spans: Tensor | None = None, detach_clean: bool = False
) -> tuple[Tensor, Tensor]:
    """The twin stream itself, to go on with, and the squared distance of its halves at every token.

    `twin` [2B, T, D] holds the clean half and behind it the noisy one (`fork`), fp32, bf16, fp16 or fp64, any strides.
    `spans` int32 or int64 [B, 2] holds the first real token and one past the last; tokens outside have distance 0.
    Returns (twin, distance [B, T] in fp32, float64 for float64). Use the returned twin in place of the given one:
    its gradient and that of the distance are then joined in one pass. `detach_clean` keeps the distance's gradient
    from the clean half.

    Raises ValueError, naming the argument, for a wrong shape, dtype or device.
    """
    check_twin(twin)
    check_spans(spans, twin.shape[0] // 2, twin, "twin")
    return _Stability.apply(twin, spans, detach_clean)


def perturb_stability(
    twin: Tensor,
    *,
    sigma: float,
    seed: int,
    example_keys: Tensor,
    site: int,
    spans: Tensor | None = None,
    distribution: str = "normal",
    scale: str = "absolute",
    detach_clean: bool = False,
) -> tuple[Tensor, Tensor]:
    """`stability` of `twin` [2B, T, D] and, in the same pass, `perturb` with the same noise on both halves.

    `example_keys` is int64 [B]: both halves of an example take the noise of its one key. Returns (perturbed twin,
    distance [B, T] before the noise). Raises ValueError, naming the argument, for a wrong shape, dtype, device or
    option.
    """
    check_twin(twin)
    batch = twin.shape[0] // 2
    check_keys(example_keys, batch, twin, "twin")
    check_spans(spans, batch, twin, "twin")
    check_noise(sigma, distribution, scale)
    return _perturb_stability(
        twin,
        example_keys,
        spans,
        signed_seed(seed),
        site,
        sigma,
        distribution,
        scale == "relative",
        detach_clean,
    )


def check_twin(twin: Tensor) -> None:
    """A twin stream: two halves of a batch behind each other."""
    check_stream("twin", twin)
    if twin.shape[0] % 2:
        raise UserError(f"twin must hold two halves [2 * batch, tokens, channels], got {list(twin.shape)}")


class _Stability(torch.autograd.Function):
    """The twin is handed on as a view, so that backward receives both gradients at once."""

    @staticmethod
    def forward(ctx: Any, twin: Tensor, spans: Tensor | None, detach_clean: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(twin, spans)
        ctx.detach_clean = detach_clean
        return twin.view_as(twin), (_make_distance if nobody_watches(twin) else _distance)(twin, spans)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        twin, spans = ctx.saved_tensors
        gradient, upstream = gradients
        return _stability_backward(twin, spans, gradient, upstream, ctx.detach_clean), None, None


def _make_distance(twin: Tensor, spans: Tensor | None) -> Tensor:
    return implementation("stability", "stability", twin)(twin, spans)


# Not torch.library.custom_op, whose wrappers take a tenth of a small forward pass. What they guard cannot occur:
# nothing differentiates through this, because only _Stability's forward calls it.
_library = torch.library.Library("dist_reg", "FRAGMENT")
_library.define("stability(Tensor twin, Tensor? spans) -> Tensor")
_library.impl("stability", _make_distance, "CompositeExplicitAutograd")
_distance = torch.ops.dist_reg.stability.default


@torch.library.register_fake("dist_reg::stability", lib=_library)
def _(twin: Tensor, spans: Tensor | None) -> Tensor:
    return _empty_distance(twin)


@torch.library.custom_op("dist_reg::stability_backward", mutates_args=())
def _stability_backward(
    twin: Tensor, spans: Tensor | None, gradient: Tensor, upstream: Tensor, detach_clean: bool
) -> Tensor:
    function = implementation("stability", "stability_backward", twin)
    return function(twin, spans, gradient, upstream, detach_clean)


@_stability_backward.register_fake
def _(twin: Tensor, spans: Tensor | None, gradient: Tensor, upstream: Tensor, detach_clean: bool) -> Tensor:
    return twin.new_empty(twin.shape)


@torch.library.custom_op("dist_reg::perturb_stability", mutates_args=())
def _perturb_stability(
    twin: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
    detach_clean: bool,
) -> tuple[Tensor, Tensor]:
    function = implementation("perturb_stability", "perturb_stability", twin)
    return function(twin, keys, spans, seed, site, sigma, distribution, relative)


@_perturb_stability.register_fake
def _(
    twin: Tensor,
    keys: Tensor,
    spans: Tensor | None,
    seed: int,
    site: int,
    sigma: float,
    distribution: str,
    relative: bool,
    detach_clean: bool,
) -> tuple[Tensor, Tensor]:
    return twin.new_empty(twin.shape), _empty_distance(twin)


def _save_twin(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    twin, _, spans, *_, detach_clean = inputs
    ctx.save_for_backward(twin, spans)
    ctx.detach_clean = detach_clean


def _twin_gradient(ctx: Any, gradient: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
    twin, spans = ctx.saved_tensors
    pulled = _stability_backward(twin, spans, gradient, upstream, ctx.detach_clean)
    return pulled, None, None, None, None, None, None, None, None


_perturb_stability.register_autograd(_twin_gradient, setup_context=_save_twin)


def _empty_distance(twin: Tensor) -> Tensor:
    dtype = torch.promote_types(twin.dtype, torch.float32)
    return twin.new_empty(twin.shape[0] // 2, twin.shape[1], dtype=dtype)
