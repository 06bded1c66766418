"""How far noise at one layer moves every layer above: the picture by which LNSR's paper motivates itself (figure 1).

Noise of a given share of each token's norm is injected at each layer in turn; the error at every state above is
relative to that state. Shapes: B examples, T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dist_reg.backbone import find_backbone, first_output, hidden_argument, replace_hidden
from dist_reg.directions import gaussian, rescaled
from dist_reg.methods.base import Step
from dist_reg.noise import example_keys, site_id, token_spans

SITE_METHOD = 255


@torch.no_grad()
def stability_curves(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    size: float,
    *,
    seed: int = 0,
    layers_path: str | None = None,
) -> Tensor:
    """Relative error [L, L + 1] of h^r (column) when noise of `size` times each token's norm enters at h^b (row).

    Mean over all real tokens of `batches`, which hold input_ids and attention_mask [B, T]; NaN where r < b. The model
    is put into eval mode, and the noise of an example is a function of its place in `batches`.
    """
    layers = find_backbone(model, layers_path).layers
    model.eval()
    total = torch.zeros(len(layers), len(layers) + 1, dtype=torch.float64)
    tokens, seen = 0, 0
    for batch in batches:
        mask = batch["attention_mask"]
        keys = example_keys(torch.arange(seen, seen + len(mask), device=mask.device), 0)
        spans = token_spans(mask, len(mask), mask.shape[1], mask.device)
        step = Step(seed, keys, mask.shape[1], spans, False, torch.ones(len(mask), device=mask.device))
        clean = _states(model, layers, batch, step, size, None)
        real = mask.bool()
        for row in range(len(layers)):
            noisy = _states(model, layers, batch, step, size, row)
            for state in range(row, len(layers) + 1):
                error = (noisy[state] - clean[state]).norm(dim=-1) / clean[state].norm(dim=-1)
                total[row, state] += error[real].sum().item()
        tokens += int(mask.sum())
        seen += len(mask)
    curves = total / max(tokens, 1)
    below = torch.ones_like(curves).tril(-1).bool()
    return curves.masked_fill(below, torch.nan)


def _states(
    model: nn.Module, layers: tuple[nn.Module, ...], batch: Any, step: Step, size: float, noisy: int | None
) -> list[Tensor]:
    """h^0 to h^L in fp32, of one forward with noise entering layer `noisy`."""
    states: list[Tensor] = []

    def enter(index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden_states = hidden_argument(args, kwargs)
        if index == noisy:
            noise = gaussian(hidden_states, step, site_id(SITE_METHOD, 0, index))
            noise = rescaled(noise, hidden_states, size)
            hidden_states = (hidden_states.float() + noise).to(hidden_states.dtype)
        states.append(hidden_states.float())
        return replace_hidden(args, kwargs, hidden_states)

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: enter(index, args, kwargs), with_kwargs=True
        )
        for index, layer in enumerate(layers)
    ]
    hooks.append(
        layers[-1].register_forward_hook(lambda _, args, out: states.append(first_output(out).float()))
    )
    try:
        model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return states
