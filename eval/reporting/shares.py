"""Similarities and the threshold → how many images lie above it, how sure that is, and how many of them are copies."""

from __future__ import annotations

import numpy as np

from eval import metrics
from eval.embedding import Embedded
from eval.neighbours import nearest
from eval.reporting.references import References
from eval.schema import CopiedShare, Discoveries, ExcessFigures, SeedFigures, ShareFigures
from eval.statistics.calibrate import (
    benjamini_hochberg,
    clopper_pearson,
    cluster_bootstrap,
    conformal_p_values,
    copied_share,
    effective_count,
)


def prompts_of(images: Embedded) -> np.ndarray:
    """What images have in common: their prompt, as a number (n,). An image without a prompt stands for itself."""
    numbers: dict[object, int] = {}
    keys = [record.caption or i for i, record in enumerate(images.images.records)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def share_figures(
    values: np.ndarray, references: References, clusters: np.ndarray | None = None, found: np.ndarray | None = None
) -> ShareFigures:
    """Share of similarities (n,) above τ with its interval; None where nothing is calibrated.

    Of the prompts that were drawn every image is a draw of its own, by its own noise. Of other prompts, the images of one
    prompt count for as many as they are worth.

    Args:
        clusters: (n,) prompts, as numbers. found: (n,) bool, images that are copies whatever the threshold says.
    """
    if references.threshold is None:
        return {
            "share_above_threshold": None,
            "count_above_threshold": None,
            "effective_images": None,
            "interval": None,
            "interval_other_prompts": None,
        }
    flags = values > references.threshold
    if found is not None:
        flags = flags | found
    share, count, others = float(flags.mean()), float(len(flags)), None
    if clusters is not None and len(np.unique(clusters)) > 1:
        worth = effective_count(flags, clusters)
        others = list(clopper_pearson(share * worth, worth, references.confidence))
    return {
        "share_above_threshold": share,
        "count_above_threshold": int(flags.sum()),
        "effective_images": count,
        "interval": list(clopper_pearson(share * count, count, references.confidence)),
        "interval_other_prompts": others,
    }


def share_above(values: np.ndarray | None, references: References) -> float | None:
    """The bare share above τ; None without values or threshold."""
    if values is None or references.threshold is None:
        return None
    return metrics.share_above(values, references.threshold)


def copied_figures(
    share: float | None, count: float | None, references: References, confidence: float
) -> CopiedShare | None:
    """The share of images that are copies, from the share above τ of ``count`` effective images: value, low, high.

    None where nothing is calibrated or no copy was planted.
    """
    control = references.recall_control
    if share is None or count is None or control is None or references.null is None or references.threshold is None:
        return None
    least = min(references.must_see, key=references.recall) if references.must_see else control
    estimates = []
    for name in (control, least):
        recalled = references.recalled(name)
        counts = int(recalled.sum()), len(recalled), len(references.null)
        estimates.append(copied_share(share * count, count, *counts, references.false_alarms, confidence))
    own = estimates[0]
    # Of images that are less like real ones than held-out images are, fewer exceed the threshold by chance: none, at worst.
    most = clopper_pearson(share * count, count, confidence)[1] / max(references.recall(least), 1e-9)
    return {
        "value": own.value,
        "low": own.low,
        "high": min(1.0, max(most, *(estimate.high for estimate in estimates))),
        "recall_control": control,
        "least_recall": least,
    }


def p_values(values: np.ndarray, references: References) -> np.ndarray | None:
    """Each image's conformal p-value, (n,); None where nothing is calibrated."""
    if references.threshold is None or references.null is None:
        return None
    return conformal_p_values(values, references.null)


def discovery_figures(p: np.ndarray | None, references: References) -> Discoveries | None:
    """Images that are too near to be chance, at a false discovery rate of α among those named."""
    if p is None:
        return None
    return {
        "rate": references.alpha,
        "count": int(benjamini_hochberg(p, references.alpha).sum()),
        "smallest_p": float(p.min()),
    }


def excess_figures(generated: Embedded, clusters: np.ndarray, references: References) -> ExcessFigures:
    """Excess over held-out images at equal set sizes, with its cluster bootstrap; the larger set is thinned evenly, in
    the order of its paths."""
    train, heldout, threshold = references.train, references.heldout, references.threshold
    if heldout is None or threshold is None:
        return {
            "excess_over_heldout": None,
            "excess_interval": None,
            "excess_set_size": None,
            "share_above_threshold_as_many_heldout": None,
        }
    size = min(len(train), len(heldout))
    beside_train, beside_heldout = (
        nearest(generated.embeddings, images.thinned(size).embeddings, 1)[0][:, 0] > threshold for images in (train, heldout)
    )
    differences = beside_train.astype(float) - beside_heldout
    return {
        "excess_over_heldout": float(beside_train.mean() - beside_heldout.mean()),
        "excess_interval": list(cluster_bootstrap(differences, clusters, confidence=references.confidence)),
        "excess_set_size": size,
        "share_above_threshold_as_many_heldout": float(beside_heldout.mean()),
    }


def seed_figures(to_train: np.ndarray, runs: list[int] | None, references: References) -> list[SeedFigures] | None:
    """The figures of each seed by itself, where there is more than one."""
    if runs is None or len(set(runs)) < 2:
        return None
    rows: list[SeedFigures] = []
    for seed in sorted(set(runs)):
        values = to_train[np.array(runs) == seed]
        above, median = share_above(values, references), float(np.median(values))
        rows.append({"seed": seed, "n": len(values), "share_above_threshold": above, "median": median})
    return rows
