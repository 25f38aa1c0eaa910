"""A model is judged by its worst sampler and attack, against its controls and allowing for having looked at many."""

import re

import numpy as np

from eval.reporting.references import References
from eval.reporting.verdict import copied_bounds, decide, judge, model_figures, over_budget
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
        # No nearer to the training set than to as many images that the model never saw, and far beyond chance.
        "unclear ": {"full": entry(20, unseen=0.2)},
    }
    worst = {"above": "full", "unclear": "hybrid", "within": "full", "unclear ": "full"}
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

    assert level(60, 49) == (True, "within")
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


def contained(certain=0, near=0, p=None):
    found = [{"file": "g.png", "train": "t.png", "kind": "same file" if certain else "near-duplicate"}]
    section = {"same_file": certain, "same_pixels": 0, "near_duplicates": near, "heldout_twins": 0, "n_heldout": 50}
    return {**section, "near_duplicates_p_value": p, "certain": certain, "copies": found}


def judged(figures, made=None):
    models = {"x": model_figures({"full": {"distinct_images": 100, **figures}}, {})}
    judge(models, {}, made or references({"jpeg": np.ones(100)}), "base")
    return models["x"]


def test_one_training_file_among_the_images_is_a_copy_whatever_the_share():
    model = judged({**entry(1), "contained": contained(certain=1)})
    assert model["verdict"]["level"] == "above"
    assert "1 are training files byte for byte: g.png is t.png" in model["verdict"]["text"]
    assert decide(model, 0.0)[0] == 1  # at least one copy is more than none
    assert decide(model, 0.05)[0] == 3  # which 100 images can't show to be no more than five per cent


def test_near_duplicates_are_copies_beyond_what_held_out_images_reach():
    assert judged({**entry(0), "contained": contained(near=2, p=0.3)})["verdict"]["level"] == "within"
    assert judged({**entry(0), "contained": contained(near=9, p=1e-4)})["verdict"]["level"] == "above"
    assert judged({**entry(0), "contained": contained(near=9, p=None)})["verdict"]["level"] == "within"


def test_without_a_threshold_files_still_tell():
    made = references()
    made.threshold, made.refusal = None, "12 held-out images are too few"
    model = judged({**entry(0), "contained": contained(certain=3)}, made)
    assert model["verdict"]["level"] == "above" and "12 held-out images are too few" in model["verdict"]["text"]
    assert decide(model, 0.0)[0] == 1 and decide(model, None)[0] == 3
    assert judged(entry(0), made)["verdict"]["level"] == "unknown"


def test_a_model_is_not_cleared_by_an_audit_that_is_blind():
    """Mirrored copies are on the list of what must be seen; of them this threshold finds half."""
    blind = references({"jpeg": np.ones(100), "flip": np.linspace(0.8, 1.0, 100)})
    model = judged(entry(0), blind)
    assert model["verdict"]["level"] == "unclear" and "blind to mirrored copies (50% found)" in model["verdict"]["text"]
    seeing = judged(entry(0))
    assert seeing["verdict"]["level"] == "within"
    # The share may be twice as high where half of the copies go unseen.
    blind_high, high = (m["worst_case"]["rows"][0]["copied"]["high"] for m in (model, seeing))
    assert blind_high > 1.7 * high


def test_a_budget_is_shown_to_be_kept_or_not_and_says_what_would_show_it():
    few, many = judged(entry(0)), judged({**entry(0), "distinct_images": 5000, "effective_images": 5000.0})
    code, text = decide(few, 0.02)
    needed = int(re.search(r"about ([\d,]+) images would decide it", text)[1].replace(",", ""))
    assert code == 3 and 150 < needed < 400  # 0 of n is at most .02 from 183 images on
    assert decide(many, 0.02)[0] == 0 and decide(many, None) == (0, "")
    assert decide(judged(entry(60)), 0.02)[0] == 1


def test_verdict_and_exit_code_never_contradict_each_other():
    made = [references({"jpeg": np.ones(100)}), references({"jpeg": np.ones(100), "flip": np.zeros(100)})]
    for flags in (0, 1, 5, 20, 100):
        for section in (None, contained(certain=1), contained(near=5, p=1e-5), contained(near=5, p=0.5)):
            for budget in (0.0, 0.05, 0.5):
                for one in made:
                    model = judged({**entry(flags), "contained": section}, one)
                    code, _ = decide(model, budget)
                    assert code != 1 or model["verdict"]["level"] == "above"
                    low, high = copied_bounds(model, "full")
                    assert code != 0 or high <= budget
                    assert code != 1 or low > budget


def test_a_threshold_that_rests_on_frames_of_one_burst_clears_nothing():
    """A tenth of the held-out images are as near to training images as JPEG copies are; what hides below is unknown."""
    made = references({"jpeg": np.linspace(0.95, 1.0, 100)})
    made.null = np.concatenate([np.linspace(0, 0.6, 180), np.full(20, 0.99)])
    made.threshold = 0.9
    assert made.rests_on_suspects and len(made.suspects) == 20
    assert judged(entry(0), made)["verdict"]["level"] == "unclear"
    made.null = np.concatenate([np.linspace(0, 0.6, 199), [0.99]])
    assert not made.rests_on_suspects and len(made.suspects) == 1
    assert judged(entry(0), made)["verdict"]["level"] == "within"
