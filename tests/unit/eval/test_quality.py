"""Every quality metric against a value worked out by hand or known in closed form."""

import tracemalloc

import numpy as np
import pytest
import torch

from eval import metrics, quality


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_quality_metrics_are_found_among_the_metrics():
    for name in ("frechet_distance", "kid", "prdc", "vendi_score", "clip_score"):
        assert getattr(metrics, name) is getattr(quality, name)


def test_nearest_distances_are_euclidean_and_exact():
    # The largest inner product with (1, 0) belongs to (9, 0), the smallest distance to (0, 0).
    references = np.array([[0.0, 0.0], [9.0, 0.0], [1.0, 3.0]])
    distances, indices = quality.nearest_distances(np.array([[1.0, 0.0], [9.0, 0.0]]), references, 2)
    np.testing.assert_array_equal(distances, [[1, 3], [0, np.sqrt(73)]])
    np.testing.assert_array_equal(indices, [[0, 2], [1, 2]])
    distances, _ = quality.nearest_distances(references, references, 1, leave_one_out=True)
    np.testing.assert_allclose(distances[:, 0], [np.sqrt(10), np.sqrt(73), np.sqrt(10)])


def test_nearest_distances_of_many_rows_equal_those_of_one(rng):
    queries, references = rng.normal(size=(1500, 2)), rng.normal(size=(7, 2))
    wanted = np.linalg.norm(queries[:, None] - references, axis=2).min(1)
    np.testing.assert_allclose(quality.nearest_distances(queries, references)[0][:, 0], wanted)


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


def test_kid_by_hand():
    # d = 1: k(0, 1) = 1; k(1, 2) = 27; k(0, 1), k(0, 2), k(1, 1), k(1, 2) = 1, 1, 8, 27.
    assert metrics.kid([[0.0], [1.0]], [[1.0], [2.0]]) == pytest.approx(1 + 27 - 2 * 37 / 4)
    # d = 2 halves the product: k((2, 0), (4, 0)) = (8/2 + 1)³ = 125.
    assert metrics.kid([[0.0, 0.0], [2.0, 0.0]], [[2.0, 0.0], [4.0, 0.0]]) == pytest.approx(1 + 125 - 2 * 154 / 4)
    # Unequal sizes: k(0, 0) = 1, k(1, 1) = 8, k(0, 1) = 1.
    assert metrics.kid([[0.0], [0.0]], [[1.0], [1.0], [1.0]]) == pytest.approx(1 + 8 - 2)


def test_kid_is_torchmetrics_with_one_subset_of_all_images(rng):
    from torchmetrics.image.kid import poly_mmd

    a, b = rng.normal(size=(40, 6)), rng.normal(0.3, 1.2, size=(40, 6))
    wanted = poly_mmd(torch.from_numpy(a), torch.from_numpy(b)).item()
    assert metrics.kid(a, b) == pytest.approx(wanted, rel=1e-9)
    assert metrics.kid(a, b, chunk=(7, 11)) == pytest.approx(wanted, rel=1e-9)


def test_kid_is_unbiased(rng):
    # Mean over many draws of one law: 0 within 4 standard errors; the biased estimate would be far above.
    found = [metrics.kid(rng.normal(size=(10, 3)), rng.normal(size=(10, 3))) for _ in range(2000)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error


def test_prdc_by_hand():
    # Real balls: 0 ± 1, 1 ± 1, 3 ± 2; generated: .5 ± 9.5, 10 ± .5, 10.5 ± .5. Only .5 lies in real balls, the first two;
    # the ball of .5 has all three real images.
    found = metrics.prdc([[0.0], [1.0], [3.0]], [[0.5], [10.0], [10.5]], k=1)
    assert found == pytest.approx({"precision": 1 / 3, "recall": 1, "density": 2 / 3, "coverage": 2 / 3})
    # The other way about: two of the three real images lie in no generated ball, and their balls are empty.
    found = metrics.prdc([[0.5], [10.0], [10.5]], [[0.0], [1.0], [3.0]], k=1)
    assert found == pytest.approx({"precision": 1, "recall": 1 / 3, "density": 1, "coverage": 1 / 3})


def test_prdc_uses_the_kth_neighbour():
    # Real balls 0 ± 3, 1 ± 2, 3 ± 3, 9 ± 8, and 2.5 lies in each; the balls of 20 and 30 miss 0, that of 2.5 has all four.
    found = metrics.prdc([[0.0], [1.0], [3.0], [9.0]], [[2.5], [20.0], [30.0]], k=2)
    assert found == pytest.approx({"precision": 1 / 3, "recall": 1, "density": 4 / (2 * 3), "coverage": 1})


def test_prdc_of_a_set_with_itself_has_closed_balls(rng):
    # Each image lies in its own ball and on or in those of the k images it is a neighbour of: (k + 1)/k on average.
    x = rng.normal(100, 1, size=(60, 4))
    for chunk in ((1024, 4096), (7, 11)):
        assert metrics.prdc(x, x, chunk=chunk) == pytest.approx({"precision": 1, "recall": 1, "density": 1.2, "coverage": 1})


def test_prdc_finds_copies_where_duplicates_leave_no_radius():
    real = np.array([[0.1, 0.7]] * 3 + [[5.3, 5.1]] * 3)
    found = metrics.prdc(real, real[[0, 3, 3, 0]], k=2)
    assert found == pytest.approx({"precision": 1, "recall": 1, "density": 1.5, "coverage": 1})


@pytest.mark.parametrize("k", [0, 3])
def test_prdc_needs_more_than_k_images(k):
    with pytest.raises(ValueError, match="more than k images"):
        metrics.prdc(np.eye(4), np.eye(4)[:3], k=k)


def test_vendi_score_of_known_spectra():
    assert metrics.vendi_score(5 * np.eye(4)) == pytest.approx(4)
    assert metrics.vendi_score([[1.0, 2.0]] * 7) == pytest.approx(1)
    # Groups of 3 and 1 equal images, orthogonal: exp of the entropy of (3/4, 1/4), however they are scaled.
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert metrics.vendi_score([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 9.0]]) == pytest.approx(np.exp(entropy))
    # Two images at cosine .6: eigenvalues .8 and .2, with fewer images than dimensions and as many.
    two = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2))
    assert metrics.vendi_score([[1.0, 0.0], [0.6, 0.8]]) == pytest.approx(np.exp(two))
    assert metrics.vendi_score([[1.0, 0.0, 0.0], [0.6, 0.0, 0.8]]) == pytest.approx(np.exp(two))


def test_clip_score_by_hand():
    images = [[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [0.1, 0.3]]
    texts = [[2.0, 0.0], [0.0, 7.0], [-1.0, 0.1], [0.1, 0.3]]
    np.testing.assert_allclose(metrics.clip_score(images, texts), [60, 0, 0, 100])
    with pytest.raises(ValueError, match="one text for each image"):
        metrics.clip_score(np.ones((2, 3)), np.ones((1, 3)))


@pytest.mark.parametrize("call", [metrics.vendi_score, lambda x: metrics.clip_score(x, np.eye(2))])
def test_a_row_of_zeros_is_refused(call):
    with pytest.raises(ValueError, match="row of zeros"):
        call([[1.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize("call", [metrics.kid, metrics.prdc])
def test_the_product_of_two_sets_is_never_whole(call, rng):
    a, b = rng.normal(size=(4000, 2)), rng.normal(size=(4000, 2))
    tracemalloc.start()
    try:
        call(a, b, chunk=(128, 512))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4000 * 4000 * 8 / 20


@pytest.mark.parametrize("bad", ["empty", "nonfinite", "misshapen"])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: metrics.frechet_distance(x, np.eye(3)),
        lambda x: metrics.frechet_distance(np.eye(3), x),
        lambda x: metrics.kid(x, np.eye(3)),
        lambda x: metrics.kid(np.eye(3), x),
        lambda x: metrics.prdc(x, np.eye(3), k=1),
        lambda x: metrics.prdc(np.eye(3), x, k=1),
        metrics.vendi_score,
        lambda x: metrics.clip_score(x, np.eye(3)),
        lambda x: metrics.clip_score(np.eye(3), x),
    ],
)
def test_every_array_is_checked(call, bad):
    call(np.eye(3))
    wrong = {"empty": np.empty((0, 3)), "nonfinite": np.diag([1, np.nan, 1]), "misshapen": np.ones(3)}[bad]
    with pytest.raises(ValueError, match="non-empty array|finite"):
        call(wrong)


@pytest.mark.parametrize("call", [metrics.frechet_distance, metrics.kid, lambda a, b: metrics.prdc(a, b, k=1)])
def test_two_sets_need_one_width_and_two_images(call):
    for wrong in (np.eye(4), np.eye(3)[:1]):
        with pytest.raises(ValueError, match="two sets of at least 2"):
            call(np.eye(3), wrong)
