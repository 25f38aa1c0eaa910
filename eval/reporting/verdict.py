"""Figures → what they amount to: a model's worst case over samplers and attacks, and one sentence about it.

Memorisation is a property of the weights, so a model is judged by the worst of a named set of samplers and attacks. Looking
for the worst of m finds something by chance; the intervals that the verdict rests on therefore hold for all m at once
(Bonferroni: each at confidence 1 − (1 − c)/m).
"""

from __future__ import annotations

import numpy as np

from eval.attacks.membership import Scores, attack_figures
from eval.choices import CONFIDENCE
from eval.reporting.references import LEAST_RECALL, MUST_SEE, References
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
    "above": "It reproduces training images.",
    "unclear": "Whether it reproduces training images can not be told from this.",
    "within": "No copies are found at this power.",
}
CHANGES = {
    "copy": "unchanged copies",
    "jpeg": "copies through JPEG",
    "blur": "blurred copies",
    "flip": "mirrored copies",
    "crop": "cropped copies",
    "vae": "copies through the VAE",
    "fit": "copies in the samples' shape",
    "turn": "upside down",
    "border": "with a border",
    "colour": "in other colours",
    "quarter": "pasted into a quarter",
}
NEAR_LEVEL = 0.01  # chance of so many near-duplicates from which they count as copies
MOST_IMAGES = 1_000_000  # of which it is said how many would decide


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
            rows = [sampler_row(s, f, control, references, each) for s, f in model["samplers"].items()]
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


def sampler_row(
    name: str, figures: SamplerFigures, base: ModelFigures | None, references: References, confidence: float
) -> WorstCaseRow:
    """A sampler copies where some of its images are training images by their bytes or pixels. Else where its share is above
    what unrelated images reach, whatever the threshold really lets through (which the copied share's interval carries), and
    above the base model's for certain."""
    share, count = _share_of(figures)
    low, high = clopper_pearson(share * count, count, confidence)
    copied, difference = copied_figures(share, count, references, confidence), _difference(figures, base, name, confidence)
    control = max(
        references.false_alarms,
        figures["share_above_threshold_as_many_heldout"] or 0.0,
        _share_of(_counterpart(base, name))[0] if base else 0.0,
    )
    statistical = low > control and all(e is None or e["low"] > 0 for e in (copied, difference))
    return {
        "name": name,
        "kind": "sampler",
        "value": share,
        "low": low,
        "high": high,
        "control": control,
        "copied": copied,
        "contained": figures.get("contained"),
        "difference_to_base": difference,
        "above": statistical or contains_copies(figures),
    }


def contains_copies(figures: SamplerFigures) -> bool:
    """Whether a folder holds training images by bytes or pixels, or more near-duplicates than held-out images explain."""
    contained = figures.get("contained")
    if contained is None:
        return False
    p = contained["near_duplicates_p_value"]
    return bool(contained["certain"] or (contained["near_duplicates"] and p is not None and p < NEAR_LEVEL))


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
        "contained": None,
        "difference_to_base": difference,
        "above": low > 0.5 and (difference is None or difference["low"] > 0),
    }


def over_budget(model: ModelFigures, max_excess: float) -> bool:
    """Whether some sampler's copied share lies above ``max_excess`` with its whole interval, all intervals at once."""
    return decide(model, max_excess)[0] == 1


def decide(model: ModelFigures, max_excess: float | None) -> tuple[int, str]:
    """The exit code for a model, and why, from the same figures as its verdict.

    Without a budget 0, or 3 where there is no threshold. With one: 1 where some sampler's copied share is above it for
    certain, 0 where that of every sampler is at most it for certain, and 3 where neither is shown.
    """
    if max_excess is None:
        return (0 if model["worst_case"] else 3), ""
    bounds = {name: copied_bounds(model, name) for name in model["samplers"]}
    worst = max(bounds, key=lambda name: bounds[name][0])
    if model["verdict"]["level"] == "above" and bounds[worst][0] > max_excess:
        return 1, f"over the budget of {max_excess:.1%} copies: at least {bounds[worst][0]:.1%} ({worst!r})"
    highest = max(bounds, key=lambda name: bounds[name][1])
    if bounds[highest][1] <= max_excess:
        return 0, f"within the budget of {max_excess:.1%} copies: at most {bounds[highest][1]:.1%} ({highest!r})"
    text = f"not shown to be within the budget of {max_excess:.1%} copies: up to {bounds[highest][1]:.1%} ({highest!r})"
    needed = images_needed(model, highest, max_excess)
    return 3, text + (f"; about {needed:,} images would decide it" if needed else "")


def copied_bounds(model: ModelFigures, sampler: str) -> tuple[float, float]:
    """Between which shares of a sampler's images are copies, all tests at once; 0 to 1 where nothing tells."""
    figures, contained = model["samplers"][sampler], model["samplers"][sampler].get("contained")
    rows = model["worst_case"]["rows"] if model["worst_case"] else []
    row = next((row for row in rows if row["name"] == sampler), None)
    copied = row["copied"] if row else None
    low, high = (copied["low"], copied["high"]) if copied else (0.0, 1.0)
    if contained and contained["certain"]:
        each = model["worst_case"]["confidence_each"] if model["worst_case"] else CONFIDENCE
        low = max(low, clopper_pearson(contained["certain"], figures["distinct_images"], each)[0])
    return low, high


def images_needed(model: ModelFigures, sampler: str, max_excess: float) -> int | None:
    """So many images of a sampler, of which as large a share as now lies above the threshold, would show the budget kept.

    None where no number would: the share itself is above it, or a change is found too seldom.
    """
    rows = model["worst_case"]["rows"] if model["worst_case"] else []
    row = next((row for row in rows if row["name"] == sampler), None)
    copied = row["copied"] if row else None
    if row is None or copied is None or copied["value"] >= max_excess or copied["high"] >= 1 or not max_excess:
        return None
    assert model["worst_case"] is not None
    count, each = float(model["samplers"][sampler]["distinct_images"]), model["worst_case"]["confidence_each"]
    room = max_excess * (row["high"] or 1) / copied["high"]  # of the share above the threshold, as recall scales it
    while count < MOST_IMAGES:
        if clopper_pearson(row["value"] * count, count, each)[1] <= room:
            return round(count)
        count *= 1.2
    return None


# -- in words ------------------------------------------------------------------------


def verdict(model: ModelFigures, base: ModelFigures | None, references: References) -> Verdict:
    """One sentence about a model, and a level: above, unclear or within its controls, or unknown without a threshold."""
    figures = model["samplers"][model["worst_sampler"]]
    worst_case = model["worst_case"]
    if references.threshold is None or worst_case is None:
        median = figures["similarity_to_train"]["quantiles"]["0.5"]
        text = f"No threshold: {references.refusal}. The median similarity to the nearest training image is {median:.3f}."
        copies = " ".join(filter(None, map(_contained_words, model["samplers"].items())))
        if any(map(contains_copies, model["samplers"].values())):
            return {"level": "above", "text": f"{copies} {CONCLUSIONS['above']} {text}"}
        return {"level": "unknown", "text": f"{copies} {text}".strip()}
    rows = worst_case["rows"]
    level = _level(model, rows, references)
    parts = [
        *map(_contained_words, model["samplers"].items()),
        *map(_local_words, model["samplers"].items()),
        _worst_sampler(model, worst_case, base, references),
        _own_sampler(model),
        _attack_words(rows),
        CONCLUSIONS[level],
        _blindness(references),
        _suspicion(references),
        _heldout_too(model),
    ]
    if references.null_from == "base":
        parts.append(
            "The control is the base model's own images, for want of held-out ones: a fine-tuned model is nearer to its "
            "training set for style alone."
        )
    return {"level": level, "text": " ".join(part for part in parts if part)}


def _level(model: ModelFigures, rows: list[WorstCaseRow], references: References) -> str:
    """Above: copies are contained, or some test's simultaneous interval lies above its control. Unclear: a sampler's share
    is above chance, or an attack succeeds, when it is taken alone, or an attack works better than on the base model, or
    copies that a verdict must have been able to see would not have been seen, or could hide among held-out images."""
    if any(row["above"] for row in rows):
        return "above"
    if references.blind_to or references.rests_on_suspects:
        return "unclear"
    if any(_above_alone(figures, references) for figures in model["samplers"].values()):
        return "unclear"
    alone = [_attack_row(name, figures) for name, figures in (model["attacks"] or {}).items()]
    differs = [row["difference_to_base"] for row in rows if row["kind"] == "attack"]
    if any(row["above"] for row in alone) or any(d is not None and d["low"] > 0 for d in differs):
        return "unclear"
    return "within"


def _above_alone(figures: SamplerFigures, references: References) -> bool:
    """Whether a sampler's share would be above chance if it were the only test."""
    share, count = _share_of(figures)
    copied = copied_figures(share, count, references, references.confidence)
    low = clopper_pearson(share * count, count, references.confidence)[0]
    return low > references.false_alarms and (copied is None or copied["low"] > 0)


def _contained_words(sampler: tuple[str, SamplerFigures]) -> str:
    name, figures = sampler
    contained = figures.get("contained")
    if contained is None or not (contained["certain"] or contained["near_duplicates"]):
        return ""
    first = contained["copies"][0]
    example = f"{first['file']} is {first['train']}" + ("" if first["kind"].startswith("same") else f", {first['kind']}")
    kinds = {"same_file": "training files byte for byte", "same_pixels": "training images pixel for pixel"}
    said = [f"{contained[key]} are {words}" for key, words in kinds.items() if contained[key]]
    if near := contained["near_duplicates"]:
        p = contained["near_duplicates_p_value"]
        twins = f"{contained['heldout_twins']} of {contained['n_heldout']} held-out ones"
        chance = "" if p is None else f" (as {twins} are; by chance {p:.2g})"
        said.append(f"{near} are near-duplicates of training images{chance}")
    return f"Of {figures['distinct_images']} images sampled {name!r}, {', '.join(said)}: {example}."


def _local_words(sampler: tuple[str, SamplerFigures]) -> str:
    name, figures = sampler
    local = figures.get("local_copies")
    if not local or not local["count"]:
        return ""
    first = local["copies"][0]
    heldout = f"; held-out images have at most {local['highest_of_heldout']}" if local["n_heldout"] else ""
    return (
        f"{local['count']} images sampled {name!r} show a part of a training image: {first['inliers']} keypoints of "
        f"{first['file']} are those of {first['train']}{heldout}."
    )


def _blindness(references: References) -> str:
    """What copies this audit would not have seen: of those that it must see, and of the others that were tried."""

    def named(names: list[str]) -> str:
        return ", ".join(f"{CHANGES.get(name, name)} ({references.recall(name):.0%} found)" for name in names)

    others = [n for n in references.planted if n not in MUST_SEE and references.recall(n) < LEAST_RECALL]
    said = []
    if references.blind_to:
        said.append(f"It is blind to {named(references.blind_to)}: another embedder may see them.")
    if others:
        said.append(f"Copies of other kinds would be missed: {named(others)}.")
    return " ".join(said)


def _suspicion(references: References) -> str:
    """Held-out images that look like copies of training images, on which the threshold rests."""
    suspects = references.suspects
    if not len(suspects) or references.heldout is None or references.null is None:
        return ""
    first = references.heldout.images.name(int(suspects[np.argmax(references.null[suspects])]))
    rests = "; the threshold rests on them, and copies can hide under it" if references.rests_on_suspects else ""
    return (
        f"{len(suspects)} of {len(references.null)} held-out images are as near to a training image as known copies are "
        f"(such as {first}): frames of one burst?{rests}."
    )


def _heldout_too(model: ModelFigures) -> str:
    figures = model["samplers"][model["worst_sampler"]]
    share, unseen = figures["share_above_threshold"], figures["share_above_threshold_as_many_heldout"]
    if not share or not unseen or unseen < share / 2 or unseen * figures["n_generated"] < 5:
        return ""
    return f"{unseen:.1%} of them are as near to held-out images: were those trained on, or do both sets share pictures?"


def _worst_sampler(model: ModelFigures, worst_case: WorstCase, base: ModelFigures | None, references: References) -> str:
    name = model["worst_sampler"]
    figures = model["samplers"][name]
    row = next(row for row in worst_case["rows"] if row["name"] == name)
    share, unseen = row["value"], figures["share_above_threshold_as_many_heldout"]
    against = f"{references.false_alarms:.1%} of images unrelated to the training set"
    if base:
        against += f" and {_share_of(_counterpart(base, name))[0]:.1%} of the base model's"
    beside = "" if unseen is None else f"; {unseen:.1%} are as near to {figures['excess_set_size']} held-out images"
    several, tests = len(model["samplers"]) > 1, worst_case["tests"]
    at_once = f" for all {tests} tests at once" if tests > 1 else ""
    everything, n = figures["n_generated"], figures.get("distinct_images", figures["n_generated"])
    part = " or show a part of one" if references.false_alarms > references.alpha else ""
    same = f"{everything} images are {n} different ones: the model repeats itself. " if n < everything else ""
    text = (
        f"{same}{figures['count_above_threshold']} of {n} images ({share:.1%}, {references.confidence:.0%} "
        f"interval{at_once} {row['low']:.1%} to {row['high']:.1%}) "
        f"sampled {name!r}{', the worst sampler,' if several else ''} "
        f"are closer to a training image than the threshold{part}, which {against} exceed{beside}."
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
