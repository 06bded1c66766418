"""What `dist-reg bench step` times: plain fine-tuning, or one method on top of it."""

from __future__ import annotations

from dataclasses import dataclass

from dist_reg.methods import Method


@dataclass(frozen=True)
class Variant:
    """One way to train the model; the same dropout in the model, the method and its straightforward form."""

    name: str
    dropout: bool = True
    """Whether hidden dropout is on."""
    method: Method | None = None
    peer: bool = False
    """The method's straightforward PyTorch form instead of ours."""
