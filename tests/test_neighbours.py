"""The search is exact, independent of its chunks, and breaks ties by the lowest index."""

import numpy as np
import pytest
import torch

from eval.neighbours import nearest


def unit(n, d, seed):
    x = np.random.default_rng(seed).normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def by_hand(q, r, k):
    products = q.astype(np.float64) @ r.astype(np.float64).T
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, 1), order


@pytest.mark.parametrize("chunk", [(1024, 16384), (7, 11), (1, 1), (64, 13)])
def test_equals_a_full_sort_whatever_the_chunks(chunk):
    q, r = unit(50, 24, 0), unit(101, 24, 1)
    similarities, indices = nearest(q, r, 5, chunk=chunk)
    wanted, order = by_hand(q, r, 5)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(similarities, wanted, atol=1e-7)
    assert similarities.dtype == np.float32 and indices.dtype == np.int64


@pytest.mark.parametrize("chunk", [(1024, 16384), (3, 4), (2, 40)])
def test_ties_go_to_the_lowest_index_even_with_many_copies(chunk):
    one, other = unit(2, 33, 2)
    r = np.stack([other] * 5 + [one] * 60)  # more copies than any margin of candidates
    similarities, indices = nearest(one[None], r, 3, chunk=chunk)
    assert indices.tolist() == [[5, 6, 7]]
    assert len(set(similarities[0].tolist())) == 1


def test_more_neighbours_than_references_gives_them_all():
    similarities, indices = nearest(unit(4, 8, 0), unit(3, 8, 1), 50)
    assert similarities.shape == (4, 3)
    assert sorted(indices[0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("chunk", [(1024, 16384), (3, 4)])
def test_leave_one_out_skips_the_row_itself_but_not_its_copies(chunk):
    x = unit(10, 16, 3)
    x[7] = x[2]
    similarities, indices = nearest(x, x, 50, leave_one_out=True, chunk=chunk)
    assert similarities.shape == (10, 9)
    assert all(i not in indices[i] for i in range(10))
    assert indices[2, 0] == 7 and indices[7, 0] == 2
    assert np.isfinite(similarities).all()


def test_tensors_come_back_as_tensors_in_their_precision():
    q = torch.from_numpy(unit(3, 8, 0)).double()
    similarities, indices = nearest(q, q, 1)
    assert similarities.dtype == torch.float64 and isinstance(indices, torch.Tensor)
    assert indices[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("q", "r", "k", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), 1, "width 3"),
        (np.ones((2, 3)), np.full((2, 3), np.nan), 1, "references: every value must be finite"),
        (np.ones((2, 3)), np.ones((0, 3)), 1, "at least one reference"),
        (np.ones((2, 3)), np.ones((2, 3)), 0, "k ≥ 1"),
        (np.ones(3), np.ones((2, 3)), 1, "queries: a matrix"),
    ],
)
def test_what_can_not_be_searched_is_refused(q, r, k, message):
    with pytest.raises(ValueError, match=message):
        nearest(q, r, k)
