"""The tensors of bottleneck.py's autoencoders, and where their dropout is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """The tensors of one autoencoder, in the order of the operation's list."""

    encoder: Tensor
    encoder_bias: Tensor
    inner_encoder: Tensor
    inner_encoder_bias: Tensor
    inner_decoder: Tensor
    inner_decoder_bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor


def views_of(weights: Sequence[Tensor]) -> list[Weights]:
    """The flat list of tensors, view by view."""
    size = len(Weights._fields)
    return [Weights(*weights[i : i + size]) for i in range(0, len(weights), size)]


def outer_site(site: int, view: int) -> int:
    """The site of the dropout behind the outer encoder of `view`."""
    return site + (2 * view << 16)


def inner_site(site: int, view: int) -> int:
    """The site of the dropout behind the inner encoders of `view`."""
    return site + (2 * view + 1 << 16)
