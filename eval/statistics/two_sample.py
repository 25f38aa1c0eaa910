"""Do two samples of vectors come from one law? A permutation test, exact at its level."""

from __future__ import annotations

import numpy as np

from eval.statistics.scipy_functions import euclidean_distances

MOST = 500  # vectors of each sample
PERMUTATIONS = 999


def thinned(vectors: np.ndarray, most: int = MOST) -> np.ndarray:
    """At most ``most`` of the rows (n, d), evenly."""
    return vectors if len(vectors) <= most else vectors[np.arange(most) * len(vectors) // most]


def energy_distance(first: np.ndarray, second: np.ndarray) -> float:
    """2 E|X − Y| − E|X − X′| − E|Y − Y′| of the samples (n, d) and (m, d), all pairs counted.

    Székely and Rizzo 2013, *Journal of Statistical Planning and Inference* 143. It is never below 0, and 0 where the samples
    are equal.
    """
    labels = np.concatenate([np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))])
    return float(_statistics(euclidean_distances(np.concatenate([first, second])), labels[None])[0])


def energy_p_value(first: np.ndarray, second: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 0) -> float:
    """The chance that samples of one law are at least as far apart in energy distance as these.

    The p-value of a permutation test, (1 + #{permuted ≥ observed}) / (1 + permutations): where both samples are of one law
    it is at most α with probability at most α, for every number of vectors and every α (Phipson and Smyth 2010, section 4).

    Args:
        first, second: (n, d) and (m, d), of which at most MOST are taken, evenly.
        permutations: how many are drawn, from ``seed``.

    Raises:
        ValueError: an empty sample.
    """
    if not len(first) or not len(second):
        raise ValueError("a two-sample test needs vectors in both samples")
    first, second = thinned(first), thinned(second)
    labels = np.concatenate([np.full(len(first), 1 / len(first)), np.full(len(second), -1 / len(second))])
    generator = np.random.default_rng(seed)
    permuted = generator.permuted(np.tile(labels, (permutations, 1)), axis=1)
    values = _statistics(euclidean_distances(np.concatenate([first, second])), np.concatenate([labels[None], permuted]))
    # Equal arrangements can differ by rounding: a tie counts against a difference.
    reached = np.sum(values[1:] >= values[0] - 1e-12 * max(1.0, abs(values[0])))
    return float((1 + reached) / (1 + permutations))


def _statistics(distances: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """−wᵀDw of each row w (k, n): with 1/n for one sample and −1/m for the other it is their energy distance."""
    return -np.einsum("kn,kn->k", weights @ distances, weights)
