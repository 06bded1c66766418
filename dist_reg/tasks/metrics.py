"""Metrics as GLUE reports them, from logits and labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dist_reg.errors import UserError, nearest


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of right predictions."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1 in a binary task (MRPC, QQP); 0 if class 1 is neither predicted nor there."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the F1 of every class that is predicted or there."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def mcc(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient (CoLA); 0 for constant predictions."""
    from sklearn.metrics import matthews_corrcoef

    if np.unique(labels).size == 1 and np.unique(predictions).size == 1:
        return 0.0  # scikit-learn warns of a single label and gives 0
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 with a warning where it is undefined (constant predictions or labels)."""
    from scipy.stats import pearsonr

    return (
        0.0 if _constant("pearson", predictions, labels) else float(pearsonr(predictions, labels).statistic)
    )


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation; 0 with a warning where it is undefined (constant predictions or labels)."""
    from scipy.stats import spearmanr

    return (
        0.0 if _constant("spearman", predictions, labels) else float(spearmanr(predictions, labels).statistic)
    )


def _constant(name: str, predictions: np.ndarray, labels: np.ndarray) -> bool:
    for what, values in (("predictions", predictions), ("labels", labels)):
        if np.ptp(values) == 0:
            warnings.warn(
                f"all {what} are equal: {name} is undefined and given as 0", RuntimeWarning, stacklevel=4
            )
            return True
    return False


CLASSIFICATION: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "mcc": mcc,
}
REGRESSION: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"pearson": pearson, "spearman": spearman}


def compute(metrics: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Named metrics of `logits` [N, classes], or [N] or [N, 1] for regression, against `labels` [N].

    Raises:
        UserError: an unknown metric, no rows, NaN or infinite logits, a metric that does not suit the head.
        ValueError: numbers of logits and labels that differ.
    """
    for name in metrics:
        if name not in CLASSIFICATION and name not in REGRESSION:
            raise UserError(f"unknown metric {name!r}; {nearest(name, [*CLASSIFICATION, *REGRESSION])}")
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if len(logits) != len(labels):
        raise ValueError(f"{len(logits)} rows of logits, but {len(labels)} labels")
    if len(logits) == 0:
        raise UserError("the evaluation set is empty: no metric is defined")
    check_finite(logits)
    return {name: _one(name, logits, labels) for name in metrics}


def _one(name: str, logits: np.ndarray, labels: np.ndarray) -> float:
    outputs = 1 if logits.ndim == 1 else logits.shape[1]
    if name in REGRESSION:
        if outputs != 1:
            raise UserError(f"metric {name} needs a regression head, the model has {outputs} outputs")
        return REGRESSION[name](logits.reshape(len(logits)), labels.reshape(len(labels)))
    if outputs < 2:
        raise UserError(f"metric {name} needs one output per class, the model has a single one")
    if name == "f1" and outputs > 2:
        raise UserError(f"metric f1 is binary, the task has {outputs} labels; use macro_f1")
    return CLASSIFICATION[name](logits.argmax(-1), labels)


def check_finite(logits: Any) -> None:
    """Raise UserError, naming the first row, where `logits` (an array or a tensor) hold NaN or infinities."""
    logits = np.asarray(logits.float().cpu()) if hasattr(logits, "cpu") else logits
    rows = np.flatnonzero(~np.isfinite(logits).reshape(len(logits), -1).all(axis=1))
    if rows.size:
        kind = "NaN" if np.isnan(logits).any() else "infinite"
        raise UserError(
            f"{kind} logits in {rows.size} of {len(logits)} evaluation rows (first in row {rows[0]}): the "
            "training diverged; lower the learning rate or the noise, or use bf16 in place of fp16"
        )
