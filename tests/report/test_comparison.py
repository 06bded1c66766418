"""Comparisons against numbers worked out by hand or by scipy on the same scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dist_reg.report.comparison import bootstrap, compare, holm

PLAIN = [0.80, 0.82, 0.78, 0.81, 0.79]
DIFFERENCES = [0.01, 0.02, 0.03, 0.04, 0.05]
"""Mean 0.03, standard deviation sqrt(0.00025): t = 0.03 / sqrt(0.00025 / 5) = 4.2426."""
BETTER = [score + difference for score, difference in zip(PLAIN, DIFFERENCES)]


def by_seed(scores: list[float]) -> dict:
    return {(0, seed): score for seed, score in enumerate(scores)}


def test_t_test_by_hand_and_by_scipy():
    found = compare(by_seed(BETTER), by_seed(PLAIN), "t-test", "plain")
    assert (found.pairs, found.words, found.baseline) == (5, "", "plain")
    assert found.own_unpaired == found.baseline_unpaired == ()
    assert found.difference == pytest.approx(0.03)
    half = 2.7764451 * math.sqrt(0.00025 / 5)  # the 97.5 % point of Student's t at 4 degrees, from a table
    assert (found.low, found.high) == pytest.approx((0.03 - half, 0.03 + half))
    expected = stats.ttest_rel(BETTER, PLAIN)
    assert expected.statistic == pytest.approx(3 * math.sqrt(2))
    assert found.p == pytest.approx(expected.pvalue)
    assert found.p == pytest.approx(0.0132356, rel=1e-5)


def test_runs_are_paired_by_their_seeds_and_not_by_their_place():
    shuffled = dict(reversed(by_seed(BETTER).items()))
    assert compare(shuffled, by_seed(PLAIN), "t-test", "plain").p == pytest.approx(0.0132356, rel=1e-5)


def test_runs_without_a_partner_are_left_out_and_named():
    own = {(0, 0): 0.81, (0, 1): 0.84, (1, 7): 0.1}
    base = {(0, 1): 0.82, (0, 0): 0.80, (0, 9): 0.2, (0, 8): 0.3}
    found = compare(own, base, "t-test", "plain")
    assert found.pairs == 2
    assert found.own_unpaired == ((1, 7),)
    assert found.baseline_unpaired == ((0, 9), (0, 8))
    expected = stats.ttest_rel([0.81, 0.84], [0.80, 0.82])
    assert (found.difference, found.p) == pytest.approx((0.015, expected.pvalue))


@pytest.mark.parametrize("test", ["t-test", "bootstrap"])
@pytest.mark.parametrize(
    ("own", "pairs", "difference", "words"),
    [
        ({(1, 0): 0.9}, 0, None, "no pair"),
        ({(0, 0): 0.9}, 1, 0.1, "one pair"),
        (by_seed([score + 0.1 for score in PLAIN]), 5, 0.1, "all equal"),
        (by_seed(PLAIN), 5, 0.0, "all equal"),
    ],
)
def test_no_p_value_is_said_in_words(test, own, pairs, difference, words):
    found = compare(own, by_seed(PLAIN), test, "plain")
    assert (found.pairs, found.words) == (pairs, words)
    assert found.difference == (None if difference is None else pytest.approx(difference, abs=1e-12))
    assert found.p is found.low is found.high is None


def test_bootstrap_interval_is_that_of_all_resamples():
    """All 5^5 resamples of five differences, written out."""
    found = compare(by_seed(BETTER), by_seed(PLAIN), "bootstrap", "plain")
    every = np.array(np.meshgrid(*[DIFFERENCES] * 5)).reshape(5, -1).mean(0)
    low, high = np.quantile(every, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.0011)  # means lie 0.002 apart
    assert found.difference == pytest.approx(0.03)


def test_bootstrap_p_value_is_that_of_all_shifted_resamples():
    differences = np.array([-0.02, 0.01, 0.03, -0.01, 0.04])
    every = np.array(np.meshgrid(*[differences - differences.mean()] * 5)).reshape(5, -1).mean(0)
    expected = np.mean(np.abs(every) >= differences.mean() - 1e-12)
    assert 0.2 < expected < 0.5
    assert bootstrap(differences)[2] == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 20_000))
    assert bootstrap(differences) == bootstrap(differences)


def test_bootstrap_does_not_say_more_than_the_signs_can():
    assert bootstrap(np.array([0.01, 0.02]))[2] == 2 / 2**2
    assert bootstrap(np.array(DIFFERENCES))[2] == 2 / 2**5


def test_sign_is_that_of_group_minus_baseline():
    found = compare(by_seed(PLAIN), by_seed(BETTER), "t-test", "better")
    assert found.difference == pytest.approx(-0.03)
    assert found.low < found.high < 0  # type: ignore[operator]


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([], []),
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01; 2 x 0.03; then no less than that
        ([0.5, 0.4, 0.9], [1.0, 1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
    ],
)
def test_holm(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)
