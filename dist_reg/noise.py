"""Which noise a token gets: example keys, token spans and site numbers.

The noise itself is a function of (run seed, example key, site, token in the example, channel), see
`dist_reg_kernels.philox`. These functions make its arguments in plain torch, on any device, without a host sync.
"""

import torch
from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def mix64(values: Tensor) -> Tensor:
    """The finaliser of splitmix64, a bijection of int64 in which every input bit moves about half of the output.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    values = (values ^ _shift_right(values, 30)) * MIX_1
    values = (values ^ _shift_right(values, 27)) * MIX_2
    return values ^ _shift_right(values, 31)


def example_keys(example_ids: Tensor, epoch: int) -> Tensor:
    """The noise keys of the examples in one epoch: int64 [B] from int64 [B], fresh noise every epoch."""
    return mix64(mix64(example_ids.to(torch.int64) + GOLDEN_GAMMA) + _wrapped((epoch + 1) * GOLDEN_GAMMA))


def draw_example_keys(batch_size: int, device: torch.device | str, rank: int = 0) -> Tensor:
    """Keys int64 [batch_size] for a batch without example ids: one draw from torch's global CPU generator.

    Activation checkpointing and resume restore that generator, so they replay the draw. Ranks that share a seed
    draw the same number; `rank` keeps their keys apart.
    """
    drawn = torch.empty(1, dtype=torch.int64, device="cpu").random_()
    rows = torch.arange(batch_size, device="cpu")
    keys = mix64(mix64(drawn + _wrapped((rank + 1) * GOLDEN_GAMMA)) + rows * GOLDEN_GAMMA)
    return keys.to(device, non_blocking=True)


def token_keys(keys: Tensor, tokens: int, spans: Tensor | None) -> Tensor:
    """A key for every token of the batch: int64 [B, tokens] from the examples' int64 [B].

    Tokens count from their example's first real one, so padding changes no key.
    """
    position = torch.arange(1, tokens + 1, device=keys.device)
    counted = position if spans is None else position - spans[:, :1]
    return mix64(keys[:, None] + counted * GOLDEN_GAMMA)


def step_keys(number: int, device: torch.device | str) -> Tensor:
    """The one key, int64 [1], of what all examples of optimizer step `number` share."""
    return mix64(torch.full((1,), _wrapped((number + 1) * GOLDEN_GAMMA), dtype=torch.int64, device=device))


def token_spans(attention_mask: Tensor | None, batch: int, tokens: int, device: torch.device | str) -> Tensor:
    """First real token and one past the last of every example: int32 [batch, 2].

    `attention_mask` [batch, tokens] is nonzero at real tokens; None means that all are. A row without a real
    token has the empty span (0, 0). Raises ValueError for a mask of another shape.
    """
    if attention_mask is None:
        spans = torch.zeros(batch, 2, dtype=torch.int32, device=device)
        spans[:, 1] = tokens
        return spans
    if attention_mask.shape != (batch, tokens):
        raise ValueError(
            f"attention_mask must be [batch, tokens] = {[batch, tokens]}, got {list(attention_mask.shape)}"
        )
    real = attention_mask.to(device) != 0
    position = torch.arange(tokens, device=device)
    end = torch.where(real, position + 1, 0).amax(dim=1)
    first = torch.minimum(torch.where(real, position, tokens).amin(dim=1), end)
    return torch.stack((first, end), dim=1).to(torch.int32)


def sequence_lengths(position_ids: Tensor) -> Tensor:
    """How many tokens the example of every token has: int64 [B, T] from `position_ids` [B, T], which begin anew with each."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    example = starts.cumsum(1)
    sizes = torch.zeros(len(example), example.shape[1] + 1, dtype=torch.int64, device=example.device)
    return sizes.scatter_add_(1, example, torch.ones_like(example)).gather(1, example)


def site_id(method: int, point: int, layer: int) -> int:
    """The 32-bit number of a place that takes noise: method (8 bits), point in the layer (8), layer (16).

    Raises ValueError when a part does not fit.
    """
    for name, value, bits in (("method", method, 8), ("point", point, 8), ("layer", layer, 16)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be from 0 to {(1 << bits) - 1}, got {value}")
    return method << 24 | point << 16 | layer


def noise_survival(before: Tensor, after: Tensor, spans: Tensor | None) -> Tensor:
    """Fraction of the first example's real activations that the noise changed.

    `before`, `after`: [B, T, D] in the dtype of the stream, of which the first example counts; `spans`: int32 [B, 2] or
    None. Returns a scalar in [0, 1]. One example is enough of a sample and keeps the measurement out of the step's cost.
    """
    changed = (before[0] != after[0]).float().mean(-1)
    if spans is None:
        return changed.mean()
    tokens = torch.arange(changed.shape[0], device=changed.device)
    real = (tokens >= spans[0, 0]) & (tokens < spans[0, 1])
    return (changed * real).sum() / real.sum().clamp(min=1)


def survival_warning(method: str, sigma: float, metrics: dict[str, float], fixes: str) -> str | None:
    """A sentence naming `fixes` where less than half of the activations change, by `METHOD/noise_survival`."""
    survival = metrics.get(f"{method}/noise_survival")
    if survival is None or survival >= 0.5:
        return None
    return (
        f"{method}: only {survival:.1%} of the activations change when noise of sigma {sigma:g} is added; the rest is "
        f"lost to rounding. Use {fixes}."
    )


def _shift_right(values: Tensor, count: int) -> Tensor:
    return (values >> count) & ((1 << (64 - count)) - 1)


def _wrapped(value: int) -> int:
    return ((value + 2**63) & (2**64 - 1)) - 2**63
