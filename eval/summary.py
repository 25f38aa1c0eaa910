"""Embeddings → the figures of report.json: per sampler, per model, and the controls they are read against."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

from eval import metrics
from eval.calibrate import (
    InsufficientData,
    benjamini_hochberg,
    clopper_pearson,
    conformal_p_values,
    copied_share,
    effective_count,
    smallest_null,
    threshold,
)
from eval.embed import Embedded
from eval.neighbours import nearest, search

NEIGHBOURS = 50  # k of the ℓ2 ratio, Carlini et al. 2023
QUALITY_MOST = 5000  # images of a set that quality is measured on; more are thinned evenly


@dataclass
class References:
    """The sets that generated images are compared with, and the threshold that the held-out set gives.

    Attributes:
        train, heldout: in the report's embedder; train_pooled and heldout_pooled: the same images as pooled pixels.
        heldout_to_train: each held-out image's similarity to its nearest training image, shape (n_H,): the null.
        threshold: τ_α, or None with ``refusal`` saying why.
        embedder: its name.
        planted: similarities of known copies by what was done to them; ``recall_control`` names those whose recall the
            copied share is corrected by.
    """

    train: Embedded
    heldout: Embedded
    train_pooled: Embedded
    heldout_pooled: Embedded
    alpha: float
    confidence: float
    heldout_to_train: np.ndarray
    threshold: float | None
    refusal: str | None
    embedder: str = "pixel"
    planted: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def recall_control(self) -> str | None:
        """The control that is most like what a generated copy went through: the model's VAE, else JPEG."""
        return next((name for name in ("vae", "jpeg") if name in self.planted), None)


def make_references(
    train, heldout, train_pooled, heldout_pooled, alpha: float, confidence: float, embedder: str, planted: dict
) -> References:
    """Compare the held-out with the training set and calibrate, or note why that is refused."""
    null = nearest(heldout.embeddings, train.embeddings, 1)[0][:, 0]
    value, refusal = None, None
    try:
        value = threshold(null, alpha)
    except InsufficientData as error:
        refusal = str(error)
    sets = (train, heldout, train_pooled, heldout_pooled)
    return References(*sets, alpha, confidence, null, value, refusal, embedder, planted)


def _similarities(values: np.ndarray) -> dict:
    return {"mean": float(np.mean(values)), "quantiles": metrics.nn_quantiles(values)}


def _share(values: np.ndarray, references: References) -> dict:
    """Share above τ with its interval; None where nothing is calibrated."""
    if references.threshold is None:
        return {"share_above_threshold": None, "count_above_threshold": None, "interval": None}
    count = int(np.sum(values > references.threshold))
    return {
        "share_above_threshold": count / len(values),
        "count_above_threshold": count,
        "interval": list(clopper_pearson(count, len(values), references.confidence)),
    }


def _copied(values: np.ndarray, prompts: list, references: References) -> dict | None:
    """The share of images that are copies, corrected for recall and false alarms, with its interval.

    Images of one prompt count for as many as they are worth. None where nothing is calibrated or no copy was planted.
    """
    name = references.recall_control
    if references.threshold is None or name is None:
        return None
    flags = values > references.threshold
    # Without prompts every image stands for itself.
    count = effective_count(flags, np.array([p or "" for p in prompts])) if any(prompts) else len(flags)
    recalled = references.planted[name] > references.threshold
    found = copied_share(
        float(flags.mean() * count),
        count,
        int(recalled.sum()),
        len(recalled),
        len(references.heldout_to_train),
        references.alpha,
        references.confidence,
    )
    return {**asdict(found), "recall_control": name, "effective_images": count}


def _discoveries(values: np.ndarray, references: References) -> dict | None:
    """Images that are too near to be chance, at a false discovery rate of α among those named."""
    if references.threshold is None:
        return None
    p = conformal_p_values(values, references.heldout_to_train)
    chosen = benjamini_hochberg(p, references.alpha)
    return {"rate": references.alpha, "count": int(chosen.sum()), "smallest_p": float(p.min())}


def _planted_figures(references: References) -> dict:
    """Per kind of known copy: its similarities to the training set, and how many the threshold finds."""
    return {
        name: {"n": len(values), "similarity_to_train": _similarities(values), **_share(values, references)}
        for name, values in references.planted.items()
    }


def control_figures(references: References) -> dict:
    """What the real images do among themselves: held-out → training (the null), training → training, and their FD."""
    train, null = references.train.embeddings, references.heldout_to_train
    own = nearest(train, train, 1, leave_one_out=True)[0][:, 0] if len(train) > 1 else None
    return {
        "heldout_to_train": {
            "n": len(null),
            "similarity_to_train": _similarities(null),
            **_share(null, references),
            "similarities": _rounded(np.sort(null)),
        },
        "train_to_train": None
        if own is None
        else {"n": len(own), "similarity_to_train": _similarities(own), **_share(own, references)},
        "planted": _planted_figures(references),
        "fd_pixels": _frechet(references.train_pooled, references.heldout_pooled),
        "fd_embedding": _frechet(references.train, references.heldout),
    }


def threshold_figures(references: References) -> dict:
    return {
        "value": references.threshold,
        "alpha": references.alpha,
        "confidence": references.confidence,
        "n_heldout": len(references.heldout),
        "n_heldout_needed": smallest_null(references.alpha),
        "refusal": references.refusal,
    }


def sampler_figures(generated: Embedded, pooled: Embedded, references: References) -> dict:
    """Everything measured on one folder of generated images; the schema is in docs/EVALUATION.md."""
    embeddings = generated.embeddings
    found = search(embeddings, references.train.embeddings, NEIGHBOURS)
    to_train, neighbours = found.similarities, found.indices
    to_heldout = nearest(embeddings, references.heldout.embeddings, 1)[0][:, 0]
    ratios = metrics.l2_ratio(metrics.distance_of(to_train))
    legacy = metrics.LEGACY_THRESHOLDS.get(references.embedder, (0.9, 0.95))
    above_heldout = None
    if references.threshold is not None:
        above_heldout = metrics.share_above(to_heldout, references.threshold)
    return {
        "n_generated": len(generated),
        "search": {"method": found.method, "recall": found.recall, "recall_measured_on": found.sampled},
        "similarity_to_train": _similarities(to_train[:, 0]),
        "similarity_to_heldout": _similarities(to_heldout),
        **_share(to_train[:, 0], references),
        "share_above_threshold_heldout": above_heldout,
        **_excess(embeddings, references),
        "copied_share": _copied(to_train[:, 0], [r.caption for r in generated.images.records], references),
        "discoveries": _discoveries(to_train[:, 0], references),
        "legacy_shares": metrics.legacy_shares(to_train[:, 0], legacy),
        "authpct": metrics.authpct(embeddings, references.train.embeddings) if len(references.train) > 1 else None,
        "c_t": _c_t(embeddings, references),
        "mann_whitney_z": metrics.mann_whitney_z(to_train[:, 0], references.heldout_to_train),
        "l2_ratio": {"k": to_train.shape[1], "alpha": 0.5, "quantiles": metrics.nn_quantiles(ratios)},
        "d1_over_d2": _d1_over_d2(to_train),
        "fd_pixels": _frechet(pooled, references.heldout_pooled),
        "fd_embedding": _frechet(generated, references.heldout),
        **_quality(generated, references.heldout),
        "excluded": generated.images.excluded,
        "images": _images(generated, references.train, to_train[:, 0], neighbours[:, 0], to_heldout, ratios),
    }


def _d1_over_d2(to_train: np.ndarray) -> dict | None:
    if to_train.shape[1] < 2:
        return None
    values = metrics.d1_over_d2(metrics.distance_of(to_train))
    return {"quantiles": metrics.nn_quantiles(values), "share_below_third": float(np.mean(values < 1 / 3))}


def _excess(embeddings: np.ndarray, references: References) -> dict:
    """Excess over held-out images at equal set sizes; the larger set is thinned evenly, in the order of its paths."""
    train, heldout = references.train.embeddings, references.heldout.embeddings
    size = min(len(train), len(heldout))
    if references.threshold is None:
        return {"excess_over_heldout": None, "excess_set_size": size, "share_above_threshold_as_many_heldout": None}
    thinned = [r[np.arange(size) * len(r) // size] for r in (train, heldout)]
    to_train, to_heldout = (nearest(embeddings, r, 1)[0][:, 0] for r in thinned)
    return {
        "excess_over_heldout": metrics.excess(to_train, to_heldout, references.threshold),
        "excess_set_size": size,
        "share_above_threshold_as_many_heldout": metrics.share_above(to_heldout, references.threshold),
    }


def _frechet(one: Embedded, other: Embedded) -> float | None:
    if len(one) < 2 or len(other) < 2:
        return None
    return metrics.frechet_distance(one.features, other.features)


def _c_t(embeddings: np.ndarray, references: References) -> dict | None:
    """C_T over as many cells as leave about 60 generated images to each; None below 20 images, where it is not defined."""
    cells = max(1, min(10, len(embeddings) // 60, len(references.train) // 2))
    try:
        value = metrics.c_t(embeddings, references.heldout.embeddings, references.train.embeddings, cells=cells)
    except ValueError:
        return None
    return {"value": value, "cells": cells}


def _quality(generated: Embedded, heldout: Embedded) -> dict:
    """KID, PRDC (k = 5) against H and the Vendi score, in the embedder; None where there are too few images for one."""
    one, other = (e.features[np.arange(n := min(len(e), QUALITY_MOST)) * len(e) // n] for e in (generated, heldout))
    enough, some = min(len(one), len(other)), np.linalg.norm(one, axis=1) > 0
    return {
        "kid": metrics.kid(one, other) if enough > 1 else None,
        "prdc": metrics.prdc(other, one) if enough > 5 else None,
        "vendi": metrics.vendi_score(one[some]) if some.any() else None,
        "quality_images": [len(one), len(other)],
    }


def _rounded(values) -> list[float]:
    return [round(float(v), 6) for v in values]


def _images(generated: Embedded, train: Embedded, to_train, neighbours, to_heldout, ratios) -> list[dict]:
    """One entry per image, in the order of the files."""
    rows = []
    for i in range(len(generated)):
        j = int(neighbours[i])
        rows.append(
            {
                "file": generated.images.name(i),
                "prompt": generated.images.records[i].caption,
                "similarity_to_train": round(float(to_train[i]), 6),
                "nearest_train": train.images.name(j),
                "nearest_train_caption": train.images.records[j].caption,
                "similarity_to_heldout": round(float(to_heldout[i]), 6),
                "l2_ratio": round(float(ratios[i]), 6),
            }
        )
    return rows


def model_figures(samplers: dict[str, dict], about: dict) -> dict:
    """A model's entry: its samplers, and at the top what its worst one shows (memorisation is a property of the weights)."""

    def badness(name: str) -> tuple[float, float]:
        share = samplers[name]["share_above_threshold"]
        return (-1.0 if share is None else share, samplers[name]["similarity_to_train"]["quantiles"]["0.5"])

    worst = max(samplers, key=badness)
    keys = ("n_generated", "similarity_to_train", "similarity_to_heldout", "share_above_threshold", "interval")
    return {**about, "worst_sampler": worst, **{k: samplers[worst][k] for k in keys}, "samplers": samplers}


def over_budget(model: dict, max_excess: float) -> bool:
    """Whether some sampler's copied share lies above ``max_excess`` with its whole interval."""
    shares = [s["copied_share"] for s in model["samplers"].values()]
    return any(share is not None and share["low"] > max_excess for share in shares)


def verdict(name: str, model: dict, threshold: dict, base: dict | None) -> dict:
    """One sentence about a model, and a level: above, unclear or within its controls, or unknown without a threshold.

    The controls are the false-alarm rate α, the share of the same images that are as near to one of as many held-out images,
    which the model never saw, and, for a fine-tuned model, the base model's share.
    """
    figures = model["samplers"][model["worst_sampler"]]
    if threshold["value"] is None:
        median = figures["similarity_to_train"]["quantiles"]["0.5"]
        text = f"No verdict: {threshold['refusal']}. The median similarity to the nearest training image is {median:.3f}."
        return {"level": "unknown", "text": text}
    alpha, share, (low, high) = threshold["alpha"], figures["share_above_threshold"], figures["interval"]
    unseen = figures["share_above_threshold_as_many_heldout"]
    control = max(alpha, unseen, base["share_above_threshold"] if base else 0.0)
    level = "above" if low > control else ("unclear" if share > control else "within")
    says = {
        "above": "This is more than its controls reach: it reproduces training images.",
        "unclear": "This is more than its controls reach, but the interval does not rule them out.",
        "within": "This is no more than its controls reach.",
    }[level]
    against = f"{alpha:.1%} of images unrelated to the training set"
    if base:
        against += f" and {base['share_above_threshold']:.1%} of the base model's"
    several, copied = len(model["samplers"]) > 1, figures.get("copied_share")
    estimate = ""
    if copied:
        estimate = (
            f" Corrected for false alarms and for the copies that the threshold misses, {copied['value']:.1%} "
            f"({copied['low']:.1%} to {copied['high']:.1%}) are copies."
        )
    text = (
        f"{figures['count_above_threshold']} of {figures['n_generated']} images ({share:.1%}, {threshold['confidence']:.0%} "
        f"interval {low:.1%} to {high:.1%}) sampled {model['worst_sampler']!r}{', the worst sampler,' if several else ''} "
        f"are closer to a training image than the threshold, which {against} exceed; {unseen:.1%} are as near to as many "
        f"held-out images.{estimate} {says}"
    )
    return {"level": level, "text": text}
