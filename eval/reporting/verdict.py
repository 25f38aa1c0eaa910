"""Figures → what they amount to: a model's worst case over samplers and attacks, and one sentence about it.

Memorisation is a property of the weights, so a model is judged by the worst of a named set of samplers and attacks. Looking
for the worst of m finds something by chance; the intervals that the verdict rests on therefore hold for all m at once
(Bonferroni: each at confidence 1 − (1 − c)/m).
"""

from __future__ import annotations

from eval.attacks.membership import Scores, attack_figures
from eval.reporting.references import References
from eval.reporting.shares import copied_figures
from eval.schema import (
    AttackFigures,
    EstimateFigures,
    ModelFigures,
    ModelIdentity,
    SamplerFigures,
    Verdict,
    WorstCase,
    WorstCaseRow,
)
from eval.statistics.calibrate import clopper_pearson, share_difference

CONCLUSIONS = {
    "above": "This is more than its controls reach: it reproduces training images.",
    "unclear": "This is more than its controls reach, but the intervals do not rule them out.",
    "within": "This is no more than its controls reach.",
}


def model_figures(samplers: dict[str, SamplerFigures], identity: ModelIdentity) -> ModelFigures:
    """A model's entry before it is judged: its samplers, the user's own first, and at the top what its worst one shows."""

    def badness(name: str) -> tuple[float, float]:
        figures = samplers[name]
        if figures["interval"] is None or figures["share_above_threshold"] is None:
            return figures["similarity_to_train"]["quantiles"]["0.5"], 0.0
        # By what is sure: few images, such as means of several, reach large shares by chance.
        return figures["interval"][0], figures["share_above_threshold"]

    worst = max(samplers, key=badness)
    return {
        **identity,
        "own_sampler": next(iter(samplers)),
        "worst_sampler": worst,
        "n_generated": samplers[worst]["n_generated"],
        "similarity_to_train": samplers[worst]["similarity_to_train"],
        "similarity_to_heldout": samplers[worst]["similarity_to_heldout"],
        "share_above_threshold": samplers[worst]["share_above_threshold"],
        "interval": samplers[worst]["interval"],
        "samplers": samplers,
        "attacks": None,
        "worst_case": None,
        "verdict": {"level": "unknown", "text": ""},
    }


def judge(models: dict[str, ModelFigures], scores: dict[str, dict[str, Scores]], references: References, base: str) -> None:
    """Fill in every model's ``attacks``, differences to the base model, ``worst_case`` and ``verdict``.

    Args:
        models: all of them, changed in place.
        scores: each model's of the attacks, ``{"train": …, "heldout": …}``; of a model without attacks none.
        base: the name of the base model, which is the others' control.
    """
    for name, model in models.items():
        control = models.get(base) if name != base else None
        model_scores, base_scores = scores.get(name), scores.get(base) if name != base else None
        tests = len(model["samplers"]) + (len(model_scores["train"]) if model_scores else 0)
        each = 1 - (1 - references.confidence) / tests
        model["attacks"] = _attacks(model_scores, base_scores, references.confidence)
        for sampler, figures in model["samplers"].items():
            figures["difference_to_base"] = _difference(figures, control, sampler, references.confidence)
        model["worst_case"] = None
        if references.threshold is not None:
            rows = [_sampler_row(s, f, control, references, each) for s, f in model["samplers"].items()]
            rows += [_attack_row(a, f) for a, f in (_attacks(model_scores, base_scores, each) or {}).items()]
            model["worst_case"] = {
                "confidence": references.confidence,
                "tests": tests,
                "confidence_each": each,
                "worst": max(rows, key=lambda row: (row["above"], row["low"] - row["control"]))["name"],
                "rows": rows,
            }
        model["verdict"] = verdict(model, control, references)


def _attacks(
    scores: dict[str, Scores] | None, base: dict[str, Scores] | None, confidence: float
) -> dict[str, AttackFigures] | None:
    if not scores:
        return None
    return attack_figures(scores["train"], scores["heldout"], base, confidence)


def _difference(
    figures: SamplerFigures, base: ModelFigures | None, sampler: str, confidence: float
) -> EstimateFigures | None:
    """The share above τ less the base model's with the same sampler, or with its own where that is the model's alone."""
    if base is None or figures["share_above_threshold"] is None:
        return None
    (share, count), (base_share, base_count) = _share_of(figures), _share_of(_counterpart(base, sampler))
    estimate = share_difference(share * count, count, base_share * base_count, base_count, confidence)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _share_of(figures: SamplerFigures) -> tuple[float, float]:
    """The share above the threshold and the effective images that it is of."""
    share, count = figures["share_above_threshold"], figures["effective_images"]
    assert share is not None and count is not None, "a report has them for all samplers or, without a threshold, for none"
    return share, count


def _counterpart(base: ModelFigures, sampler: str) -> SamplerFigures:
    return base["samplers"].get(sampler, base["samplers"][base["own_sampler"]])


def _sampler_row(
    name: str, figures: SamplerFigures, base: ModelFigures | None, references: References, confidence: float
) -> WorstCaseRow:
    """A sampler copies where its share is above what controls reach, whatever the threshold really lets through (which the
    copied share's interval carries), and above the base model's for certain."""
    share, count = _share_of(figures)
    low, high = clopper_pearson(share * count, count, confidence)
    copied, difference = copied_figures(share, count, references, confidence), _difference(figures, base, name, confidence)
    control = max(
        references.alpha,
        figures["share_above_threshold_as_many_heldout"] or 0.0,
        _share_of(_counterpart(base, name))[0] if base else 0.0,
    )
    return {
        "name": name,
        "kind": "sampler",
        "value": share,
        "low": low,
        "high": high,
        "control": control,
        "copied": copied,
        "difference_to_base": difference,
        "above": low > control and all(e is None or e["low"] > 0 for e in (copied, difference)),
    }


def _attack_row(name: str, figures: AttackFigures) -> WorstCaseRow:
    """An attack succeeds where it tells the sets apart for certain, and for certain better than on the base model."""
    (low, high), difference = figures["auc_interval"], figures["difference_to_base"]
    return {
        "name": name,
        "kind": "attack",
        "value": figures["auc"],
        "low": low,
        "high": high,
        "control": 0.5,
        "copied": None,
        "difference_to_base": difference,
        "above": low > 0.5 and (difference is None or difference["low"] > 0),
    }


def over_budget(model: ModelFigures, max_excess: float) -> bool:
    """Whether some sampler's copied share lies above ``max_excess`` with its whole interval, all intervals at once."""
    rows = model["worst_case"]["rows"] if model["worst_case"] else []
    return any(row["copied"] is not None and row["copied"]["low"] > max_excess for row in rows)


# -- in words ------------------------------------------------------------------------


def verdict(model: ModelFigures, base: ModelFigures | None, references: References) -> Verdict:
    """One sentence about a model, and a level: above, unclear or within its controls, or unknown without a threshold."""
    figures = model["samplers"][model["worst_sampler"]]
    worst_case = model["worst_case"]
    if references.threshold is None or worst_case is None:
        median = figures["similarity_to_train"]["quantiles"]["0.5"]
        text = f"No verdict: {references.refusal}. The median similarity to the nearest training image is {median:.3f}."
        return {"level": "unknown", "text": text}
    rows = worst_case["rows"]
    level = _level(model, rows, base, references.alpha)
    parts = [
        _worst_sampler(model, worst_case, base, references),
        _own_sampler(model),
        _attack_words(rows),
        CONCLUSIONS[level],
    ]
    if references.null_from == "base":
        parts.append(
            "The control is the base model's own images, for want of held-out ones: a fine-tuned model is nearer to its "
            "training set for style alone."
        )
    return {"level": level, "text": " ".join(part for part in parts if part)}


def _level(model: ModelFigures, rows: list[WorstCaseRow], base: ModelFigures | None, alpha: float) -> str:
    """Above: some test's simultaneous interval lies above its control. Unclear: the worst sampler reaches more than the
    controls' worst, or an attack succeeds when it is taken alone, or works better than on the base model."""
    if any(row["above"] for row in rows):
        return "above"
    own = list(model["samplers"].values())
    controls = [alpha, *(f["share_above_threshold_as_many_heldout"] or 0.0 for f in own)]
    controls += [_share_of(f)[0] for f in base["samplers"].values()] if base else []
    if max(_share_of(f)[0] for f in own) > max(controls):
        return "unclear"
    alone = [_attack_row(name, figures) for name, figures in (model["attacks"] or {}).items()]
    differs = [row["difference_to_base"] for row in rows if row["kind"] == "attack"]
    if any(row["above"] for row in alone) or any(d is not None and d["low"] > 0 for d in differs):
        return "unclear"
    return "within"


def _worst_sampler(model: ModelFigures, worst_case: WorstCase, base: ModelFigures | None, references: References) -> str:
    name = model["worst_sampler"]
    figures = model["samplers"][name]
    row = next(row for row in worst_case["rows"] if row["name"] == name)
    share, unseen = row["value"], figures["share_above_threshold_as_many_heldout"]
    against = f"{references.alpha:.1%} of images unrelated to the training set"
    if base:
        against += f" and {_share_of(_counterpart(base, name))[0]:.1%} of the base model's"
    beside = "" if unseen is None else f"; {unseen:.1%} are as near to {figures['excess_set_size']} held-out images"
    several, tests = len(model["samplers"]) > 1, worst_case["tests"]
    at_once = f" for all {tests} tests at once" if tests > 1 else ""
    text = (
        f"{figures['count_above_threshold']} of {figures['n_generated']} images ({share:.1%}, {references.confidence:.0%} "
        f"interval{at_once} {row['low']:.1%} to {row['high']:.1%}) "
        f"sampled {name!r}{', the worst sampler,' if several else ''} "
        f"are closer to a training image than the threshold, which {against} exceed{beside}."
    )
    if row["copied"]:
        text += (
            f" Corrected for false alarms and for the copies that the threshold misses, {row['copied']['value']:.1%} "
            f"({row['copied']['low']:.1%} to {row['copied']['high']:.1%}) are copies."
        )
    return text


def _own_sampler(model: ModelFigures) -> str:
    """The user's own sampler beside the worst one."""
    name = model["own_sampler"]
    if name == model["worst_sampler"]:
        return ""
    figures = model["samplers"][name]
    assert figures["interval"] is not None, "there is a threshold"
    low, high = figures["interval"]
    return f"As you sample it ({name!r}) it is {figures['share_above_threshold']:.1%} ({low:.1%} to {high:.1%})."


def _attack_words(rows: list[WorstCaseRow]) -> str:
    attacks = [row for row in rows if row["kind"] == "attack"]
    if not attacks:
        return ""
    worst = max(attacks, key=lambda row: (row["above"], row["low"]))
    auc = f"AUC {worst['value']:.2f}, {worst['low']:.2f} to {worst['high']:.2f}"
    if worst["above"]:
        return f"The attack {worst['name']!r} tells training images from held-out ones ({auc})."
    text = f"None of {len(attacks)} attacks surely tells training images from held-out ones (the best: {auc})"
    gains = [(row["name"], gain) for row in attacks if (gain := row["difference_to_base"]) is not None and gain["low"] > 0]
    if gains:
        name, gain = max(gains, key=lambda named: named[1]["low"])
        text += (
            f", but {name!r} comes nearer to it than on the base model "
            f"(AUC higher by {gain['value']:.2f}, {gain['low']:.2f} to {gain['high']:.2f})"
        )
    return f"{text}."
