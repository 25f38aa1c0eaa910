"""Intervals over seeds.

Over seeds: the mean with Student's t interval, whose scatter holds training, noise draw and sampling; for shares the wider
of that and Newcombe's interval of the pooled counts, which does not collapse where all seeds agree. With three seeds the t
interval is 2.5 standard deviations to either side: wide, and honest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from eval.statistics.calibrate import Estimate, share_difference

CONFIDENCE = 0.95


def over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of one value per seed with Student's t interval; of a single one, without end."""
    found = np.asarray(values, np.float64)
    if len(found) < 2:
        return Estimate(float(found[0]), -math.inf, math.inf)
    half = stats.t.ppf((1 + confidence) / 2, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found))
    return Estimate(float(found.mean()), float(found.mean() - half), float(found.mean() + half))


def within(estimate: Estimate, least: float, most: float) -> Estimate:
    """An interval cut to the values that there are; one without an end stays so."""
    low, high = (e if math.isinf(e) else min(max(e, least), most) for e in (estimate.low, estimate.high))
    return Estimate(estimate.value, low, high)


def plain(estimate: Estimate) -> dict:
    """For JSON, which has no infinity: None where an interval has no end."""
    ends = {name: end if math.isfinite(end) else None for name, end in (("low", estimate.low), ("high", estimate.high))}
    return {"value": estimate.value, **ends}


def excess_over_seeds(one_per_seed: Sequence[dict], confidence: float = CONFIDENCE) -> Estimate:
    """Mean excess of one sampler's figures per seed; the wider of the two intervals of the module's head."""
    excess = [f["excess_over_heldout"] for f in one_per_seed]
    found, total = over_seeds(excess, confidence), sum(f["n_generated"] for f in one_per_seed)
    beside_train = sum(f["share_above_threshold"] * f["n_generated"] for f in one_per_seed)
    beside_heldout = max(0.0, beside_train - sum(e * f["n_generated"] for e, f in zip(excess, one_per_seed, strict=True)))
    pooled = share_difference(beside_train, total, beside_heldout, total, confidence)
    if math.isinf(found.low):
        return Estimate(found.value, pooled.low, pooled.high)
    return Estimate(found.value, min(found.low, pooled.low), max(found.high, pooled.high))


def contrast(one: dict, other: dict, key: str, factor: float, margin: float = 0.0) -> Estimate:
    """value(one) − factor · value(other) − margin, paired by seed, with its t interval over the seeds that both have."""
    values = [dict(zip(row["seeds"], row[key], strict=True)) for row in (one, other)]
    common = sorted(values[0].keys() & values[1].keys())
    return over_seeds([values[0][s] - factor * values[1][s] - margin for s in common])


def judged(estimate: Estimate) -> str:
    """A claim that something is below zero."""
    if estimate.high < 0:
        return "confirmed"
    return "not confirmed" if estimate.low > 0 else "not decidable at this size"


def judged_all(estimates: Sequence[Estimate]) -> str:
    """A claim that all of them are below zero."""
    verdicts = [judged(e) for e in estimates]
    if "not confirmed" in verdicts:
        return "not confirmed"
    return "confirmed" if set(verdicts) == {"confirmed"} else "not decidable at this size"
