"""The straightforward PyTorch forms that methods are measured against: separate passes, hidden states collected.

Each is a module whose forward returns the loss of the inner model with the method's term in it, so that it
can be trained, and given to DeepSpeed, like any model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers.integrations.neftune import neftune_post_forward_hook

from dist_reg.backbone import (
    find_backbone,
    first_output,
    hidden_argument,
    replace_first_output,
    replace_hidden,
)
from dist_reg.methods import Method
from dist_reg.readout import Readout


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


class PositionLoopMVCR(nn.Module):
    """MVCR with a loop over positions, each of which draws its view by Python's `random` for the whole batch."""

    def __init__(self, model: nn.Module, method: Any) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.config: Any = model.config
        backbone = find_backbone(model)
        layers, width = backbone.layers, backbone.hidden_size
        chosen = method.chosen_layers(len(layers))
        self.points = nn.ModuleList(
            nn.ModuleList(_Autoencoder(width, code, method) for code in method.view_widths(width))
            for _ in chosen
        )
        for layer, views in zip(chosen, self.points):
            layers[layer].register_forward_hook(partial(self._transform, views))
        self._errors: list[Tensor] = []
        self._mask: Any = None

    def _transform(self, views: Any, module: nn.Module, args: tuple, output: Any) -> Any:
        hidden_states, own = first_output(output), []
        real, error = self._mask.float(), 0.0
        for t in range(hidden_states.shape[1]):
            x = hidden_states[:, t]
            view = random.choices(range(len(views) + 1), self.method.view_probabilities())[0]
            own.append(views[view](x) if view < len(views) else x)
            chosen = range(len(views)) if self.method.reconstruct == "all" else [view]
            for m in chosen:
                if m < len(views):
                    apart = x.detach()
                    error = error + (real[:, t] * (views[m](apart) - apart).square().mean(-1)).sum()
        self._errors.append(error / real.sum() / len(views))
        return replace_first_output(output, torch.stack(own, 1))

    def forward(self, attention_mask: Tensor, **inputs: Any) -> Any:
        self._errors, self._mask = [], attention_mask
        outputs = self.model(attention_mask=attention_mask, **inputs)
        outputs.loss = outputs.loss + self.method.weight * sum(self._errors)
        return outputs


class _Autoencoder(nn.Module):
    def __init__(self, width: int, code: int, method: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, code), nn.Linear(code, width)
        narrow = max(1, code // 2)
        self.inner = nn.ModuleList(
            nn.ModuleList([nn.Linear(code, narrow), nn.Linear(narrow, code)]) for _ in range(method.inner)
        )
        self.dropout = nn.Dropout(method.dropout)

    def forward(self, x: Tensor) -> Tensor:
        code = self.dropout(self.encoder(x).tanh())
        choice = random.randrange(len(self.inner) + 1)
        if choice < len(self.inner):
            down, up = list(self.inner)[choice].children()
            code = up(self.dropout(down(code).tanh())).tanh()
        return self.decoder(code)


class TransformersNEFTune(nn.Module):
    """NEFTune as Transformers' Trainer has it: one length for all, padding included, and torch's own uniform numbers."""

    def __init__(self, model: nn.Module, method: Any) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.config: Any = model.config
        whole: Any = model
        table = whole.get_input_embeddings()
        table.neftune_noise_alpha = method.alpha
        table.register_forward_hook(neftune_post_forward_hook)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class StackedHIRE(nn.Module):
    """HIRE with a stack of all hidden states, PyTorch's packed GRU over padded inputs, and the four parts side by side."""

    def __init__(self, model: nn.Module, method: Any) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.config: Any = model.config
        backbone = find_backbone(model)
        width, layers = backbone.hidden_size, len(backbone.layers) + method.include_embeddings
        units = method.units(width)
        recurrent = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        if method.extractor == "gru":
            self.extractor: nn.Module = nn.GRU(width, units, **recurrent)
        else:
            self.extractor = nn.Linear(width, 1, bias=False)
        self.gate = nn.Linear(2 * units if method.extractor == "gru" else width, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, 1 / layers)
        self.fusion = nn.Linear(4 * width, width)
        self.fusion_gru = nn.GRU(width, units, **recurrent) if method.fusion_rnn else None
        self._mask: Any = None
        Readout("hire", backbone, self._fuse, embeddings=method.include_embeddings)

    def _fuse(self, states: Any, real: Any, step: Any) -> Tensor:
        stacked = torch.stack(list(states))
        number, batch, tokens, width = stacked.shape
        lengths = self._mask.sum(1).cpu()
        if self.method.extractor == "gru":
            packed = pack_padded_sequence(
                stacked.flatten(0, 1), lengths.repeat(number), batch_first=True, enforce_sorted=False
            )
            last = self.extractor(packed)[1]
            summaries = torch.cat((last[-2], last[-1]), 1).view(number, batch, -1)
        else:
            scores = self.extractor(stacked) / width**0.5
            scores = scores.masked_fill(self._mask[None, ..., None] == 0, float("-inf"))
            summaries = (scores.softmax(2) * stacked).sum(2)
        gates = self.gate(summaries)
        gates = gates.softmax(0) if self.method.normalisation == "softmax" else gates.relu()
        mixed, last = (gates[..., None] * stacked).sum(0), stacked[-1]
        third = last + mixed if self.method.combine == "sum" else last - mixed
        fused = self.fusion(torch.cat((last, mixed, third, last * mixed), -1)).relu()
        if self.fusion_gru is None:
            return fused
        packed = pack_padded_sequence(fused, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.fusion_gru(packed)[0], batch_first=True, total_length=tokens)[0]

    def forward(self, attention_mask: Tensor, **inputs: Any) -> Any:
        self._mask = attention_mask
        return self.model(attention_mask=attention_mask, **inputs)


PEERS: dict[str, Callable[[nn.Module, Method], nn.Module]] = {
    "hire": StackedHIRE,
    "hype": RandomNoiseHyPe,
    "lnsr": TwoPassLNSR,
    "mvcr": PositionLoopMVCR,
    "neftune": TransformersNEFTune,
    "rdrop": TwoPassRDrop,
    "r3f": TwoPassR3F,
}
"""Method name to its straightforward form."""

OPTIONS = {
    "hype": ("sigma", "dropout"),
    "lnsr": ("layer", "sigma", "weight"),
    "mvcr": (
        "layers",
        "autoencoders",
        "widths",
        "inner",
        "probabilities",
        "reconstruct",
        "weight",
        "dropout",
        "warmup_epochs",
    ),
    "rdrop": ("alpha",),
    "r3f": ("sigma", "weight"),
}
"""The options that a straightforward form knows; with others it would be another method."""
