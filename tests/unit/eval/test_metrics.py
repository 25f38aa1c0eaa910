"""Every memorisation metric against a value worked out by hand or known in closed form."""

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


def test_mann_whitney_z_is_scipys_with_ties(rng):
    x, y = rng.integers(0, 8, 40), rng.integers(1, 9, 30)
    p = stats.mannwhitneyu(x, y, use_continuity=False, method="asymptotic").pvalue
    z = metrics.mann_whitney_z(x, y)
    assert 2 * stats.norm.sf(abs(z)) == pytest.approx(p)
    assert z < 0 and metrics.mann_whitney_z(y, x) == pytest.approx(-z)
    assert metrics.mann_whitney_z([1, 1], [1, 1, 1]) == 0


def test_legacy_shares_are_strict_and_keyed_by_threshold():
    assert metrics.legacy_shares([0.85, 0.9, 0.93, 0.99], metrics.LEGACY_THRESHOLDS["dinov2"]) == {"0.9": 0.5, "0.95": 0.25}
    assert metrics.LEGACY_THRESHOLDS["sscd"] == (0.5, 0.75)


def test_score_normalization_subtracts_the_mean_of_the_two_largest():
    # .9 − (.4 + .2)/2 = .6; .5 − (.5 + .3)/2 = .1, in whatever order the background comes.
    found = metrics.score_normalization([0.9, 0.5], [[0.2, 0.4, -1.0], [0.5, -0.5, 0.3]])
    np.testing.assert_allclose(found, [0.6, 0.1])
    np.testing.assert_allclose(metrics.score_normalization([0.9], [[0.2, 0.4]], k=1), [0.5])


@pytest.mark.parametrize(("background", "k"), [([[0.1]], 2), ([[0.1, 0.2]] * 2, 2), ([[0.1, 0.2]], 0), ([0.1, 0.2], 2)])
def test_score_normalization_needs_k_background_similarities_for_each_query(background, k):
    with pytest.raises(ValueError, match="to_background"):
        metrics.score_normalization([0.5], background, k)


def test_authpct_by_hand():
    train = [[0.0], [1.0], [10.0]]  # nearest others at 1, 1 and 9
    # 7 from 10 is not authentic; 3.4 from 1, 3.6 from 0 and 10 from 10 are; .5 and 1 (not strictly farther) from 0 are
    # not. By largest inner product 10 would be nearest to nearly all.
    generated = [[17.0], [4.4], [-3.6], [20.0], [0.5], [-1.0]]
    assert metrics.authpct(generated, train) == 0.5
    assert metrics.authpct(train, train) == 0
    # A duplicate in the training set: only the exact copy is not authentic.
    assert metrics.authpct([[5.0], [5.1]], [[5.0], [5.0], [9.0]]) == 0.5


def test_authpct_needs_another_training_image():
    with pytest.raises(ValueError, match="train"):
        metrics.authpct([[1.0]], [[1.0]])
    with pytest.raises(ValueError, match="width"):
        metrics.authpct([[1.0]], [[1.0, 2.0], [3.0, 4.0]])


def test_c_t_of_one_cell_is_mann_whitney_of_the_distances_to_the_nearest_training_image():
    train, generated, heldout = [[0.0], [10.0]], [[1.0], [12.0], [9.0]], [[3.0], [6.0], [-5.0], [10.5]]
    wanted = metrics.mann_whitney_z([1, 2, 1], [3, 4, 5, 0.5])
    assert wanted < 0  # nearer than held-out images
    assert metrics.c_t(generated, heldout, train, cells=1, min_generated=1) == pytest.approx(wanted)
    assert metrics.c_t(heldout, generated, train, cells=1, min_generated=1) == pytest.approx(-wanted)


def test_c_t_averages_cells_by_their_share_of_heldout_images():
    # Two cells, around 0 and 1000, with their own distances; 1 held-out image in the first and 3 in the second.
    train = [[0.0], [0.0], [1000.0], [1000.0]]
    generated, heldout = [[1.0], [2.0], [1003.0], [1004.0], [1005.0]], [[3.0], [1001.0], [1002.0], [999.5]]
    first = metrics.mann_whitney_z([1, 2], [3])
    second = metrics.mann_whitney_z([3, 4, 5], [1, 2, 0.5])
    found = metrics.c_t(generated, heldout, train, cells=2, min_generated=2)
    assert found == pytest.approx((first + 3 * second) / 4)
    # The first cell has too few generated images for a minimum of 3.
    assert metrics.c_t(generated, heldout, train, cells=2, min_generated=3) == pytest.approx(second)
    # A cell without held-out images has no weight.
    assert metrics.c_t(generated, heldout[1:], train, cells=2, min_generated=1) == pytest.approx(second)
    with pytest.raises(ValueError, match="no cell has 4 generated"):
        metrics.c_t(generated, heldout, train, cells=2, min_generated=4)


def test_c_t_tells_copies_from_new_images(rng):
    train, heldout, new = (rng.normal(size=(n, 3)) for n in (300, 200, 200))
    copies = train[:200] + 0.01 * rng.normal(size=(200, 3))
    assert metrics.c_t(copies, heldout, train, cells=4) < -5
    assert abs(metrics.c_t(new, heldout, train, cells=4)) < 3
    assert metrics.c_t(new, heldout, train, cells=4) == metrics.c_t(new, heldout, train, cells=4)


@pytest.mark.parametrize("cells", [0, 3])
def test_c_t_needs_a_training_image_of_its_own_per_cell(cells):
    with pytest.raises(ValueError, match="2 distinct"):
        metrics.c_t([[1.0]], [[1.0]], [[1.0], [2.0], [2.0]], cells=cells)


def test_denoising_gap_by_hand():
    gap, error = metrics.denoising_gap([[1, 2], [3, 2]], [[5, 2], [7, 4], [6, 3]])
    np.testing.assert_allclose(gap, [2 - 6, 2 - 3])
    np.testing.assert_allclose(error, [np.sqrt(2 / 2 + 1 / 3), np.sqrt(0 / 2 + 1 / 3)])


@pytest.mark.parametrize("train_errors", [[[1.0, 2.0]], [[1.0], [2.0]], [1.0, 2.0], [[1.0, np.nan]] * 2])
def test_denoising_gap_needs_two_images_at_the_same_steps(train_errors):
    with pytest.raises(ValueError, match="errors"):
        metrics.denoising_gap(train_errors, [[1.0, 2.0], [3.0, 4.0]])


def test_roc_auc_counts_a_tie_as_half():
    assert metrics.roc_auc([3, 2], [1, 2]) == 3.5 / 4
    assert metrics.roc_auc([1, 1, 1], [1, 1]) == 0.5
    assert metrics.roc_auc([2, 3], [0, 1, 1]) == 1
    assert metrics.roc_auc([0, 1, 1], [2, 3]) == 0


def test_tpr_at_fpr_by_hand():
    hundred = np.arange(100.0)
    assert metrics.tpr_at_fpr([99.5, 98.5, 98, 0], hundred) == 0.5  # one nonmember of 100 may lie above
    assert metrics.tpr_at_fpr([99.5, 98.5, 98, 0], hundred, fpr=0) == 0.25
    assert metrics.tpr_at_fpr([70.5, 70], hundred, fpr=0.29) == 0.5  # .29 · 100 = 28.999999999999996
    assert metrics.tpr_at_fpr([3, 1], [2, 0], fpr=0.99) == 1  # one of two may lie above, so 0 is the threshold
    # Three nonmembers share the largest score: none or all three lie above a threshold.
    tied = np.array([5.0] * 3 + [0.0] * 97)
    assert metrics.tpr_at_fpr([6, 5], tied) == 0.5
    assert metrics.tpr_at_fpr([6, 5], tied, fpr=0.03) == 1
    assert metrics.tpr_at_fpr([1.0], [1.0, 1.0]) == 0


@pytest.mark.parametrize("fpr", [-0.1, 1, np.nan])
def test_tpr_at_fpr_refuses_a_rate_out_of_range(fpr):
    with pytest.raises(ValueError, match="fpr"):
        metrics.tpr_at_fpr([1.0], [0.0], fpr)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0]]])
def test_empty_nonfinite_or_misshapen_input_is_refused(values):
    with pytest.raises(ValueError, match="similarities"):
        metrics.share_above(values, 0.5)


@pytest.mark.parametrize("bad", ["empty", "nonfinite", "misshapen"])
@pytest.mark.parametrize(
    ("call", "dimensions"),
    [
        (lambda x: metrics.legacy_shares(x, (0.9,)), 1),
        (lambda x: metrics.score_normalization(x, np.ones((3, 2))), 1),
        (lambda x: metrics.score_normalization(np.ones(3), x), 2),
        (lambda x: metrics.authpct(x, np.eye(3)), 2),
        (lambda x: metrics.authpct(np.eye(3), x), 2),
        (lambda x: metrics.c_t(x, np.eye(3), np.eye(3), cells=1, min_generated=1), 2),
        (lambda x: metrics.c_t(np.eye(3), x, np.eye(3), cells=1, min_generated=1), 2),
        (lambda x: metrics.c_t(np.eye(3), np.eye(3), x, cells=1, min_generated=1), 2),
        (lambda x: metrics.denoising_gap(x, np.eye(3)), 2),
        (lambda x: metrics.denoising_gap(np.eye(3), x), 2),
        (lambda x: metrics.roc_auc(x, np.ones(3)), 1),
        (lambda x: metrics.roc_auc(np.ones(3), x), 1),
        (lambda x: metrics.tpr_at_fpr(x, np.ones(3)), 1),
        (lambda x: metrics.tpr_at_fpr(np.ones(3), x), 1),
    ],
)
def test_every_array_is_checked(call, dimensions, bad):
    good = np.eye(3) if dimensions == 2 else np.ones(3)
    call(good)
    wrong = {"empty": good[:0], "nonfinite": np.where(good == 1, np.inf, good), "misshapen": good[None]}[bad]
    with pytest.raises(ValueError, match="non-empty array|finite"):
        call(wrong)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
