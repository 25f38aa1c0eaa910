"""From which level on untrusted pictures can't be told from trusted ones: folds, calibration, and the rule itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import binomtest
from tqdm import tqdm

from sdxl_ambient.annotate.classifier import Training, calibrate, judge, stream, train_classifier
from sdxl_ambient.annotate.options import CONFIDENCE, SETS
from sdxl_ambient.annotate.sets import ImageSet
from sdxl_ambient.annotate.settings import AnnotateSettings
from sdxl_ambient.devices import resolve_device
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import versions
from sdxl_ambient.store.scan import Scanned


def usable_from(levels: Sequence[int], probabilities: Sequence[float], margin: float, chance: float = 0.5) -> int | None:
    """t_n = min {ℓ : p(ℓ′) ≥ chance − margin for every tested ℓ′ ≥ ℓ}; None where the highest level fails.

    ``levels`` ascend; ``probabilities`` are of being a trusted image, the mean over noises at each level. One-sided: an
    image that looks more trusted than chance is usable. arXiv 2506.10038 takes the first ℓ with p > ½ − ε, its threshold
    being .45; here all levels above must agree, as all of them will be trained on.
    """
    usable = None
    for level, probability in zip(reversed(levels), reversed(probabilities), strict=True):
        if not probability >= chance - margin:
            break
        usable = level
    return usable


def fold_of(count: int, folds: int) -> np.ndarray:
    """The fold of each of a set's pictures, (count,): in turn, in the order of their hashes; all are equally full."""
    return np.arange(count) % folds


def cross_fit(
    settings: AnnotateSettings, schedule: NoiseSchedule, x_0: dict[str, torch.Tensor], contents: dict[str, list[str]]
) -> dict[str, np.ndarray]:
    """Logits of "trusted" (n, levels, noises) of both sets, every image's by a classifier that was not trained on it."""
    networks, folds = [], {name: fold_of(len(x), settings.folds) for name, x in x_0.items()}
    levels, seed = settings.levels, settings.seed
    training = Training(levels[0], levels[-1], settings.train_steps, settings.batch_size, settings.learning_rate)
    total = settings.folds * settings.train_steps
    with tqdm(total=total, desc="training classifiers", unit="step", mininterval=1) as bar:
        for fold in range(settings.folds):
            trusted, untrusted = (x_0[name][torch.from_numpy(folds[name] != fold)] for name in SETS)
            generator, device = stream(seed, "training", fold), resolve_device(settings.device)

            def advance(bar=bar) -> None:
                bar.update()

            networks.append(train_classifier(trusted, untrusted, schedule, training, generator, device, advance))
    logits = {name: np.empty((len(x), len(levels), settings.num_noises)) for name, x in x_0.items()}
    for name in SETS:
        for i, content in enumerate(tqdm(contents[name], desc=f"judging {name} images", unit="img", mininterval=1)):
            noises = [stream(seed, "judging", content, t) for t in levels]
            network = networks[folds[name][i]]
            logits[name][i] = judge(network, x_0[name][i], levels, noises, settings.num_noises)
    return logits


def calibrated(logits: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[tuple[float, float]]]:
    """Mean probabilities of "trusted" per image and level (n, levels) of both sets, and each level's slope and shift."""
    scales = [calibrate(logits["trusted"][:, k], logits["untrusted"][:, k]) for k in range(logits["trusted"].shape[1])]
    a, b = (np.array(values)[None, :, None] for values in zip(*scales, strict=True))
    return {name: expit(a * x + b).mean(2) for name, x in logits.items()}, scales


def accuracy(logits: dict[str, np.ndarray], k: int) -> dict:
    """How many held-out images the classifiers put into the right set at level ``k``, as they are, uncalibrated.

    Each set has its Clopper–Pearson interval (95 %). ``accuracy`` is the mean of both sets' shares, whatever their sizes,
    and its interval the mean of their 97.5 % intervals, which holds at 95 % by the union bound.
    """
    sides, both = {}, []
    for name in SETS:
        p = expit(logits[name][:, k]).mean(1)
        right, total = int(((p > 0.5) == (name == "trusted")).sum()), len(p)
        test = binomtest(right, total)
        interval = list(test.proportion_ci(CONFIDENCE, method="exact"))
        sides[name] = {"right": right, "of": total, "interval": interval}
        both.append((right / total, *test.proportion_ci((1 + CONFIDENCE) / 2, method="exact")))
    mean, low, high = np.mean(both, axis=0).tolist()
    return {"accuracy": mean, "interval": [low, high], **sides}


def warnings_of(levels: Sequence[int], accuracies: Sequence[dict]) -> list[str]:
    """What speaks against using the result."""
    warnings = []
    lowest, highest = ({"t": t, **a} for t, a in ((levels[0], accuracies[0]), (levels[-1], accuracies[-1])))
    if lowest["interval"][0] <= 0.5:
        warnings.append(
            f"the sets can't be told apart even at t = {lowest['t']} (accuracy {_percent(lowest)}): either untrusted "
            "images are as good as trusted ones, or these are too few to see the difference, or --train_steps are"
        )
    if highest["interval"][0] > 0.5:
        warnings.append(
            f"the sets can still be told apart at the highest level, t = {highest['t']} (accuracy {_percent(highest)}): "
            "they differ in more than noise hides, such as colour or subject"
        )
    return warnings


def _percent(accuracy: dict) -> str:
    low, high = accuracy["interval"]
    return f"{accuracy['accuracy']:.0%}, interval {low:.0%} to {high:.0%}"


def describe(
    settings: AnnotateSettings, sets: Sequence[ImageSet], logits: dict[str, np.ndarray], inputs: dict[str, str]
) -> dict:
    """annotations.json."""
    probabilities, scales = calibrated(logits)
    accuracies = [accuracy(logits, k) for k in range(len(settings.levels))]
    levels = {}
    for k, t in enumerate(settings.levels):
        means = {name: float(probabilities[name][:, k].mean()) for name in SETS}
        slope, shift = scales[k]
        levels[str(t)] = {**accuracies[k], "mean_probability": means, "calibration": {"slope": slope, "shift": shift}}
    images = [
        {
            "set": one.name,
            **_judged(settings, one.name, picture, probabilities[one.name][one.contents.index(picture.content)]),
        }
        for one in sets
        for picture in one.pictures
    ]
    left_out = [i for i in images if not i["used"]]
    return {
        "program": "sdxl_ambient.annotate",
        "note": "t_n is about quality, not about privacy: the links lead to clean images, and t_n -1 stores them clean.",
        "settings": asdict(settings),
        "inputs": inputs,
        "versions": versions(),
        "counts": {
            **{one.name: len(one.pictures) for one in sets},
            "used": len(images) - len(left_out),
            "not_usable": len(left_out),
            "skipped": sum(len(one.skipped) for one in sets),
        },
        "warnings": warnings_of(settings.levels, accuracies),
        "levels": levels,
        "images": images,
        "skipped": [{"set": one.name, **entry} for one in sets for entry in one.skipped],
    }


def _judged(settings: AnnotateSettings, name: str, picture: Scanned, probabilities: np.ndarray) -> dict:
    """An image's entry: its level, and whether it is used."""
    values = [round(float(p), 6) for p in probabilities]
    if name == "trusted":
        t_n, used = CLEAN if settings.trusted_t_n is None else settings.trusted_t_n, True
    else:
        t_n = usable_from(settings.levels, values, settings.margin)
        used = t_n is not None and t_n <= settings.max_t_n
    captions = list(picture.record.captions)
    return {
        "file": f"{name}/{picture.record.name}",
        "content": picture.content,
        "t_n": t_n,
        "used": used,
        "text": captions[0] if len(captions) == 1 else captions,
        "probabilities": values,
    }
