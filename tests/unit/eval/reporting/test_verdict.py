"""A model is judged by its worst sampler and attack, against its controls and allowing for having looked at many."""

import numpy as np

from eval.reporting.references import References
from eval.reporting.verdict import judge, model_figures, over_budget
from eval.statistics.calibrate import clopper_pearson


def entry(flags, median=0.5, unseen=0.0):
    """A sampler's figures: ``flags`` of 100 images lie above the threshold."""
    similarity = {"mean": median, "quantiles": {"0.5": median}}
    share = flags / 100
    return {
        **{"n_generated": 100, "similarity_to_train": similarity, "similarity_to_heldout": similarity},
        **{"share_above_threshold": share, "count_above_threshold": flags, "effective_images": 100.0},
        "interval": list(clopper_pearson(flags, 100)),
        "share_above_threshold_as_many_heldout": unseen,
        "excess_set_size": 100,
    }


def references(planted=None):
    """The 200 null images leave the threshold at .9."""
    null = np.linspace(0, 0.9, 200)
    return References(*[None] * 4, 0.02, 0.95, null, "heldout", 0.9, None, "pixel", planted or {})


def test_a_model_is_judged_by_its_worst_sampler_against_the_larger_control():
    cases = {
        "above": {"full": entry(20), "hybrid": entry(3)},
        "unclear": {"full": entry(3), "hybrid": entry(8)},
        "within": {"full": entry(4)},
        # No nearer to the training set than to as many images that the model never saw.
        "within ": {"full": entry(20, unseen=0.2)},
    }
    worst = {"above": "full", "unclear": "hybrid", "within": "full", "within ": "full"}
    for level, samplers in cases.items():
        models = {"base": model_figures({"full": entry(4)}, {}), "x": model_figures(samplers, {})}
        judge(models, {}, references(), "base")
        assert models["x"]["worst_sampler"] == worst[level]
        assert models["x"]["verdict"]["level"] == level.strip()


def test_the_verdict_allows_for_having_looked_at_many_samplers():
    """8 of 100 are above 2 % when they are the only test, and not when they are the worst of thirty."""
    alone, many = {"full": entry(8)}, {f"s{i}": entry(8 if i == 0 else 1) for i in range(30)}
    for samplers, level, tests in ((alone, "above", 1), (many, "unclear", 30)):
        models = {"x": model_figures(samplers, {})}
        judge(models, {}, references(), "base")
        worst = models["x"]["worst_case"]
        assert models["x"]["verdict"]["level"] == level and worst["tests"] == tests
        low, high = clopper_pearson(8, 100, 1 - 0.05 / tests)
        assert (worst["rows"][0]["low"], worst["rows"][0]["high"]) == (low, high)


def test_a_sure_excess_must_outlast_the_thresholds_own_uncertainty_and_the_base_models():
    """49 held-out images may let several per cent through: 60 of 1,500 prove nothing then, nor beside a base model alike."""

    def level(flags, nulls, base=None):
        figures = {**entry(0), "count_above_threshold": flags, "share_above_threshold": flags / 1500}
        figures |= {"n_generated": 1500, "effective_images": 1500.0}
        models = {"x": model_figures({"full": {**figures, "interval": list(clopper_pearson(flags, 1500))}}, {})}
        if base is not None:
            models["base"] = model_figures({"full": entry(base)}, {})
        made = references({"vae": np.ones(200)})
        made.null = np.linspace(0, 0.9, nulls)
        judge(models, {}, made, "base")
        row = models["x"]["worst_case"]["rows"][0]
        return row["low"] > 0.02, models["x"]["verdict"]["level"]

    assert level(60, 49) == (True, "unclear")
    assert level(60, 5000) == (True, "above")
    assert level(60, 5000, base=1) == (True, "unclear")
    assert level(300, 5000, base=1) == (True, "above")


def test_an_attack_alone_condemns_a_model_and_not_one_that_the_base_model_fails_too():
    good, chance = np.arange(60) + 100.0, np.arange(60.0)
    asked = {"train": {"mask": good}, "heldout": {"mask": chance}}
    naive = {"train": {"mask": chance}, "heldout": {"mask": chance + 0.5}}
    for base, level in ((naive, "above"), (asked, "within")):
        models = {name: model_figures({"full": entry(2)}, {}) for name in ("base", "x")}
        judge(models, {"base": base, "x": asked}, references(), "base")
        assert models["x"]["verdict"]["level"] == level
        row = models["x"]["worst_case"]["rows"][-1]
        assert (row["name"], row["value"], row["above"]) == ("mask", 1.0, level == "above")
    assert models["base"]["verdict"]["level"] == "above"  # without a control of its own


def test_the_users_own_sampler_stands_beside_the_worst():
    models = {"x": model_figures({"hybrid": entry(3), "full": entry(40)}, {})}
    judge(models, {}, references(), "base")
    assert models["x"]["own_sampler"] == "hybrid" and models["x"]["worst_sampler"] == "full"
    assert "As you sample it ('hybrid') it is 3.0%" in models["x"]["verdict"]["text"]


def test_a_budget_is_exceeded_only_by_what_is_sure_of_all_samplers_at_once():
    planted = {"jpeg": np.ones(100)}
    models = {"x": model_figures({"full": entry(20)}, {})}
    judge(models, {}, references(planted), "base")
    (row,) = models["x"]["worst_case"]["rows"]
    assert row["copied"]["low"] < 0.184 < row["copied"]["high"]  # (.2 - .02) / (1 - .02)
    assert over_budget(models["x"], 0.05) and not over_budget(models["x"], 0.18)
