"""Embeddings → nearest reference images: exact, in bounded memory, the same answer whatever the chunk sizes."""

from __future__ import annotations

import numpy as np
import torch

# Candidates kept beyond k, so that the float64 ranking below decides and not the rounding of one matrix product.
_MARGIN = 8
# Two float32 cosines closer than this are ranked again; rounding of a product of unit vectors stays well below it.
_ROUNDING = 1e-5


def nearest(queries, references, k: int = 1, *, leave_one_out: bool = False, chunk: tuple[int, int] = (1024, 16384)):
    """The k references with the largest inner product to each query, found exactly.

    Products of a chunk of queries with a chunk of references give candidates; those are computed again in float64,
    so that equal images have equal similarities wherever they stand, and ties go to the lowest index. Memory is
    bounded by the chunk sizes, not by the number of rows.

    Args:
        queries: array or tensor of shape (n_queries, d), usually L2-normalised, so that the product is the cosine.
        references: array or tensor of shape (n_references, d), on the same device.
        k: neighbours wanted. With fewer references, all of them come back: the result's width is min(k, available).
        leave_one_out: queries and references are the same set; row i is not its own neighbour.
        chunk: rows of queries and of references handled at once.

    Returns:
        similarities of shape (n_queries, min(k, available)) in descending order and in the inputs' type (float32 or
        float64), and int64 indices into ``references`` of the same shape; tensors if queries were one, else arrays.

    Raises:
        ValueError: shapes that don't fit, values that aren't finite, nothing to search in, or k < 1.
    """
    as_tensor = isinstance(queries, torch.Tensor)
    q, r = _matrix(queries, "queries"), _matrix(references, "references")
    available = len(r) - 1 if leave_one_out else len(r)
    if q.shape[1] != r.shape[1]:
        raise ValueError(f"queries of width {q.shape[1]} and references of width {r.shape[1]} can not be compared")
    if leave_one_out and len(q) != len(r):
        raise ValueError(f"leave_one_out needs one set against itself, got {len(q)} queries and {len(r)} references")
    if k < 1 or available < 1:
        raise ValueError(f"k ≥ 1 and at least one reference are needed, got k = {k} and {available} references")
    k = min(k, available)
    rows = [_nearest_rows(q, r, k, start, chunk, leave_one_out) for start in range(0, len(q), chunk[0])]
    similarities = torch.cat([s for s, _ in rows]) if rows else q.new_zeros(0, k)
    indices = torch.cat([i for _, i in rows]) if rows else torch.zeros(0, k, dtype=torch.int64)
    return (similarities, indices) if as_tensor else (similarities.numpy(), indices.numpy())


def _matrix(values, name: str) -> torch.Tensor:
    matrix = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if matrix.ndim != 2:
        raise ValueError(f"{name}: a matrix (n, d) is needed, got shape {tuple(matrix.shape)}")
    matrix = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    # The sum is finite exactly when nothing is NaN or infinite, embeddings being of moderate size; no mask is
    # allocated.
    if not torch.isfinite(matrix.sum()):
        raise ValueError(f"{name}: every value must be finite")
    return matrix.detach()


def _nearest_rows(q, r, k: int, start: int, chunk: tuple[int, int], leave_one_out: bool):
    """Neighbours of the queries start … start + chunk[0]: the best of each reference chunk, merged as they come."""
    rows = q[start : start + chunk[0]]
    best = rows.new_zeros(len(rows), 0, dtype=torch.float64)
    found = torch.zeros(len(rows), 0, dtype=torch.int64, device=rows.device)
    for offset in range(0, len(r), chunk[1]):
        block = r[offset : offset + chunk[1]]
        products = rows @ block.T
        if leave_one_out:
            own = torch.arange(start, start + len(rows), device=rows.device)
            here = (own >= offset) & (own < offset + len(block))
            products[here.nonzero()[:, 0], own[here] - offset] = -torch.inf
        similarities, indices = _best_of_block(rows, block, products, k)
        best, found = _ranked(torch.cat([best, similarities], 1), torch.cat([found, indices + offset], 1), k)
    return best.to(q.dtype), found


def _best_of_block(rows, block, products, k: int):
    """Exactly the k best of one block, as float64 similarities (−inf where a row has fewer) and indices into the
    block.
    """
    width = min(k + _MARGIN, len(block))
    values, candidates = products.topk(width, dim=1)
    k = min(k, len(block))
    similarities, indices = _ranked(*_again(rows, block, values, candidates), k)
    if width < len(block):
        # So many near-equal candidates that the margin may have cut one off: rank every near-equal one, row by row.
        for row in (values[:, -1] >= values[:, k - 1] - _ROUNDING).nonzero()[:, 0].tolist():
            near = (products[row] >= values[row, k - 1] - _ROUNDING).nonzero()[:, 0][None]
            one = _again(rows[row : row + 1], block, products[row][near], near)
            similarities[row], indices[row] = (x[0] for x in _ranked(*one, k))
    return similarities, indices


def _again(rows, block, values, candidates):
    """The candidates' products in float64, a few rows at a time; a banned one (−inf) stays banned."""
    exact = torch.empty(candidates.shape, dtype=torch.float64, device=rows.device)
    step = max(1, (1 << 22) // max(1, candidates.shape[1] * rows.shape[1]))
    for i in range(0, len(rows), step):
        one = rows[i : i + step, None].double() * block[candidates[i : i + step]].double()
        exact[i : i + step] = one.sum(-1)
    return exact.masked_fill_(values == -torch.inf, -torch.inf), candidates


def _ranked(similarities, indices, k: int):
    """The k first by descending similarity, then ascending index."""
    order = indices.argsort(dim=1, stable=True)
    similarities, indices = similarities.gather(1, order), indices.gather(1, order)
    order = similarities.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarities.gather(1, order), indices.gather(1, order)
