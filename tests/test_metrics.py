"""Every metric against a value worked out by hand or known in closed form."""

import numpy as np
import pytest
from scipy import stats

from eval import metrics


def test_quantiles_interpolate_linearly():
    assert metrics.nn_quantiles([0.0, 1.0, 2.0, 3.0], (0.0, 0.5, 1.0)) == {"0": 0.0, "0.5": 1.5, "1": 3.0}


def test_share_above_is_strict():
    assert metrics.share_above([0.1, 0.5, 0.5, 0.9], 0.5) == 0.25


def test_distance_of_cosines():
    np.testing.assert_allclose(metrics.distance_of([1, 0, -1, 0.5]), [0, np.sqrt(2), 2, 1], atol=1e-12)
    assert metrics.distance_of(1 + 1e-7) == 0  # rounding must not give NaN


def test_l2_ratio_by_hand():
    # d1 = 1, mean = 2: 1 / (.5 · 2) = 1. Equal distances: 1/.5 = 2, whatever their size. Order does not matter.
    np.testing.assert_allclose(metrics.l2_ratio([[1, 2, 3], [4, 4, 4], [3, 2, 1]]), [1, 2, 1])
    np.testing.assert_allclose(metrics.l2_ratio([[0.0, 0.0], [0.0, 1.0]]), [0, 0])


def test_d1_over_d2_by_hand():
    np.testing.assert_allclose(metrics.d1_over_d2([[1, 4, 9], [3, 2, 2], [0, 0, 5]]), [0.25, 1, 0])
    with pytest.raises(ValueError, match="two neighbours"):
        metrics.d1_over_d2([[1.0]])


def test_excess_is_a_difference_of_rates():
    assert metrics.excess([0.9, 0.8, 0.1, 0.2], [0.9, 0.1, 0.1, 0.1], 0.5) == pytest.approx(0.25)


def test_frechet_distance_of_shifted_copies_is_the_squared_shift(rng):
    x = rng.normal(size=(50, 4))
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert metrics.frechet_distance(x, x + [3, 0, 4, 0]) == pytest.approx(25)
    # Scaling by s about the mean: tr Σ (s − 1)².
    trace = np.cov(x.T).trace()
    assert metrics.frechet_distance(x - x.mean(0), 3 * (x - x.mean(0))) == pytest.approx(4 * trace)


@pytest.mark.parametrize(("n_a", "n_b", "d"), [(40, 60, 5), (6, 30, 12), (7, 9, 20)])
def test_frechet_distance_equals_the_matrix_square_root_form(rng, n_a, n_b, d):
    a, b = rng.normal(size=(n_a, d)), rng.normal(1, 2, size=(n_b, d)) @ rng.normal(size=(d, d))
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(s_a)  # exact also where scipy's sqrtm is not: singular covariances
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    inner = np.sqrt(np.clip(np.linalg.eigvalsh(root @ s_b @ root), 0, None)).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a) + np.trace(s_b) - 2 * inner
    assert metrics.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)


def test_mann_whitney_z_is_scipys_with_ties(rng):
    x, y = rng.integers(0, 8, 40), rng.integers(1, 9, 30)
    p = stats.mannwhitneyu(x, y, use_continuity=False, method="asymptotic").pvalue
    z = metrics.mann_whitney_z(x, y)
    assert 2 * stats.norm.sf(abs(z)) == pytest.approx(p)
    assert z < 0 and metrics.mann_whitney_z(y, x) == pytest.approx(-z)
    assert metrics.mann_whitney_z([1, 1], [1, 1, 1]) == 0


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0]]])
def test_empty_nonfinite_or_misshapen_input_is_refused(values):
    with pytest.raises(ValueError, match="similarities"):
        metrics.share_above(values, 0.5)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
