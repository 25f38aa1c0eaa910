"""Embeddings → nearest reference images, in bounded memory, the same answer whatever the chunk sizes.

``nearest`` is exact. ``search`` is too, except for a large number of products, where FAISS draws up a shortlist for each
query; the shortlist is ranked as the exact search ranks, and how much it missed is measured and said.
"""

# torch's annotations leave from_numpy, vector_norm, unique and repeat_interleave unknown, and so what they give.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from types import ModuleType

Array = npt.NDArray[Any]
A = TypeVar("A", bound="Array | torch.Tensor")
Chunk = tuple[int, int]

METHODS = ("auto", "exact", "faiss")
# Queries × references above which method "auto" asks FAISS: 20,000 queries against a million references. Of width 1024,
# these take the exact search some minutes on two cores, which is well above what it takes to build an index.
FAISS_ABOVE = 2 * 10**10
# Queries on which a shortlist's recall is measured.
SAMPLE = 200

_CHUNK = (1024, 16384)
# Of this many products of a query, only the largest is compared with what is wanted, unless that one passes.
_GROUP = 16
# Products looked at one by one at once.
_PRODUCTS = 1 << 22
# Values computed again in float64 at once: few enough to stay in a processor's cache.
_VALUES = 1 << 17
_FAISS_CHUNK = (4096, 32768)  # FAISS makes no more than 4096 × 1024 products at once
# Products of a chunk from which FAISS is asked for the largest, and how many more than k and the query itself.
_WORTH, _FEW = 1 << 22, 8
# Candidates that a shortlist holds beyond k, since it is drawn up from vectors rounded to 8 bits.
_SPARE = 64
# FAISS: training vectors per list of the index.
_TRAINING = 64


@dataclass(frozen=True)
class Search(Generic[A]):
    """What ``search`` found, and how.

    Attributes:
        similarities, indices: as ``nearest`` gives them.
        method: "exact" or "faiss", whichever ran.
        recall: share of the k nearest that were found, in the queries sampled; 1 for an exact search.
        sampled: number of queries that ``recall`` is from; 0 for an exact search.
    """

    similarities: A
    indices: A
    method: str
    recall: float
    sampled: int


@overload
def nearest(
    queries: Array, references: Array | torch.Tensor, k: int = ..., *, leave_one_out: bool = ..., chunk: Chunk | None = ...
) -> tuple[Array, Array]: ...
@overload
def nearest(
    queries: torch.Tensor,
    references: Array | torch.Tensor,
    k: int = ...,
    *,
    leave_one_out: bool = ...,
    chunk: Chunk | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def nearest(
    queries: Array | torch.Tensor,
    references: Array | torch.Tensor,
    k: int = 1,
    *,
    leave_one_out: bool = False,
    chunk: Chunk | None = None,
) -> tuple[Array, Array] | tuple[torch.Tensor, torch.Tensor]:
    """The k references with the largest inner product to each query, found exactly.

    Products of a chunk of queries with a chunk of references tell which may be among the k; those are computed again in
    float64, so that equal images have equal similarities wherever they stand, and ties go to the lowest index. Memory
    is bounded by the chunk sizes, not by the number of rows, and references are read once, chunk by chunk: a memmap is
    never copied as a whole, nor is a float16 array ever float32 as a whole.

    Args:
        queries: array, memmap or tensor of shape (n_queries, d), usually L2-normalised, so that the product is the
            cosine.
        references: array, memmap or tensor of shape (n_references, d); its chunks are moved to the queries' device.
        k: neighbours wanted. With fewer references, all of them come back: the result's width is min(k, available).
        leave_one_out: queries and references are the same set; row i is not its own neighbour.
        chunk: rows of queries and of references handled at once; by default as many as the search at hand is fastest with.

    Returns:
        similarities of shape (n_queries, min(k, available)) in descending order, float64 if queries or references are
        and float32 otherwise, and int64 indices into ``references`` of the same shape; tensors if queries were one,
        else arrays.

    Raises:
        ValueError: shapes that don't fit, values that aren't finite, nothing to search in, or k < 1.
    """
    q, r, k = _checked(queries, references, k, leave_one_out)
    return _as_given(q, *_exact(q, r, k, _own(q, leave_one_out), chunk))


@overload
def search(
    queries: Array, references: Array | torch.Tensor, k: int = ..., *, leave_one_out: bool = ..., method: str = ...,
    probes: int | None = ..., sample: int = ..., seed: int = ...,
) -> Search[Array]: ...  # fmt: skip
@overload
def search(
    queries: torch.Tensor, references: Array | torch.Tensor, k: int = ..., *, leave_one_out: bool = ..., method: str = ...,
    probes: int | None = ..., sample: int = ..., seed: int = ...,
) -> Search[torch.Tensor]: ...  # fmt: skip
def search(
    queries: Array | torch.Tensor, references: Array | torch.Tensor, k: int = 1, *, leave_one_out: bool = False,
    method: str = "auto", probes: int | None = None, sample: int = SAMPLE, seed: int = 0,
) -> Search[Any]:  # fmt: skip
    """The k nearest references, exactly or through a shortlist of FAISS.

    A shortlist's candidates are ranked with the arithmetic of ``nearest``: what it finds has the right similarity, but
    it may miss a neighbour. A query whose shortlist holds fewer than k is searched exactly.

    Args:
        queries, references, k, leave_one_out: as for ``nearest``.
        method: "exact"; "faiss"; or "auto", which is FAISS above ``FAISS_ABOVE`` products (queries × references) where
            it is installed, and exact otherwise.
        probes: lists of the index that are searched per query; more find more. See ``shortlist``.
        sample: queries on which recall is measured against the exact search, drawn with ``seed``.
        seed: for the sample and for the index's training vectors.

    Raises:
        ValueError: as ``nearest``, an unknown method, or sample < 1.
        ModuleNotFoundError: method "faiss" without the package.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if sample < 1:
        raise ValueError(f"sample: recall needs at least one query, got {sample}")
    q, r, k = _checked(queries, references, k, leave_one_out)
    own = _own(q, leave_one_out)
    if method == "faiss" or (method == "auto" and len(q) * len(r) > FAISS_ABOVE and _installed()):
        best, indices = _through_shortlist(q, r, k, own, probes, seed)
        recall, sampled = _recall(q, r, own, best, sample, seed)
        return Search(*_as_given(q, best, indices), "faiss", recall, sampled)
    return Search(*_as_given(q, *_exact(q, r, k, own)), "exact", 1.0, 0)


def shortlist(
    queries: Array | torch.Tensor, references: Array | torch.Tensor, width: int, *, probes: int | None = None, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Candidates for the nearest references of each query, from FAISS: fast and near, not exact.

    An inverted file of about √n lists, its vectors rounded to 8 bits per value, so that the index of a million vectors
    of width 1024 takes 1 GB beside them.

    Args:
        queries, references: as for ``nearest``.
        width: candidates wanted per query.
        probes: lists searched per query; None: a 32nd of them, at least 16.
        seed: for drawing the training vectors.

    Returns:
        int64 indices into ``references`` of shape (n_queries, min(width, n_references)), best first, −1 where the lists
        searched held fewer.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    faiss = _faiss()
    q, r, width = _checked(queries, references, width, False)
    lists = max(1, min(round(len(r) ** 0.5), len(r) // 39))  # FAISS wants 39 training vectors per list
    index = faiss.index_factory(r.width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    training = np.random.default_rng(seed).choice(len(r), min(len(r), _TRAINING * lists), replace=False)
    index.train(_for_faiss(r, torch.from_numpy(np.sort(training))))
    for part in _parts(len(r), _CHUNK[1]):
        index.add(_for_faiss(r, part))
    index.nprobe = min(lists, max(16, lists // 32) if probes is None else probes)
    candidates = np.empty((len(q), width), np.int64)
    for part in _parts(len(q), _CHUNK[1]):
        candidates[part] = index.search(_for_faiss(q, part), width)[1]
    return candidates


# -- rows ----------------------------------------------------------------------


class _Rows:
    """The rows of an array, a memmap or a tensor, read a part at a time as float32, or float64 if they are that."""

    def __init__(self, values: Array | torch.Tensor, name: str):
        self.name, self.is_tensor = name, isinstance(values, torch.Tensor)
        self.values: Array | torch.Tensor = values.detach() if isinstance(values, torch.Tensor) else np.asarray(values)
        if self.values.ndim != 2:
            raise ValueError(f"{name}: a matrix (n, d) is needed, got shape {tuple(self.values.shape)}")
        self.width = self.values.shape[1]
        self.device = self.values.device if isinstance(self.values, torch.Tensor) else torch.device("cpu")
        double = self.values.dtype in (torch.float64, np.float64)
        self.dtype = torch.float64 if double else torch.float32

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Rows by a slice or by a tensor of indices: a view if they need no conversion and may be written to."""
        if isinstance(self.values, torch.Tensor):
            return self.values[index.to(self.device) if isinstance(index, torch.Tensor) else index].to(self.dtype)
        values = self.values[index.numpy(force=True) if isinstance(index, torch.Tensor) else index]
        kind = np.float64 if self.dtype == torch.float64 else np.float32
        return torch.from_numpy(np.require(values, kind, ["C", "W"]))

    def lengths(self, part: torch.Tensor) -> torch.Tensor:
        """The length of each row of a part.

        Raises:
            ValueError: one isn't finite.
        """
        norms = torch.linalg.vector_norm(part, dim=1)
        if not torch.isfinite(norms).all():
            raise ValueError(f"{self.name}: every value must be finite, and no row longer than its type can tell")
        return norms


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _checked(
    queries: Array | torch.Tensor, references: Array | torch.Tensor, k: int, leave_one_out: bool
) -> tuple[_Rows, _Rows, int]:
    """The rows, of one type, and how many neighbours each query has."""
    q, r = _Rows(queries, "queries"), _Rows(references, "references")
    available = len(r) - 1 if leave_one_out else len(r)
    if q.width != r.width:
        raise ValueError(f"queries of width {q.width} and references of width {r.width} can not be compared")
    if leave_one_out and len(q) != len(r):
        raise ValueError(f"leave_one_out needs one set against itself, got {len(q)} queries and {len(r)} references")
    if k < 1 or available < 1:
        raise ValueError(f"k ≥ 1 and at least one reference are needed, got k = {k} and {available} references")
    q.dtype = r.dtype = torch.promote_types(q.dtype, r.dtype)
    return q, r, min(k, available)


def _own(q: _Rows, leave_one_out: bool) -> torch.Tensor | None:
    """For each query, the reference that is the query itself."""
    return torch.arange(len(q), device=q.device) if leave_one_out else None


def _as_given(
    q: _Rows, similarities: torch.Tensor, indices: torch.Tensor
) -> tuple[Array, Array] | tuple[torch.Tensor, torch.Tensor]:
    similarities = similarities.to(q.dtype)
    return (similarities, indices) if q.is_tensor else (similarities.numpy(), indices.numpy())


# -- exact ----------------------------------------------------------------------


def _exact(
    q: _Rows, r: _Rows, k: int, own: torch.Tensor | None, chunk: Chunk | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 similarities and indices of the k best: those of each reference chunk, merged as they come."""
    best, places = _nothing_yet(q, r, k)
    chunk = chunk or (_FAISS_CHUNK if _fast(q, len(q), len(r)) else _CHUNK)
    lengths = torch.empty(len(q), dtype=q.dtype, device=q.device)
    for some in _parts(len(q), chunk[0]):
        lengths[some] = q.lengths(q[some])
    size = _filled_up(min(chunk[1], len(r))) * min(chunk[0], len(q))
    buffer = functools.cache(lambda: torch.empty(size, dtype=q.dtype, device=q.device))
    for part in _parts(len(r), chunk[1]):
        block = r[part].to(q.device)
        # A product of rows a and b is off by at most d · eps/2 · |a| |b|. Four such errors: of two products that are
        # compared, and of the same two computed again.
        slack = 2 * torch.finfo(q.dtype).eps * (q.width + 8) * lengths * r.lengths(block).max()
        for some in _parts(len(q), chunk[0]):
            rows = q[some]
            # The query's own column of the block, where it has one.
            itself = (
                None
                if own is None
                else torch.where((own[some] >= part.start) & (own[some] < part.stop), own[some] - part.start, -1)
            )
            if _fast(q, len(rows), len(block)):
                _merge_candidates(best[some], places[some], rows, block, itself, slack[some], part.start, buffer)
            else:
                _merge_block(best[some], places[some], rows, block, itself, slack[some], part.start, buffer)
    return best, places


def _fast(q: _Rows, queries: int, references: int) -> bool:
    """Whether FAISS's own exact search, the fastest on a processor, is there and worth calling for so many of each."""
    return q.device.type == "cpu" and q.dtype == torch.float32 and queries * references >= _WORTH and _installed()


def _merge_candidates(
    best: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
    block: torch.Tensor,
    itself: torch.Tensor | None,
    slack: torch.Tensor,
    offset: int,
    buffer: Callable[[], torch.Tensor],
) -> None:
    """Put what the block has into the k best so far, from the largest products that FAISS finds in single precision.

    Products that it doesn't give are at most its last one. Where that could still belong to the k, rounding considered, all
    products of the query are looked at.
    """
    k = best.shape[1]
    width = min(k + 1 + _FEW, len(block))
    products, columns = map(
        torch.from_numpy, _faiss().knn(rows.numpy(), block.numpy(), width, metric=_faiss().METRIC_INNER_PRODUCT)
    )
    beyond = products[:, -1].clone() if width < len(block) else torch.full((len(rows),), -torch.inf)
    if itself is not None:
        products[columns == itself[:, None]] = -torch.inf
    bound = best[:, -1].to(products.dtype)
    if k <= width:
        bound = torch.maximum(bound, products.topk(k, dim=1).values[:, -1])
    bound = bound - slack
    open_ones = (beyond >= bound) & (beyond > -torch.inf)
    row, place = ((products >= bound[:, None]) & (products > -torch.inf) & ~open_ones[:, None]).nonzero(as_tuple=True)
    column = columns[row, place]
    _merge(best, places, row, _again(rows, row, block, column), column + offset)
    if len(rest := open_ones.nonzero()[:, 0]):
        some = best[rest], places[rest]
        _merge_block(*some, rows[rest], block, None if itself is None else itself[rest], slack[rest], offset, buffer)
        best[rest], places[rest] = some


def _nothing_yet(q: _Rows, r: _Rows, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    best = torch.full((len(q), k), -torch.inf, dtype=torch.float64, device=q.device)
    return best, torch.full((len(q), k), len(r), dtype=torch.int64, device=q.device)


def _products(rows: torch.Tensor, block: torch.Tensor, buffer: Callable[[], torch.Tensor]) -> torch.Tensor:
    """``rows @ block.T`` in the buffer, filled up with −inf to a multiple of _GROUP columns."""
    products = buffer()[: len(rows) * _filled_up(len(block))].view(len(rows), -1)
    products[:, len(block) :] = -torch.inf
    # NumPy's OpenBLAS needs a fifth less time for it than torch's MKL on an AMD processor.
    if products.is_cpu:
        np.matmul(rows.numpy(), block.numpy().T, out=products[:, : len(block)].numpy())
    else:
        torch.mm(rows, block.T, out=products[:, : len(block)])
    return products


def _filled_up(count: int) -> int:
    return -(-count // _GROUP) * _GROUP


def _merge_block(
    best: torch.Tensor,
    places: torch.Tensor,
    rows: torch.Tensor,
    block: torch.Tensor,
    itself: torch.Tensor | None,
    slack: torch.Tensor,
    offset: int,
    buffer: Callable[[], torch.Tensor],
) -> None:
    """Put what the block has into the k best so far. Most products are never looked at: a group whose largest one stays
    below what k others surpass, by more than rounding can tell, is skipped.
    """
    k, products = best.shape[1], _products(rows, block, buffer)
    if itself is not None:
        here = (itself >= 0).nonzero()[:, 0]
        products[here, itself[here]] = -torch.inf
    groups = products.view(len(rows), _GROUP, -1)  # a group's references lie apart, as neighbours in a set are often alike
    largest = groups.amax(1)
    bound = best[:, -1].to(products.dtype)
    if k <= products.shape[1]:
        # k groups with a maximum of at least x hold k products of at least x.
        these = largest if k <= largest.shape[1] else products
        bound = torch.maximum(bound, these.topk(k, dim=1).values[:, -1])
    bound = bound - slack
    row, group = ((largest >= bound[:, None]) & (largest > -torch.inf)).nonzero(as_tuple=True)
    for part in _parts(len(row), _PRODUCTS // _GROUP):
        near = groups[row[part], :, group[part]]
        which, member = ((near >= bound[row[part], None]) & (near > -torch.inf)).nonzero(as_tuple=True)
        column = member * groups.shape[2] + group[part][which]
        which = row[part][which]
        _merge(best, places, which, _again(rows, which, block, column), column + offset)


def _again(rows: torch.Tensor, row: torch.Tensor, references: torch.Tensor | _Rows, column: torch.Tensor) -> torch.Tensor:
    """The products of pairs of rows in float64, a few at a time; equal pairs give equal products."""
    exact = torch.empty(len(row), dtype=torch.float64, device=row.device)
    width = rows.shape[1]
    # torch may share one long sum among threads, several sums it doesn't: one at a time, or never a long one alone.
    for part in _parts(len(row), _VALUES // max(1, width) if width <= 1 << 14 else 1):
        products = rows.index_select(0, row[part]).double()
        other = references[column[part]] if isinstance(references, _Rows) else references.index_select(0, column[part])
        exact[part] = products.mul_(other.to(rows.device)).sum(1)
    return exact


def _merge(
    best: torch.Tensor, places: torch.Tensor, row: torch.Tensor, similarities: torch.Tensor, indices: torch.Tensor
) -> None:
    """Put neighbours of rows into the k best of each row: descending by similarity, then ascending by index."""
    k = best.shape[1]
    touched = row.unique()
    row = torch.cat([touched.repeat_interleave(k), row])
    similarities = torch.cat([best[touched].flatten(), similarities])
    indices = torch.cat([places[touched].flatten(), indices])
    order = indices.argsort(stable=True)
    order = order[similarities[order].argsort(descending=True, stable=True)]
    order = order[row[order].argsort(stable=True)]
    first = torch.searchsorted(row[order], touched)
    kept = order[first[:, None] + torch.arange(k, device=row.device)]
    best[touched], places[touched] = similarities[kept], indices[kept]


# -- FAISS ----------------------------------------------------------------------


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        message = 'method "faiss" needs the package faiss-cpu, which is not installed (pip install faiss-cpu)'
        raise ModuleNotFoundError(message, name="faiss")
    return faiss


def _installed() -> bool:
    try:
        _faiss()
    except ModuleNotFoundError:
        return False
    return True


def _for_faiss(rows: _Rows, part: slice | torch.Tensor) -> npt.NDArray[np.float32]:
    vectors = rows[part]
    rows.lengths(vectors)
    return np.ascontiguousarray(vectors.numpy(force=True), dtype=np.float32)


def _through_shortlist(
    q: _Rows, r: _Rows, k: int, own: torch.Tensor | None, probes: int | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    best, places = _nothing_yet(q, r, k)
    width = 2 * k + _SPARE
    candidates = torch.from_numpy(shortlist(q.values, r.values, width, probes=probes, seed=seed)).to(q.device)
    for some in _parts(len(q), _CHUNK[0]):
        near, rows = candidates[some], q[some]
        kept = near >= 0
        if own is not None:
            kept &= near != own[some, None]
        row, column = kept.nonzero(as_tuple=True)
        column = near[row, column]
        _merge(best[some], places[some], row, _again(rows, row, r, column), column)
    short = (places[:, -1] == len(r)).nonzero()[:, 0]
    if len(short):
        best[short], places[short] = _exact(_some(q, short), r, k, None if own is None else own[short])
    return best, places


def _some(q: _Rows, index: torch.Tensor) -> _Rows:
    return _Rows(q[index], q.name)


def _recall(q: _Rows, r: _Rows, own: torch.Tensor | None, best: torch.Tensor, sample: int, seed: int) -> tuple[float, int]:
    """Share of the k nearest that were found, over a sample of queries. One as near as the k-th counts as found."""
    count = min(sample, len(q))
    if not count:
        return 1.0, 0
    picked = np.sort(np.random.default_rng(seed).choice(len(q), count, replace=False))
    index = torch.from_numpy(picked).to(q.device)
    exact = _exact(_some(q, index), r, best.shape[1], None if own is None else own[index])[0]
    return (best[index] >= exact[:, -1:]).double().mean().item(), count
