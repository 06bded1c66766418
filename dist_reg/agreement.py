"""How far the predictions of the two halves of a doubled batch lie apart, example by example.

Shapes: logits [2B, C] or [2B, T, C], labels [B] or [B, T].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dist_reg.errors import UserError
from dist_reg.methods.base import Step
from dist_reg.ops import symmetric_kl
from dist_reg.streams import IGNORED


def disagreement(step: Step, name: str) -> Tensor:
    """fp32 [B]: KL(p || q) + KL(q || p) of the halves, for tokens the mean over those that have a label, for spans that of
    their two ends, as the loss is; for regression the mean square of the halves' difference.

    Raises UserError, on behalf of the method `name`, for a model without logits, or with labels that are neither.
    """
    if step.span_logits is not None:
        start, end = (symmetric_kl(*logits.chunk(2)) for logits in step.span_logits)
        return (start + end) / 2
    logits, labels = step.logits, step.labels
    if logits is None or labels is None:
        raise UserError(
            f"{name} compares the logits of two passes and needs the labels; it is for classification, regression, "
            "token classification, question answering and language models."
        )
    clean, other = logits.chunk(2)
    if step.several_labels:
        raise UserError(f"{name} has no form for several labels at once; use one class an example.")
    if step.regression:
        if labels.numel() != clean.numel():
            raise UserError(f"{name}: labels {list(labels.shape)} do not match logits {list(clean.shape)}.")
        return (clean - other).float().square().reshape(step.batch, -1).mean(1)
    if clean.dim() == 2:
        return symmetric_kl(clean, other)
    if labels.shape != clean.shape[:2]:
        raise UserError(f"{name}: labels {list(labels.shape)} do not match logits {list(clean.shape)}.")
    if step.next_token:
        labels, clean, other = labels[:, 1:], clean[:, :-1], other[:, :-1]
    counted = labels != IGNORED
    return symmetric_kl(clean, other, mask=counted).sum(1) / counted.sum(1).clamp(min=1)


def clean_regression_loss(step: Step) -> Tensor:
    """The mean square error of the clean half alone, the regression loss of Transformers' models."""
    assert step.logits is not None
    assert step.labels is not None
    clean = step.logits[: step.batch]
    return F.mse_loss(clean.reshape(step.labels.shape), step.labels.to(clean.dtype))
