"""Looking for copies of a part: what unrelated and planted pictures reach, and the images themselves, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from eval.controls import TRANSFORMS
from eval.images import ImageSet
from eval.keypoints import available
from eval.parts import Looked, Parts, look
from eval.reporting.references import References
from sdxl_ambient.images.load import load_rgb

PLANTED = 48  # planted copies of each kind that are looked at
ENOUGH = 0.95  # recall by similarity from which they needn't be


def look_for_parts(references: References, images: Sequence[ImageSet], rows: Sequence[np.ndarray], path: Path) -> Parts:
    """What is found; nothing, with the reason, where a package is missing.

    Args:
        images: the generated images by folder. rows: of each folder, those that are to be looked at. path: where what was
            found is kept.
    """
    train = references.known.images if references.known else references.train.images
    parts = Parts(train, missing=available())
    if parts.missing:
        return parts
    looked = Looked()
    for folder, some in zip(images, rows, strict=True):
        looked.add_set(folder, some)
    if references.heldout:
        looked.add_set(references.heldout.images)
    planted = _planted(references, looked)
    found = look(looked, train, path)
    parts.matches = {digest: found[digest] for folder in images for digest in folder.hashes if digest in found}
    if references.heldout:
        parts.null = [found[digest].inliers for digest in references.heldout.images.hashes]
    parts.planted = {
        name: (chosen, np.array([found[key].inliers if key in found else 0 for key in keys]))
        for name, (chosen, keys) in planted.items()
    }
    return parts


def _planted(references: References, looked: Looked) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Planted copies that similarity finds too few of: rows among the planted, and keys of what is looked at."""
    planted: dict[str, tuple[np.ndarray, list[str]]] = {}
    train, threshold = references.train.images, references.threshold
    for name, values in references.planted.items():
        if threshold is None or name not in TRANSFORMS or (values > threshold).mean() >= ENOUGH:
            continue
        chosen = np.arange(min(len(values), PLANTED)) * len(values) // min(len(values), PLANTED)
        sources = chosen * len(train) // len(values)  # as the plants were taken
        keys = [f"{name} {train.hashes[i]}" for i in sources]
        for i, row, key in zip(sources, chosen, keys, strict=True):
            if values[row] <= threshold:
                looked.add(key, lambda path=train.records[i].path, name=name: _changed(path, name))
        planted[name] = chosen, keys
    return planted


def _changed(path: Path, name: str) -> Image.Image:
    return TRANSFORMS[name](load_rgb(path))
