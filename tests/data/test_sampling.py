"""The low-resource samples: shares, nesting, reproducibility."""

from __future__ import annotations

from collections import Counter

import pytest

from dist_reg.data.sampling import quantile_bins, sample_rows
from dist_reg.errors import UserError

LABELS = ["a"] * 600 + ["b"] * 300 + ["c"] * 97 + ["d"] * 3


def shares(rows: list[int]) -> Counter:
    return Counter(LABELS[row] for row in rows)


def test_shares_are_proportional_and_no_label_is_left_out():
    assert shares(sample_rows(LABELS, 100, seed=0)) == {"a": 59, "b": 30, "c": 10, "d": 1}
    assert shares(sample_rows(LABELS, 4, seed=0)) == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert sample_rows(LABELS, len(LABELS), seed=0) == list(range(len(LABELS)))
    for samples in range(10, 500, 7):
        for label, count in shares(sample_rows(LABELS, samples, seed=1)).items():
            exact = samples * LABELS.count(label) / len(LABELS)
            assert abs(count - exact) < 1.5  # the one row that label d always gets is taken from others


def test_two_labels_get_the_largest_remainder():
    labels = ["a"] * 668 + ["b"] * 332
    for samples in range(10, 1000):
        counts = Counter(labels[row] for row in sample_rows(labels, samples, seed=0))
        assert abs(counts["a"] - samples * 0.668) <= 0.5


def test_samples_are_nested():
    previous: set[int] = set()
    for samples in range(4, 400):
        rows = set(sample_rows(LABELS, samples, seed=3))
        assert len(rows) == samples
        assert previous <= rows
        previous = rows


PINNED = [24, 66, 177, 268, 437, 470, 486, 529, 565, 805]


def test_a_sample_is_the_same_on_every_machine():
    assert sample_rows(["a", "b"] * 500, 10, seed=0) == PINNED
    assert sample_rows(["a", "b"] * 500, 10, seed=1) != PINNED


def test_a_sample_does_not_depend_on_what_the_labels_are_called():
    renamed = [{"a": "z", "b": "y", "c": "x", "d": "w"}[label] for label in LABELS]
    assert sample_rows(renamed, 50, seed=0) == sample_rows(LABELS, 50, seed=0)


def test_quantile_bins():
    assert quantile_bins([5.0, 1.0, 3.0, 2.0, 4.0], 5) == [4, 0, 2, 1, 3]
    assert Counter(quantile_bins([0.0] * 10, 10)) == {0: 2, 1: 2, 2: 2, 3: 2, 4: 2}
    assert max(quantile_bins([1.0, 2.0, 3.0], 2)) == 1


def test_too_much_or_too_little():
    with pytest.raises(UserError, match="data.csv holds 3 rows, fewer than the 4 samples asked for"):
        sample_rows(["a", "b", "a"], 4, seed=0, name="data.csv")
    with pytest.raises(UserError, match="of 3 rows of data.csv cannot hold each of its 4 labels; ask for 4"):
        sample_rows(LABELS, 3, seed=0, name="data.csv")
