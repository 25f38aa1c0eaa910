"""The search is exact, independent of its chunks, and breaks ties by the lowest index; what FAISS may miss is measured."""

import sys
import tracemalloc

import numpy as np
import pytest
import torch

from eval import neighbours
from eval.neighbours import nearest, search, shortlist


def unit(n, d, seed):
    x = np.random.default_rng(seed).normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def by_hand(q, r, k):
    products = q.astype(np.float64) @ r.astype(np.float64).T
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, 1), order


@pytest.fixture(autouse=True, params=["products", "faiss"])
def engine(request, monkeypatch):
    """Everything holds with FAISS picking the candidates of a chunk, which it else does for large ones only, and without."""
    monkeypatch.setattr(neighbours, "_WORTH", 1 if request.param == "faiss" else 1 << 62)


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


def clustered(n, d, seed):
    """Unit vectors around 40 directions."""
    x = unit(40, d, 100)[np.random.default_rng(seed).integers(40, size=n)] + 0.8 * unit(n, d, seed)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 70, 200])
@pytest.mark.parametrize("chunk", [(1024, 16384), (16, 64), (33, 65), (100, 150)])
def test_many_neighbours_and_chunks_that_fit_no_group_of_products(k, chunk):
    q, r = unit(40, 12, 0), unit(190, 12, 1)
    similarities, indices = nearest(q, r, k, chunk=chunk)
    wanted, order = by_hand(q, r, k)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(similarities, wanted, atol=1e-7)


@pytest.mark.parametrize("rising", [True, False])
def test_the_order_of_the_references_does_not_matter(rising):
    q, r = unit(1, 16, 0), unit(3000, 16, 1)
    order = np.argsort(r @ q[0] if rising else -(r @ q[0]), kind="stable")
    similarities, indices = nearest(q, r[order], 5, chunk=(8, 256))
    assert order[indices[0]].tolist() == by_hand(q, r, 5)[1][0].tolist()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e4])
def test_what_one_rounded_product_can_not_tell_apart_is_ranked_right_at_any_length(scale):
    base = unit(1, 512, 5)[0]
    r = np.stack([base] * 300) * scale
    r[:, 7] += np.random.default_rng(0).permutation(300).astype(np.float32) * np.float32(2e-7 * scale)
    q = base[None] * scale
    for chunk in ((1, 300), (1, 17)):
        assert nearest(q, r, 20, chunk=chunk)[1].tolist() == by_hand(q, r, 20)[1].tolist()


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_half_precision_and_files_are_read_chunk_by_chunk_and_searched_as_their_float32(tmp_path, monkeypatch, kind):
    q, r = unit(20, 24, 0), unit(500, 24, 1).astype(kind)
    wanted = nearest(q, r.astype(np.float32), 5)
    np.save(tmp_path / "r.npy", r)
    read, original = [], neighbours._Rows.__getitem__
    monkeypatch.setattr(neighbours._Rows, "__getitem__", lambda s, i: read.append((s.name, i)) or original(s, i))
    for references in (np.load(tmp_path / "r.npy", mmap_mode="r"), r, torch.from_numpy(r)):
        read.clear()
        found = nearest(q, references, 5, chunk=(7, 64))
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
        parts = [(i.start, i.stop) for name, i in read if name == "references"]
        assert parts == [(i, min(i + 64, 500)) for i in range(0, 500, 64)]


def test_memory_is_bounded_by_the_chunk(tmp_path):
    references = np.lib.format.open_memmap(tmp_path / "r.npy", mode="w+", dtype=np.float16, shape=(50_000, 64))
    references[:] = np.random.default_rng(0).random(references.shape, np.float32)
    tracemalloc.start()
    try:
        nearest(unit(4, 64, 0), references, 1, chunk=(4, 1000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < references.nbytes / 4


def test_bfloat16_tensors_and_a_mixture_of_types():
    q, r = torch.from_numpy(unit(5, 16, 0)), torch.from_numpy(unit(30, 16, 1))
    similarities, indices = nearest(q.bfloat16(), r.bfloat16(), 2)
    wanted, order = by_hand(q.bfloat16().float().numpy(), r.bfloat16().float().numpy(), 2)
    assert similarities.dtype == torch.float32 and indices.tolist() == order.tolist()
    similarities, indices = nearest(q.numpy(), r.double(), 2)
    assert similarities.dtype == np.float64 and indices.tolist() == by_hand(q.numpy(), r.numpy(), 2)[1].tolist()


def test_no_queries_give_no_rows():
    for found in (nearest(np.ones((0, 3)), np.ones((2, 3)), 1), nearest(np.ones((0, 3), np.float32), np.ones((2, 3)), 5)):
        assert found[0].shape == found[1].shape == (0, min(2, found[0].shape[1]))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_shortlist_from_every_list_is_the_exact_search(leave_one_out):
    r = clustered(1000, 32, 1)
    r[700] = r[3]
    q = r if leave_one_out else clustered(100, 32, 2)
    wanted = nearest(q, r, 5, leave_one_out=leave_one_out)
    found = search(q, r, 5, leave_one_out=leave_one_out, method="faiss", probes=10**9)
    np.testing.assert_array_equal(found.indices, wanted[1])
    np.testing.assert_array_equal(found.similarities, wanted[0])
    assert (found.method, found.recall, found.sampled) == ("faiss", 1.0, 100 if not leave_one_out else 200)


def test_recall_is_that_of_the_sample_and_similarities_are_the_exact_ones():
    q, r = unit(300, 32, 0), unit(4000, 32, 1)
    wanted, order = by_hand(q, r, 10)
    found = search(q, r, 10, method="faiss", probes=2, sample=1000)
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.indices, order, strict=True)])
    assert found.sampled == 300 and 0.05 < found.recall < 0.95
    assert found.recall == pytest.approx(hits)
    taken = (q[:, None].astype(np.float64) * r[found.indices]).sum(-1)
    np.testing.assert_allclose(found.similarities, taken, atol=1e-7)
    assert (np.diff(found.similarities, axis=1) <= 0).all()
    again = search(q, r, 10, method="faiss", probes=2, sample=50)
    assert again.sampled == 50 and 0 < again.recall <= 1
    assert again.recall == search(q, r, 10, method="faiss", probes=2, sample=50).recall


def test_a_query_with_too_few_candidates_is_searched_exactly():
    q, r = unit(20, 16, 0), unit(400, 16, 1)
    found = search(q, r, 300, method="faiss", probes=1)
    np.testing.assert_array_equal(found.indices, by_hand(q, r, 300)[1])
    assert found.recall == 1


def test_a_shortlist_holds_near_candidates_once_each():
    q, r = clustered(50, 32, 2), clustered(3000, 32, 1)
    candidates = shortlist(q, torch.from_numpy(r).half(), 40)
    assert candidates.shape == (50, 40) and candidates.dtype == np.int64
    assert all(len(set(row)) == 40 for row in candidates.tolist())
    assert np.mean([i in row for i, row in zip(by_hand(q, r, 1)[1][:, 0], candidates, strict=True)]) > 0.9
    assert shortlist(q, r[:3], 40).shape == (50, 3)


def test_auto_asks_faiss_only_above_the_size(monkeypatch):
    q, r = torch.from_numpy(clustered(30, 16, 2)), clustered(500, 16, 1)
    assert search(q, r, 2).method == "exact"
    monkeypatch.setattr(neighbours, "FAISS_ABOVE", 30 * 500)
    assert search(q, r, 2).method == "exact"
    monkeypatch.setattr(neighbours, "FAISS_ABOVE", 30 * 500 - 1)
    found = search(q, r, 2)
    assert found.method == "faiss" and isinstance(found.similarities, torch.Tensor)
    exact = search(q, r, 2, method="exact")
    assert (exact.method, exact.recall, exact.sampled) == ("exact", 1.0, 0)


def test_without_faiss_auto_is_exact_and_faiss_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(neighbours, "FAISS_ABOVE", 0)
    q, r = unit(3, 8, 0), unit(9, 8, 1)
    found = search(q, r, 2)
    assert found.method == "exact" and found.recall == 1
    np.testing.assert_array_equal(found.indices, nearest(q, r, 2)[1])
    message = r"^method \"faiss\" needs the package faiss-cpu, which is not installed \(pip install faiss-cpu\)$"
    with pytest.raises(ModuleNotFoundError, match=message):
        search(q, r, 2, method="faiss")


def test_what_search_refuses():
    x = unit(4, 8, 0)
    with pytest.raises(ValueError, match="method 'hnsw' is none of auto, exact, faiss"):
        search(x, x, method="hnsw")
    with pytest.raises(ValueError, match="at least one query, got 0"):
        search(x, x, sample=0)
    x[1, 2] = np.inf
    with pytest.raises(ValueError, match="references: every value must be finite"):
        search(unit(4, 8, 0), x, method="faiss")
