"""The operations that `dist-reg bench kernels` times: a table, one entry an operation.

`plain` is the straightforward form in torch. With torch's own generator it is what the operation is timed against, with
the noise of the reference and in float64 it is what the operation is checked against.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, rms_norm

from dist_reg import noise, ops

SIGMA, SEED, SITE, EPSILON = 0.1, 1, 7, 1e-5
LAYERS = 6  # of layer_mix
INNER = 2  # inner autoencoders in each of bottleneck's three

Noise = Callable[[Tensor], Tensor]
Outputs = tuple[Tensor, ...]


class Batch(NamedTuple):
    """What an operation may work on, in one shape and dtype. Every token is real, so that bytes count exactly."""

    hidden: Tensor
    """[B, T, D]"""
    twin: Tensor
    """[2B, T, D]"""
    keys: Tensor
    """int64 [B]"""
    spans: Tensor
    """int32 [B, 2]"""
    mask: Tensor
    """[B, T, 1] in the dtype of the streams, as an eager user multiplies with it"""
    views: Tensor
    """int64 [B, T], 0 to 3: the autoencoder that a token takes, or none"""
    inner: Tensor
    """int64 [B, T, 3], 0 to 2: the inner one that it takes in each, or none"""
    token_keys: Tensor
    """int64 [B, T]"""

    @property
    def noise(self) -> dict[str, Any]:
        """The arguments of an operation that draws noise."""
        return {"sigma": SIGMA, "seed": SEED, "site": SITE, "example_keys": self.keys, "spans": self.spans}


class Operation(NamedTuple):
    """One entry: the public operation, its plain form, and the bytes that one pass must move."""

    streams: Callable[[Batch], Outputs]
    """The tensors that it reads and that get a gradient; of the first, a sum runs over the last dimension."""
    ours: Callable[..., Outputs]
    """(batch, *streams) to outputs"""
    plain: Callable[..., Outputs]
    """(noise, batch, *streams) to the same outputs; `noise` draws sigma * eps in the shape of its argument"""
    forward: int
    """Streams of N = B * T * D elements that the forward pass reads and writes."""
    backward: int = 0
    """The same for the backward pass; 0 where it is the identity or another entry's: only the forward is timed then."""
    distribution: str | None = "normal"
    """Of its noise; None for an operation that draws none."""
    eager: str = "normal"
    """Distribution of the noise that eager torch draws in its place: `sigma * torch.randn_like(h)`, or "uniform"."""
    weights: bool = False
    """Whether all but its first stream are weights: read forward, read again and their gradients written backward."""

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward", "backward", "both") if self.backward else ("forward",)

    def streams_moved(self, which: str) -> int:
        return {"forward": self.forward, "backward": self.backward}.get(which, self.forward + self.backward)

    def bytes_moved(self, which: str, batch: Batch) -> int:
        moved = self.streams_moved(which) * batch.hidden.nbytes
        if self.weights:
            times = {"forward": 1, "backward": 2, "both": 3}[which]
            moved += times * sum(weight.nbytes for weight in self.streams(batch)[1:])
        return moved

    def eager_noise(self, stream: Tensor) -> Tensor:
        """sigma * eps from torch's own generator."""
        if self.eager == "uniform":
            return torch.empty_like(stream).uniform_(-SIGMA, SIGMA)
        return SIGMA * torch.randn_like(stream)


def make_batch(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Batch:
    """Streams of size 1 whose halves lie 0.3 apart."""
    batch, tokens, _ = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(shape, generator=generator, device=device)
    step = 0.3 * torch.randn(shape, generator=generator, device=device)
    return Batch(
        hidden.to(dtype),
        torch.cat((hidden, hidden + step)).to(dtype),
        noise.example_keys(torch.arange(batch, device=device), epoch=0),
        noise.token_spans(None, batch, tokens, device),
        torch.ones(batch, tokens, 1, dtype=dtype, device=device),
        torch.randint(4, (batch, tokens), generator=generator, device=device),
        torch.randint(INNER + 1, (batch, tokens, 3), generator=generator, device=device),
        torch.arange(batch * tokens, device=device).view(batch, tokens),
    )


def _plain_fork(draw: Noise, _batch: Batch, hidden: Tensor) -> Outputs:
    return (torch.cat((hidden, hidden + draw(hidden))),)


def _plain_distance(batch: Batch, twin: Tensor) -> Tensor:
    clean, noisy = twin.chunk(2)
    return ((noisy - clean) ** 2 * batch.mask).sum(-1)


def _plain_perturb_stability(draw: Noise, batch: Batch, twin: Tensor) -> Outputs:
    clean, noisy = twin.chunk(2)
    drawn = draw(clean)
    return torch.cat((clean + drawn, noisy + drawn)), _plain_distance(batch, twin)


def _two_streams(batch: Batch) -> Outputs:
    return batch.hidden, batch.twin[batch.hidden.shape[0] :]


def _plain_layer_norm(draw: Noise, _batch: Batch, hidden: Tensor, residual: Tensor) -> Outputs:
    return (layer_norm(hidden + residual, hidden.shape[-1:], eps=EPSILON) + draw(hidden),)


def _layer_norm(batch: Batch, hidden: Tensor, residual: Tensor, **changed: Any) -> Outputs:
    ones, zeros = hidden.new_ones(hidden.shape[-1]), hidden.new_zeros(hidden.shape[-1])
    noise = batch.noise | changed
    return (ops.layer_norm_perturb(hidden, ones, zeros, residual=residual, epsilon=EPSILON, **noise),)


def _plain_rms_norm(draw: Noise, _batch: Batch, hidden: Tensor) -> Outputs:
    stream = hidden + draw(hidden)
    return stream, rms_norm(stream, hidden.shape[-1:], eps=EPSILON)


def _rms_norm(batch: Batch, hidden: Tensor, **changed: Any) -> Outputs:
    noise = batch.noise | changed
    return ops.perturb_rms_norm(hidden, hidden.new_ones(hidden.shape[-1]), epsilon=EPSILON, **noise)


def _plain_symmetric_kl(_draw: Noise, _batch: Batch, logits: Tensor, other: Tensor) -> Outputs:
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    return (((p.exp() - q.exp()) * (p - q)).sum(-1),)


def _states_and_gates(batch: Batch) -> Outputs:
    """The states of LAYERS layers, each in memory of its own, and their gates in fp32, none of them closed."""
    generator = torch.Generator(batch.hidden.device).manual_seed(3)
    states = [batch.hidden.roll(layer, 1) for layer in range(LAYERS)]
    gates = torch.rand(
        LAYERS, batch.hidden.shape[0], generator=generator, device=batch.hidden.device, dtype=torch.float32
    )
    return *states, gates + 0.1


def _plain_layer_mix(_draw: Noise, _batch: Batch, *given: Tensor) -> Outputs:
    states = torch.stack(given[:-1])
    return ((given[-1].to(states.dtype)[:, :, None, None] * states).sum(0),)


def _hidden_and_weights(batch: Batch) -> Outputs:
    """hidden, and three autoencoders of widths D/6, D/3 and 2D/3 with inner ones of half their width."""
    hidden = batch.hidden
    channels = hidden.shape[-1]
    generator = torch.Generator(hidden.device).manual_seed(2)
    weights = []
    for width in (max(channels // 6, 1), max(channels // 3, 1), max(2 * channels // 3, 1)):
        narrow = max(width // 2, 1)
        encoders = (width, channels), (width,), (INNER, narrow, width), (INNER, narrow)
        decoders = (INNER, width, narrow), (INNER, width), (channels, width), (channels,)
        for shape in (*encoders, *decoders):
            weight = torch.randn(shape, generator=generator, device=hidden.device) / shape[-1] ** 0.5
            weights.append(weight.to(hidden.dtype))
    return hidden, *weights


def _bottleneck(batch: Batch, hidden: Tensor, *weights: Tensor, reconstruct: str) -> Outputs:
    out, error = ops.bottleneck(
        hidden,
        weights,
        views=batch.views,
        inner=batch.inner,
        token_keys=batch.token_keys,
        seed=SEED,
        site=SITE,
        spans=batch.spans,
        reconstruct=reconstruct,
    )
    return (out,) if reconstruct == "none" else (out, error)


def _plain_bottleneck(batch: Batch, hidden: Tensor, *weights: Tensor) -> Tensor:
    """Every autoencoder and every inner one on every token, then torch.where."""
    out = hidden
    for m in range(3):
        own = weights[8 * m : 8 * m + 8]
        code = torch.tanh(linear(hidden, own[0], own[1]))
        decoded = code
        for k in range(INNER):
            narrow = torch.tanh(linear(code, own[2][k], own[3][k]))
            chosen = (batch.inner[..., m] == k)[..., None]
            decoded = torch.where(chosen, torch.tanh(linear(narrow, own[4][k], own[5][k])), decoded)
        out = torch.where((batch.views == m)[..., None], linear(decoded, own[6], own[7]), out)
    return out


def _plain_reconstruction(_draw: Noise, batch: Batch, hidden: Tensor, *weights: Tensor) -> Outputs:
    # The error must not reach hidden: the autoencoders see it a second time, detached.
    apart = _plain_bottleneck(batch, hidden.detach(), *weights) - hidden.detach()
    return _plain_bottleneck(batch, hidden, *weights), apart.float().square().mean(-1)


def _perturb(distribution: str, eager: str = "normal") -> Operation:
    return Operation(
        streams=lambda batch: (batch.hidden,),
        ours=lambda batch, hidden: (ops.perturb(hidden, **batch.noise, distribution=distribution),),
        plain=lambda draw, batch, hidden: (hidden + draw(hidden),),
        forward=2,
        distribution=distribution,
        eager=eager,
    )


OPERATIONS: dict[str, Operation] = {
    "perturb uniform": _perturb("uniform"),
    "perturb uniform, eager uniform": _perturb("uniform", eager="uniform"),
    "perturb normal": _perturb("normal"),
    "fork": Operation(
        streams=lambda batch: (batch.hidden,),
        ours=lambda batch, hidden: (ops.fork(hidden, **batch.noise),),
        plain=_plain_fork,
        forward=3,
        backward=3,
    ),
    "stability": Operation(
        streams=lambda batch: (batch.twin,),
        ours=lambda batch, twin: ops.stability(twin, spans=batch.spans),
        plain=lambda draw, batch, twin: (twin.view_as(twin), _plain_distance(batch, twin)),
        forward=2,
        backward=6,
        distribution=None,
    ),
    "perturb_stability": Operation(
        streams=lambda batch: (batch.twin,),
        ours=lambda batch, twin: ops.perturb_stability(twin, **batch.noise),
        plain=_plain_perturb_stability,
        forward=4,
        backward=6,
    ),
    "layer_norm_perturb": Operation(
        streams=_two_streams, ours=_layer_norm, plain=_plain_layer_norm, forward=3, backward=4
    ),
    "perturb_rms_norm": Operation(
        streams=lambda batch: (batch.hidden,), ours=_rms_norm, plain=_plain_rms_norm, forward=3, backward=4
    ),
    # The kernels of the two norms with the noise compiled out: what theirs costs is the share above these.
    "layer_norm_perturb, sigma 0": Operation(
        streams=_two_streams,
        ours=partial(_layer_norm, sigma=0.0),
        plain=lambda draw, batch, hidden, residual: (
            layer_norm(hidden + residual, hidden.shape[-1:], eps=EPSILON),
        ),
        forward=3,
        distribution=None,
    ),
    "perturb_rms_norm, sigma 0": Operation(
        streams=lambda batch: (batch.hidden,),
        ours=partial(_rms_norm, sigma=0.0),
        plain=lambda draw, batch, hidden: (hidden.clone(), rms_norm(hidden, hidden.shape[-1:], eps=EPSILON)),
        forward=3,
        distribution=None,
    ),
    "symmetric_kl": Operation(
        streams=_two_streams,
        ours=lambda batch, logits, other: (ops.symmetric_kl(logits, other),),
        plain=_plain_symmetric_kl,
        forward=2,
        backward=4,
        distribution=None,
    ),
    "layer_mix": Operation(
        streams=_states_and_gates,
        ours=lambda batch, *given: (ops.layer_mix(given[:-1], given[-1]),),
        plain=_plain_layer_mix,
        forward=LAYERS + 1,
        backward=2 * LAYERS + 1,
        distribution=None,
    ),
    # A token costs 4 D d + 4 d h FLOP forward, those of its own autoencoder (the latter with an inner choice), and up to
    # four times that backward: the inside again, two rows back through the layers, and the weights.
    "bottleneck": Operation(
        streams=_hidden_and_weights,
        ours=partial(_bottleneck, reconstruct="sampled"),
        plain=_plain_reconstruction,
        forward=2,
        backward=3,
        distribution=None,
        weights=True,
    ),
    # Without the error eager torch goes through its autoencoders once, too.
    "bottleneck, no reconstruction": Operation(
        streams=_hidden_and_weights,
        ours=partial(_bottleneck, reconstruct="none"),
        plain=lambda draw, batch, hidden, *weights: (_plain_bottleneck(batch, hidden, *weights),),
        forward=2,
        backward=3,
        distribution=None,
        weights=True,
    ),
}
