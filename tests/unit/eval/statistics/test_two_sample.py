"""The two-sample test: its statistic in closed form, its level, and that it sees another source."""

import numpy as np
import pytest
from scipy import stats

from eval.statistics.two_sample import MOST, energy_distance, energy_p_value, thinned


def test_the_energy_distance_of_points_in_closed_form():
    """{0, 2} and {3} on a line: 2·(3 + 1)/2 − (0 + 2 + 2 + 0)/4 − 0 = 3."""
    assert energy_distance(np.array([[0.0], [2.0]]), np.array([[3.0]])) == pytest.approx(3, rel=1e-12)
    same = np.random.default_rng(0).normal(size=(20, 5))
    assert energy_distance(same, same[::-1]) == pytest.approx(0, abs=1e-12)


def test_it_is_scipys_distance_in_one_dimension():
    """scipy's energy distance is the root of ours, by integrals of the distribution functions."""
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=40), generator.exponential(size=25)
    assert energy_distance(a[:, None], b[:, None]) == pytest.approx(stats.energy_distance(a, b) ** 2, rel=1e-9)


def test_false_alarms_of_samples_of_one_law_keep_the_level():
    """Over 400 seeds: rejections at 5 % and at 1 % are no more than a binomial law lets through once in a thousand."""
    values = []
    for seed in range(400):
        x = np.random.default_rng(seed).standard_t(3, size=(90, 8)).astype(np.float32)
        values.append(energy_p_value(x[:50], x[50:], permutations=199, seed=seed))
    for level in (0.05, 0.01):
        assert np.sum(np.array(values) <= level) <= stats.binom.ppf(0.999, len(values), level)


@pytest.mark.parametrize("change", [lambda x: x + 0.5, lambda x: 1.6 * x])
def test_another_place_or_spread_is_seen(change):
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(2, 120, 8)).astype(np.float32)
    assert energy_p_value(x, change(y)) < 0.01


def test_the_same_seed_gives_the_same_value_and_large_samples_are_thinned():
    x = np.random.default_rng(3).normal(size=(2 * MOST + 1, 3))
    assert len(thinned(x)) == MOST and energy_p_value(x, x[:50]) == energy_p_value(thinned(x), x[:50])
    # What equals the sample itself is as near as can be: every permutation is at least as far apart.
    assert energy_p_value(x[:50], x[:50]) == 1


def test_an_empty_sample_is_refused():
    with pytest.raises(ValueError, match="both samples"):
        energy_p_value(np.empty((0, 2)), np.ones((3, 2)))
