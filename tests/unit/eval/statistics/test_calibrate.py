"""Thresholds keep their promise, refuse when they can't, and intervals are the exact ones."""

import numpy as np
import pytest
from scipy import stats

from eval.statistics.calibrate import (
    InsufficientData,
    benjamini_hochberg,
    clopper_pearson,
    cluster_bootstrap,
    conformal_p_values,
    copied_share,
    effective_count,
    smallest_null,
    threshold,
)


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


# -- many images against one null ----------------------------------------------------------------------


def test_conformal_p_values_count_the_null_at_or_above():
    null = [0.1, 0.2, 0.3, 0.4]
    assert conformal_p_values([0.05, 0.2, 0.25, 0.4, 0.9], null).tolist() == [1.0, 0.8, 0.6, 0.4, 0.2]
    with pytest.raises(ValueError, match="empty"):
        conformal_p_values([0.1], [])


def test_conformal_p_values_are_valid():
    rng = np.random.default_rng(0)
    small = [conformal_p_values(rng.normal(size=1), rng.normal(size=19))[0] <= 0.1 for _ in range(4000)]
    assert abs(np.mean(small) - 0.1) < 0.015  # exactly 2/20


def test_benjamini_hochberg_takes_all_up_to_the_last_below_the_line():
    p = [0.01, 0.04, 0.03, 0.005, 0.5]  # sorted .005 .01 .03 .04 .5 against .01 .02 .03 .04 .05
    assert benjamini_hochberg(p, 0.05).tolist() == [True, True, True, True, False]
    assert benjamini_hochberg(p, 0.02).tolist() == [False, False, False, False, False]  # .005 > .004
    assert benjamini_hochberg([0.9, 0.8], 0.05).tolist() == [False, False]
    # The second is above its own line and goes along, since the third is below its.
    assert benjamini_hochberg([0.01, 0.036, 0.04], 0.04).tolist() == [True, True, True]
    assert benjamini_hochberg([], 0.1).tolist() == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        benjamini_hochberg([1.2], 0.1)


def test_false_discoveries_stay_at_the_rate():
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        null = rng.normal(size=300)
        values = np.concatenate([rng.normal(size=80), rng.normal(3.5, 1, size=20)])
        chosen = benjamini_hochberg(conformal_p_values(values, null), 0.2)
        found.append(chosen[:80].sum() / max(1, chosen.sum()))
    assert np.mean(found) <= 0.2 * 0.8 + 0.02  # the rate times the share of true nulls


# -- clusters ----------------------------------------------------------------------


def test_images_of_one_prompt_that_agree_count_once():
    flags = np.repeat([1, 0, 0, 1, 0, 0, 0, 0, 0, 0], 5)
    clusters = np.repeat(np.arange(10), 5)
    # Mean .2; between clusters 10/9 · Σ(5(x̄_i − .2))²/50² = 10/9 · 40/2500; independent .2 · .8/50.
    assert effective_count(flags, clusters) == pytest.approx(50 / ((10 / 9 * 40 / 2500) / (0.16 / 50)))
    assert effective_count(flags, np.arange(50)) == 50
    assert effective_count(np.zeros(50), clusters) == 10
    assert effective_count(np.tile([1, 0, 0, 0, 0], 10), clusters) == 50  # no more alike than chance
    with pytest.raises(ValueError, match="one length"):
        effective_count([1, 0], [1])


def test_cluster_bootstrap_covers_the_mean_of_clustered_data():
    rng, covered = np.random.default_rng(0), []
    for seed in range(600):
        values = (rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(40, 5))).ravel()
        low, high = cluster_bootstrap(values, np.repeat(np.arange(40), 5), repetitions=200, seed=seed)
        covered.append(low <= 0 <= high)
    assert np.mean(covered) >= 0.9  # 95 % asymptotically, a little less with 40 clusters
    alone = cluster_bootstrap(values, np.arange(200), repetitions=300)  # taken for independent, far too narrow
    assert alone[1] - alone[0] < 0.7 * (high - low)


# -- the copied share ----------------------------------------------------------------------


def test_copied_share_inverts_rate_recall_and_false_alarms():
    # 1,000 images, 20 % of them copies of which half are recalled, .02 of the others above τ: 100 + 16.
    found = copied_share(116, 1000, 100, 200, 499, 0.02)
    assert found.value == pytest.approx(0.2) and found.low < 0.2 < found.high
    # The interval is that of the rate alone where recall and false alarms are known: (rate − .02)/.98.
    known = copied_share(100, 1000, 10**9, 10**9, 10**6 - 1, 0.02)
    low, high = stats.beta.ppf([0.025, 0.975], 100.5, 900.5)
    assert (known.low, known.high) == pytest.approx(((low - 0.02) / 0.98, (high - 0.02) / 0.98), abs=1e-3)
    assert copied_share(0, 1000, 150, 200, 499, 0.02).low == 0.0


def test_less_certain_controls_widen_the_interval():
    def width(planted, n_null):
        found = copied_share(120, 1000, planted // 2, planted, n_null, 0.02)
        return found.high - found.low

    assert width(20, 499) > 1.3 * width(2000, 499) and width(2000, 60) > 1.05 * width(2000, 5000)


def test_copies_that_can_not_be_told_leave_every_share_possible():
    found = copied_share(20, 1000, 4, 200, 499, 0.02)  # recall .02 = α
    assert found.high == 1.0 and found.low == 0.0
    with pytest.raises(ValueError, match="impossible counts"):
        copied_share(5, 4, 1, 2, 499, 0.02)
    with pytest.raises(InsufficientData):
        copied_share(1, 4, 1, 2, 10, 0.02)
