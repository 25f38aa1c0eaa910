"""Scores of the attacks → figures: both directions, the base model on the same images, and sets that are too small."""

import json

import numpy as np
import pytest

from eval.attacks.membership import attack_figures
from eval.metrics import denoising_gap
from eval.statistics.roc import auc_difference, auc_interval


def test_members_are_told_by_low_errors_and_high_similarities():
    low, high = np.array([0.1, 0.2]), np.array([0.3, 0.4])
    figures = attack_figures({"error/500": low, "one_step/500": low}, {"error/500": high, "one_step/500": high})
    assert figures["error/500"]["auc"] == 1 and figures["one_step/500"]["auc"] == 0
    assert figures["error/500"]["mean_train"] == pytest.approx(0.15) and figures["error/500"]["tpr_at_1_fpr"] == 1
    assert figures["error/500"]["difference_to_base"] is None and "gap" not in figures["one_step/500"]


def test_figures_compare_with_the_base_model_on_the_same_images():
    rng = np.random.default_rng(0)
    sets = {key: {"error/500": rng.random(9), "mask": rng.random(9)} for key in ("train", "heldout")}
    base = {key: {name: values + 0.1 * rng.random(9) for name, values in one.items()} for key, one in sets.items()}
    figures = attack_figures(sets["train"], sets["heldout"], base, confidence=0.8)
    for name, sign in (("error/500", -1), ("mask", 1)):
        four = [sign * model[key][name] for model in (sets, base) for key in ("train", "heldout")]
        assert list(figures[name]["difference_to_base"].values()) == list(auc_difference(*four, 0.8))
        assert (figures[name]["auc"], *figures[name]["auc_interval"]) == auc_interval(*four[:2], 0.8)
    gap, error = denoising_gap(*(sets[key]["error/500"][:, None] for key in ("train", "heldout")))
    assert (figures["error/500"]["gap"], figures["error/500"]["gap_standard_error"]) == (gap[0], error[0])
    json.dumps(figures, allow_nan=False)
    del base["train"]["mask"]  # the base model was not asked
    assert attack_figures(sets["train"], sets["heldout"], base)["mask"]["difference_to_base"] is None
    # One image, or an attack that only one set answered.
    figures = attack_figures({"error/1": np.ones(1), "magnitude": np.ones(2)}, {"error/1": np.zeros(3)})
    assert list(figures) == ["error/1"] and figures["error/1"]["gap"] is None
    json.dumps(figures, allow_nan=False)
