"""Thresholds keep their promise, refuse when they can't, and intervals are the exact ones."""

import numpy as np
import pytest
from scipy import stats

from eval.calibrate import InsufficientData, clopper_pearson, smallest_null, threshold


def test_threshold_is_the_order_statistic():
    values = np.random.default_rng(0).permutation(np.arange(1, 100) / 100)  # n = 99
    assert threshold(values, 0.05) == 0.95  # ⌈100 · .95⌉ = 95th
    assert threshold(values, 0.02) == 0.98
    assert threshold(values, 0.01) == 0.99  # the largest


def test_too_few_held_out_images_are_refused_exactly_at_the_bound():
    assert smallest_null(0.02) == 49
    assert threshold(np.arange(49), 0.02) == 48
    with pytest.raises(InsufficientData, match="48 held-out images can not calibrate .* 0.02: at least 49"):
        threshold(np.arange(48), 0.02)


def test_false_alarms_are_at_most_alpha():
    rng = np.random.default_rng(1)
    alarms = [rng.normal() > threshold(rng.normal(size=60), 0.1) for _ in range(4000)]
    assert abs(np.mean(alarms) - 6 / 61) < 0.02  # exactly ⌊61 · .1⌋/61 for continuous data


def test_clopper_pearson_inverts_the_binomial_tails():
    low, high = clopper_pearson(4, 113, 0.95)
    assert stats.binom.sf(3, 113, low) == pytest.approx(0.025)
    assert stats.binom.cdf(4, 113, high) == pytest.approx(0.025)


def test_clopper_pearson_at_the_ends():
    assert clopper_pearson(0, 5000)[0] == 0
    assert clopper_pearson(0, 5000)[1] == pytest.approx(1 - 0.025 ** (1 / 5000))  # .074 %
    assert clopper_pearson(7, 7) == (pytest.approx(0.025 ** (1 / 7)), 1.0)


@pytest.mark.parametrize(("count", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(count, n):
    with pytest.raises(ValueError, match="count"):
        clopper_pearson(count, n)
