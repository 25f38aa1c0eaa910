"""Nearest neighbours: the exact search against FAISS's flat index, and memory at a million references.

    python -m benchmarks.neighbours [--quick] [--large] --json benchmarks/results/neighbours.json

Random unit vectors: 5,000 queries, 100,000 references, width 1024. The exact search and IndexFlatIP, which is exact up to
rounding, take turns on the same cores in one process, and the median counts; the flat index is built beforehand and that
isn't counted. Both must find the same: similarities equal within 1e-6, so that an index differs only where rounding can't
tell two references apart. Memory is the growth of a process's peak resident size, each search in a process of its own; for
FAISS it holds the index's copy of the references.

``--large`` searches a million references of width 1024 in a file of float32, exactly and through FAISS's shortlist, for
queries of which half are disturbed copies. Vectors come from clusters there, without which no shortlist finds anything.
Peak memory is that of the whole process: libraries, what is mapped of the file, index and results.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.measuring import in_a_process, peak_of
from benchmarks.record import target, write_record
from eval.neighbours import nearest, search

K = 10
WIDTH = 1024
SAME = 1e-6
PART = 1 << 14  # rows generated at once


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def random_units(count: int, width: int, seed: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32))


# -- the exact search and the flat index ----------------------------------------------------------------------


def flat_index(references: np.ndarray) -> faiss.IndexFlatIP:
    index = faiss.IndexFlatIP(references.shape[1])
    index.add(references)
    return index


def taking_turns(queries: np.ndarray, references: np.ndarray, rounds: int) -> dict:
    start = time.perf_counter()
    index = flat_index(references)
    figures: dict[str, Any] = {"faiss_flat_build_seconds": time.perf_counter() - start}
    searches = {"exact": lambda: nearest(queries, references, K), "faiss_flat": lambda: index.search(queries, K)}
    seconds, found = {name: [] for name in searches}, {}
    for i in range(rounds + 1):  # the first warms up
        for name, run in searches.items():
            start = time.perf_counter()
            found[name] = run()
            if i:
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        figures[name] = {"seconds": statistics.median(values), "fastest": min(values), "slowest": max(values)}
    (similarities, indices), (others, other_indices) = found["exact"], found["faiss_flat"]
    apart = float(abs(similarities - others).max())
    if apart > SAME:
        raise RuntimeError(f"the exact search and FAISS's flat index differ by {apart:.2g} in a similarity")
    different = int((indices != other_indices).sum())
    return {**figures, "largest_difference": apart, "indices": indices.size, "indices_that_differ": different}


# -- memory ----------------------------------------------------------------------


def growth(name: str, n_queries: int, n_references: int, width: int) -> int:
    queries, references = random_units(n_queries, width, 0), random_units(n_references, width, 1)
    searches = {
        "exact": lambda: nearest(queries, references, K),
        "faiss_flat": lambda: flat_index(references).search(queries, K),
    }
    return peak_of(searches[name])[0]


# -- a million ----------------------------------------------------------------------


class Clusters:
    """Unit vectors around ``count`` random directions, each at a distance of its own."""

    def __init__(self, count: int, width: int):
        self.directions = random_units(count, width, 2)

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        width = self.directions.shape[1]
        size = generator.uniform(0.5, 1.5, (count, 1)).astype(np.float32) / width**0.5
        which = generator.integers(len(self.directions), size=count)
        return unit(self.directions[which] + size * generator.standard_normal((count, width), dtype=np.float32))


def write_large(folder: Path, n_queries: int, n_references: int, width: int) -> float:
    """Write references.npy, part by part, and queries.npy; return the seconds it took."""
    start = time.perf_counter()
    clusters, generator = Clusters(n_references // 50, width), np.random.default_rng(3)
    shape = (n_references, width)
    references = np.lib.format.open_memmap(folder / "references.npy", mode="w+", dtype=np.float32, shape=shape)
    for i in range(0, n_references, PART):
        part = references[i : i + PART]
        part[:] = clusters.draw(len(part), generator)
    half = n_queries // 2
    copied = references[np.sort(generator.choice(n_references, half, replace=False))]
    disturbed = unit(copied + 0.5 / width**0.5 * generator.standard_normal(copied.shape, dtype=np.float32))
    np.save(folder / "queries.npy", np.concatenate([disturbed, clusters.draw(n_queries - half, generator)]))
    return time.perf_counter() - start


def search_large(folder: Path, method: str) -> dict:
    references, queries = np.load(folder / "references.npy", mmap_mode="r"), np.load(folder / "queries.npy")
    start = time.perf_counter()
    grown, peak, found = peak_of(lambda: search(queries, references, K, method=method))
    figures = {"seconds": time.perf_counter() - start, "growth_gib": grown / 2**30, "peak_gib": peak / 2**30}
    if method == "faiss":
        figures.update(recall=found.recall, recall_queries=found.sampled)
    return figures


def large_search(n_queries: int, n_references: int, width: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        seconds = in_a_process(write_large, Path(folder), n_queries, n_references, width)
        figures = {name: in_a_process(search_large, Path(folder), name) for name in ("exact", "faiss")}
    sizes = {"queries": n_queries, "references": n_references, "width": width, "file_gib": 4 * n_references * width / 2**30}
    return {**sizes, "generating_seconds": seconds, **figures}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rows, an eighth of the width")
    parser.add_argument("--large", action="store_true", help="also a million references: 4 GB on disk, some minutes")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    fewer, width = (20, WIDTH // 8) if args.quick else (1, WIDTH)
    n_queries, n_references = 5_000 // fewer, 100_000 // fewer
    figures: dict[str, Any] = {"queries": n_queries, "references": n_references, "width": width, "k": K}
    figures |= taking_turns(random_units(n_queries, width, 0), random_units(n_references, width, 1), args.rounds)
    for name in ("exact", "faiss_flat"):
        figures[name]["growth_bytes"] = in_a_process(growth, name, n_queries, n_references, width)
    print(figures, flush=True)
    ratio = figures["exact"]["seconds"] / figures["faiss_flat"]["seconds"]
    targets = [target("exact_over_faiss_flat", ratio, "<=", 1.1)]
    if args.large:
        figures["large"] = large_search(2_000 // fewer, 1_000_000 // fewer, width)
        print(figures["large"], flush=True)
        peak = max(figures["large"][name]["peak_gib"] for name in ("exact", "faiss"))
        targets += [] if args.quick else [target("peak_gib_1m", peak, "<=", 6)]
    write_record(args.json, "neighbours", figures, targets, started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
