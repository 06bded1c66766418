"""Metrics against hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_reg.errors import UserError
from dist_reg.tasks.metrics import compute


def one_hot(predictions: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes)[predictions]


def test_accuracy_f1_mcc_by_hand():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    labels = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    logits = one_hot([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    found = compute(["accuracy", "f1", "mcc", "macro_f1"], logits, labels)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["mcc"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert found["macro_f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)


def test_three_classes():
    labels, logits = np.array([0, 1, 2, 2]), one_hot([0, 2, 2, 2], 3)
    found = compute(["accuracy", "macro_f1"], logits, labels)
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((1 + 0 + 0.8) / 3)}


def test_correlations_by_hand():
    predictions, labels = np.array([1.0, 2.0, 3.0, 10.0]), np.array([0.0, 1.0, 2.0, 3.0])
    found = compute(["pearson", "spearman"], predictions[:, None], labels)
    x, y = predictions - 4, labels - 1.5
    assert found["pearson"] == pytest.approx((x @ y) / math.sqrt((x @ x) * (y @ y)))
    assert found["spearman"] == pytest.approx(1)
    assert compute(["pearson", "spearman"], predictions, labels) == pytest.approx(found)


@pytest.mark.filterwarnings("error")
def test_constant_predictions_have_a_value():
    labels = np.array([0, 1, 1, 0])
    found = compute(["mcc", "f1", "accuracy", "macro_f1"], one_hot([0] * 4), labels)
    assert found == {"mcc": 0, "f1": 0, "accuracy": 0.5, "macro_f1": pytest.approx(1 / 3)}
    assert compute(["mcc"], one_hot([1] * 4), np.ones(4, dtype=int)) == {"mcc": 0}


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_undefined_correlation_is_zero_with_a_warning(metric):
    with pytest.warns(
        RuntimeWarning, match=f"all predictions are equal: {metric} is undefined and given as 0"
    ):
        assert compute([metric], np.ones((3, 1)), np.arange(3.0)) == {metric: 0}
    with pytest.warns(RuntimeWarning, match="all labels are equal"):
        assert compute([metric], np.arange(3.0), np.ones(3)) == {metric: 0}


def test_bad_input():
    labels = np.array([0, 1])
    with pytest.raises(UserError, match=r"NaN logits in 1 of 2 evaluation rows \(first in row 1\)"):
        compute(["accuracy"], np.array([[0.0, 1.0], [np.nan, 1.0]]), labels)
    with pytest.raises(UserError, match="infinite logits in 1 of 2"):
        compute(["pearson"], np.array([np.inf, 1.0]), labels)
    with pytest.raises(UserError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        compute(["acuracy"], one_hot([0, 1]), labels)
    with pytest.raises(UserError, match="metric f1 is binary, the task has 3 labels; use macro_f1"):
        compute(["f1"], one_hot([0, 1], 3), labels)
    with pytest.raises(UserError, match="pearson needs a regression head, the model has 2 outputs"):
        compute(["pearson"], one_hot([0, 1]), labels)
    with pytest.raises(UserError, match="accuracy needs one output per class"):
        compute(["accuracy"], np.zeros((2, 1)), labels)
    with pytest.raises(UserError, match="evaluation set is empty"):
        compute(["accuracy"], np.zeros((0, 2)), np.zeros(0))
    with pytest.raises(ValueError, match="3 rows of logits, but 2 labels"):
        compute(["accuracy"], one_hot([0, 1, 1]), labels)
