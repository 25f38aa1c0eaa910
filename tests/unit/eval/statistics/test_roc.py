"""Intervals of AUCs: DeLong's variance by its definition, the corners in closed form, and coverage by simulation."""

import numpy as np
import pytest
from scipy import stats

from eval.metrics import roc_auc
from eval.statistics.roc import auc_difference, auc_interval


def delong(*models):
    """AUCs and their covariance matrix from every pair of scores, as the definition has it."""
    wins = np.array([(x[:, None] > y) + 0.5 * (x[:, None] == y) for x, y in models])
    (_, m, n), rows, columns = wins.shape, wins.mean(2), wins.mean(1)
    return wins.mean((1, 2)), np.cov(rows) / m + np.cov(columns) / n


def test_interval_is_clopper_pearson_with_the_trials_that_delongs_variance_is_worth():
    rng = np.random.default_rng(0)
    x, y = np.where(rng.random(60) < 0.8, rng.integers(-2, 5, 60), -6), rng.integers(-4, 4, 50)  # with many ties
    (auc,), variance = delong((x, y))
    trials = auc * (1 - auc) / variance * (stats.norm.ppf(0.05) / stats.t.ppf(0.05, 49)) ** 2
    assert 50 < trials < 3 * 60 * 50 / 111  # between the bounds, so that it is DeLong's that is seen
    expected = stats.beta.ppf([0.05, 0.95], [trials * auc, trials * auc + 1], [trials * (1 - auc) + 1, trials * (1 - auc)])
    found = auc_interval(x, y, 0.9)
    np.testing.assert_allclose(found, (auc, *expected), rtol=1e-12)
    assert found[0] == pytest.approx(roc_auc(x, y), abs=1e-15)
    # The other way round is the mirror image.
    np.testing.assert_allclose(auc_interval(y, x, 0.9), (1 - auc, *(1 - expected[::-1])), rtol=1e-12)


def test_a_variance_by_hand():
    """Members 1, 3 and others 0, 2: placements (½, 1) and (1, ½), AUC ¾, V = ⅛/2 + ⅛/2 = ⅛."""
    np.testing.assert_allclose(delong(([1, 3] * np.ones(2), np.array([0.0, 2])))[1], 0.125)
    # ¾·¼ / ⅛ = 1.5 trials, fewer than there are members: 2.
    low, high = stats.beta.ppf(0.025, 1.5, 1.5), stats.beta.ppf(0.975, 2.5, 0.5)
    np.testing.assert_allclose(auc_interval([1, 3], [0, 2]), (0.75, low, high), rtol=1e-14)


def test_what_looks_certain_is_not():
    low = 0.025 ** (1 / 3)  # no failure in three trials
    np.testing.assert_allclose(auc_interval([7, 8, 9], [1, 2, 3, 4, 5]), (1, low, 1), rtol=1e-14)
    np.testing.assert_allclose(auc_interval([1, 2, 3], [4, 5, 6, 7]), (0, 0, 1 - low), rtol=1e-13)
    auc, low, high = auc_interval([1, 1, 1], [1, 1, 1])
    assert auc == 0.5 and low < 0.1 and high > 0.9
    np.testing.assert_allclose(auc_interval([2], [1, 0]), (1, 0.025, 1), rtol=1e-14)  # one trial
    # One swapped pair must not be surer than none.
    apart, swapped = np.arange(20.0) + 100, np.r_[np.arange(19.0), 100.5]
    assert auc_interval(apart, swapped)[1] < auc_interval(apart, np.arange(20.0))[1] + 0.05


def test_difference_has_delongs_covariance():
    rng = np.random.default_rng(1)
    m, n = 900, 800
    common = [rng.normal(0, 1, size) for size in (m, n)]
    a, b = ((shift + common[0] + rng.normal(0, 0.5, m), common[1] + rng.normal(0, 0.5, n)) for shift in (1.0, 0.6))
    (auc_a, auc_b), covariance = delong(a, b)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    difference, low, high = auc_difference(*a, *b)
    assert difference == pytest.approx(auc_a - auc_b, abs=1e-14)
    # The exact limits are nearly ± z standard errors here, and would not be without the covariance.
    np.testing.assert_allclose([difference - low, high - difference], 1.96 * error, rtol=0.1)
    unpaired = np.sqrt(covariance[0, 0] + covariance[1, 1])
    assert high - low < 0.7 * 2 * 1.96 * unpaired
    back = auc_difference(*b, *a)
    np.testing.assert_allclose(back, (-difference, -high, -low), atol=1e-14)


def test_a_difference_of_two_that_separate_exactly_is_not_certain():
    members, others = [7.0, 8, 9], [1.0, 2, 3, 4]
    width = 1 - 0.025 ** (1 / 3)
    np.testing.assert_allclose(auc_difference(members, others, members, others), (0, -width, width), atol=1e-14)
    difference, low, high = auc_difference(members, others, [1, 3, 5], [2, 4, 6, 0])
    assert difference == 0.5 and low < difference - width and difference + 0.4 < high <= 1


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"scores of the same images are needed, got \(2, 2\) and \(3, 2\)"):
        auc_difference([1, 2], [3, 4], [1, 2, 3], [4, 5])
    with pytest.raises(ValueError, match="members"):
        auc_interval([1, np.nan], [0, 1])
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), got 95"):
        auc_interval([1, 2], [0, 1], 95)


def normal(rng, auc, m, n):
    return rng.normal(np.sqrt(2) * stats.norm.ppf(auc), 1, m), rng.normal(0, 1, n)


def memorised(rng, auc, m, n):
    """A share of the members stands out completely, the rest are like the others."""
    return np.where(rng.random(m) < 2 * auc - 1, 9.0, rng.normal(0, 1, m)), rng.normal(0, 1, n)


def missed(rng, auc, m, n):
    """A share of the members lies below all others: the largest variance that an AUC can have."""
    return np.where(rng.random(m) < auc, 1.0, -1.0), np.zeros(n)


@pytest.mark.parametrize("draw", [normal, memorised, missed])
def test_intervals_contain_the_truth_as_often_as_they_say(draw):
    rng, times = np.random.default_rng(2), 250
    for auc in (0.5, 0.8, 0.97):
        for m, n in ((12, 12), (80, 60)):
            found = np.array([auc_interval(*draw(rng, auc, m, n)) for _ in range(times)])
            covered = np.mean((found[:, 1] <= auc) & (auc <= found[:, 2]))
            assert covered >= 0.95 - 0.025, (auc, m, n, covered)
    assert found[:, 2].max() <= 1 and np.mean(found[:, 2] - found[:, 1]) < 0.15


@pytest.mark.parametrize("aucs", [(0.5, 0.5), (0.95, 0.6), (0.99, 0.97)])
def test_intervals_of_differences_contain_the_truth_as_often_as_they_say(aucs):
    rng, times, hits = np.random.default_rng(3), 300, 0
    truth, shifts = aucs[0] - aucs[1], np.sqrt(2) * stats.norm.ppf(aucs)
    mix = np.array([[1, 0.8], [0, 0.6]])  # correlation .8 between the models
    for _ in range(times):
        members, others = rng.normal(0, 1, (40, 2)) @ mix + shifts, rng.normal(0, 1, (40, 2)) @ mix
        _, low, high = auc_difference(members[:, 0], others[:, 0], members[:, 1], others[:, 1])
        hits += low <= truth <= high
    assert hits / times >= 0.95 - 0.025
