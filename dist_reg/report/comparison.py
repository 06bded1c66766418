"""A group of runs against a baseline, on runs paired by their seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dist_reg.report.runs import Seeds

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE = 0.95
SIGNIFICANT = 0.05
RESAMPLES = 20_000
ROUNDING = 1e-12
"""Differences that agree to this share of the scores are equal: what is left is float rounding."""


@dataclass(frozen=True)
class Comparison:
    """Group minus baseline over paired runs, in the metric's own units.

    `words` says in place of an interval and a p-value why there is none.
    """

    baseline: str
    pairs: int
    own_unpaired: tuple[Seeds, ...]
    baseline_unpaired: tuple[Seeds, ...]
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    words: str = ""


Test = Callable[["np.ndarray"], tuple[float, float, float]]


def t_test(differences: np.ndarray) -> tuple[float, float, float]:
    """Two-sided t-test that the mean of `differences` [N] is 0, N > 1: interval's ends and p."""
    from scipy import stats

    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high), float(found.pvalue)


def bootstrap(differences: np.ndarray) -> tuple[float, float, float]:
    """Percentile bootstrap of the mean of `differences` [N], N > 1: interval's ends and p, the same at every call.

    p is the share of resamples of the differences, shifted to a mean of 0, whose mean lies at least as far from 0 as the
    one found, the found one counted among them (Efron and Tibshirani, 1993, section 16.4). It is no less than 2 / 2^N,
    the least that N differences can say of a mean of 0 when nothing but their signs is at chance: N of one sign lie
    further out than every shifted resample, and would have a p of nearly 0 for any N.
    """
    import numpy as np
    from scipy import stats

    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    mean = differences.mean()
    slack = ROUNDING * np.abs(differences).max()
    far = np.abs(found.bootstrap_distribution - mean) >= abs(mean) - slack
    p = max(float((1 + far.sum()) / (1 + RESAMPLES)), 2.0 ** (1 - len(differences)))
    interval = found.confidence_interval
    return float(interval.low), float(interval.high), p


TESTS: dict[str, Test] = {"t-test": t_test, "bootstrap": bootstrap}

NAMES = {"t-test": "two-sided paired t-test", "bootstrap": "two-sided paired bootstrap, at least 2/2^pairs"}


def compare(own: dict[Seeds, float], baseline: dict[Seeds, float], test: str, name: str) -> Comparison:
    """Scores by seeds against those of the baseline called `name`; seeds that one of them lacks are left out."""
    import numpy as np

    pairs = [seeds for seeds in own if seeds in baseline]
    counted = Comparison(
        baseline=name,
        pairs=len(pairs),
        own_unpaired=tuple(seeds for seeds in own if seeds not in baseline),
        baseline_unpaired=tuple(seeds for seeds in baseline if seeds not in own),
        words="no pair",
    )
    if not pairs:
        return counted
    scores = np.array([[own[seeds], baseline[seeds]] for seeds in pairs], dtype=float)
    differences = scores[:, 0] - scores[:, 1]
    found = replace(counted, difference=float(differences.mean()))
    if len(pairs) == 1:
        return replace(found, words="one pair")
    if np.ptp(differences) <= ROUNDING * np.abs(scores).max():
        return replace(found, words="all equal")
    low, high, p = TESTS[test](differences)
    return replace(found, low=low, high=high, p=p, words="")


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method, in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected
