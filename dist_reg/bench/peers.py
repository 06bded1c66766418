"""The straightforward PyTorch forms that methods are measured against: separate passes, hidden states collected.

Each is a module whose forward returns the loss of the inner model with the method's term in it, so that it
can be trained, and given to DeepSpeed, like any model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_reg.backbone import find_backbone, first_output, hidden_argument, replace_hidden
from dist_reg.methods import Method


class TwoPassLNSR(nn.Module):
    """LNSR with relative Gaussian noise from torch's generator, as two whole forwards."""

    def __init__(self, model: nn.Module, method: Any) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.config: Any = model.config
        self._layers = find_backbone(model).layers
        self._noisy = False
        self._states: list[Tensor] = []
        self._layers[method.layer].register_forward_pre_hook(self._perturb, with_kwargs=True)
        for layer in self._layers[method.layer :]:
            layer.register_forward_hook(self._collect)

    def _perturb(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self._noisy:
            return None
        hidden_states = hidden_argument(args, kwargs)
        noise = torch.randn_like(hidden_states)
        norm = hidden_states.norm(dim=-1, keepdim=True)
        noise = noise * (self.method.sigma * norm / noise.norm(dim=-1, keepdim=True)).detach()
        return replace_hidden(args, kwargs, hidden_states + noise)

    def _collect(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._states.append(first_output(output))

    def forward(self, attention_mask: Tensor, **inputs: Any) -> Any:
        self._states, self._noisy = [], False
        outputs = self.model(attention_mask=attention_mask, **inputs)
        clean, self._states, self._noisy = self._states, [], True
        self.model(attention_mask=attention_mask, **inputs)
        noisy, self._states = self._states, []
        real = attention_mask[..., None]
        count = attention_mask.sum(1)
        for one, other in zip(clean, noisy):
            distance = ((other - one) ** 2 * real).sum((1, 2)) / count
            outputs.loss = outputs.loss + self.method.weight * distance.mean()
        return outputs


class TwoPassRDrop(nn.Module):
    """R-Drop of a classifier as two whole forwards."""

    def __init__(self, model: nn.Module, method: Any) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.config: Any = model.config

    def forward(self, **inputs: Any) -> Any:
        one, other = self.model(**inputs), self.model(**inputs)
        both = _both_directions(one.logits, other.logits)
        one.loss = (one.loss + other.loss) / 2 + self.method.alpha / 2 * both
        return one


class TwoPassR3F(nn.Module):
    """R3F of a classifier as two whole forwards, with noise from torch's generator."""

    def __init__(self, model: nn.Module, method: Any) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.config: Any = model.config
        self._noisy = False
        table: Any = model
        table.get_input_embeddings().register_forward_hook(self._perturb)

    def _perturb(self, module: nn.Module, args: tuple, embedded: Tensor) -> Tensor | None:
        if not self._noisy:
            return None
        return embedded + torch.empty_like(embedded).uniform_(-self.method.sigma, self.method.sigma)

    def forward(self, **inputs: Any) -> Any:
        self._noisy = False
        clean = self.model(**inputs)
        self._noisy = True
        noisy = self.model(**inputs)
        clean.loss = clean.loss + self.method.weight * _both_directions(clean.logits, noisy.logits)
        return clean


def _both_directions(one: Tensor, other: Tensor) -> Tensor:
    p, q = F.log_softmax(one, -1), F.log_softmax(other, -1)
    forward = F.kl_div(p, q, reduction="batchmean", log_target=True)
    return forward + F.kl_div(q, p, reduction="batchmean", log_target=True)


class RandomNoiseHyPe(nn.Module):
    """HyPe with torch's own normal numbers."""

    def __init__(self, model: nn.Module, method: Any) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.config: Any = model.config
        for layer in find_backbone(model).layers:
            layer.register_forward_pre_hook(self._perturb, with_kwargs=True)

    def _perturb(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden_states = hidden_argument(args, kwargs)
        noisy = hidden_states + self.method.sigma * torch.randn_like(hidden_states)
        return replace_hidden(args, kwargs, noisy)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


PEERS: dict[str, Callable[[nn.Module, Method], nn.Module]] = {
    "hype": RandomNoiseHyPe,
    "lnsr": TwoPassLNSR,
    "rdrop": TwoPassRDrop,
    "r3f": TwoPassR3F,
}
"""Method name to its straightforward form."""

OPTIONS = {
    "hype": ("sigma", "dropout"),
    "lnsr": ("layer", "sigma", "weight"),
    "rdrop": ("alpha",),
    "r3f": ("sigma", "weight"),
}
"""The options that a straightforward form knows; with others it would be another method."""
