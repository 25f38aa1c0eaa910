"""Scores of the attacks → how well training images can be told from held-out ones."""

from __future__ import annotations

import numpy as np

from eval import metrics
from eval.schema import AttackFigures, EstimateFigures, GapFigures
from eval.statistics import roc

SETS = ("train", "heldout")
Scores = dict[str, np.ndarray]


def attack_figures(
    train: Scores, heldout: Scores, base: dict[str, Scores] | None = None, confidence: float = 0.95
) -> dict[str, AttackFigures]:
    """How well training images can be told from held-out ones by each score, by name.

    ``n_train``, ``n_heldout``, ``mean_train`` and ``mean_heldout``; ``auc`` with ``auc_interval`` [low, high]
    (:func:`eval.statistics.roc.auc_interval`) and ``tpr_at_1_fpr``; ``difference_to_base`` {value, low, high}, this AUC
    minus the base model's (:func:`eval.statistics.roc.auc_difference`), None without ``base``; for errors also ``gap`` and
    ``gap_standard_error`` (:func:`eval.metrics.denoising_gap`), None for a set of one image. For errors a lower one speaks
    for membership; for all else a higher one does.

    Args:
        train, heldout: arrays (m,) and (n,) by name. What is not in both is left out.
        base: the base model's scores of the same images, ``{"train": …, "heldout": …}`` as :func:`eval.attacks.run.attack`
            gives them.

    Raises:
        ValueError: scores that are empty, not finite, or not those of the base model's images in number.
    """
    return {name: _figures(name, train[name], heldout[name], base, confidence) for name in train if name in heldout}


def _figures(
    name: str, train: np.ndarray, heldout: np.ndarray, base: dict[str, Scores] | None, confidence: float
) -> AttackFigures:
    error = name.startswith("error/")
    sign = -1.0 if error else 1.0
    one, other = sign * np.asarray(train, np.float64), sign * np.asarray(heldout, np.float64)
    auc, *interval = roc.auc_interval(one, other, confidence)
    difference: EstimateFigures | None = None
    if base and all(name in base[key] for key in SETS):
        base_train, base_heldout = (sign * np.asarray(base[key][name], np.float64) for key in SETS)
        value, low, high = roc.auc_difference(one, other, base_train, base_heldout, confidence)
        difference = {"value": value, "low": low, "high": high}
    gap: GapFigures = _gap(train, heldout) if error else {}
    return {
        "n_train": len(one),
        "n_heldout": len(other),
        "mean_train": float(np.mean(train)),
        "mean_heldout": float(np.mean(heldout)),
        "auc": auc,
        "auc_interval": interval,
        "tpr_at_1_fpr": metrics.tpr_at_fpr(one, other, 0.01),
        "difference_to_base": difference,
        **gap,
    }


def _gap(train: np.ndarray, heldout: np.ndarray) -> GapFigures:
    if min(len(train), len(heldout)) < 2:
        return {"gap": None, "gap_standard_error": None}
    (gap,), (error,) = metrics.denoising_gap(np.asarray(train)[:, None], np.asarray(heldout)[:, None])
    return {"gap": float(gap), "gap_standard_error": float(error)}
