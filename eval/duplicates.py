"""Near-duplicates within a set and across two: the same picture at another size, recompressed, or mirrored.

Two training images that are one picture make ratios of nearest distances look harmless, and a held-out image that shows a
training image raises the threshold until nothing is found. Files of equal bytes are found before
(:func:`eval.images.drop_duplicates`).

A pair is a near-duplicate where the perceptual hashes (64-bit DCT hash of the ``imagehash`` library) of the two, or of
one and the other's mirror image, differ in at most 4 bits and their 8×8 colour thumbnails in the same orientation differ
by at most .05 on average: the hash alone is blind to colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image, ImageOps

from eval.images import ImageSet
from sdxl_ambient.images import ImageError, load_rgb

BITS, COLOUR = 4, 0.05


@dataclass
class Fingerprints:
    """Of the readable images of a set: ``index`` (n,) into it; hashes (n, 2) uint64 and thumbnails (n, 2, 192) in [0, 1],
    as they stand and mirrored."""

    index: np.ndarray
    hashes: np.ndarray
    thumbnails: np.ndarray


def fingerprints(images: ImageSet, progress=None) -> Fingerprints:
    """Hash and thumbnail of every image that can be read; the others are left to the embedding stage to report."""
    index, hashes, thumbnails = [], [], []
    for i, record in enumerate(images.records):
        try:
            picture = load_rgb(record.path)
        except ImageError:
            continue
        both = (picture, ImageOps.mirror(picture))
        index.append(i)
        hashes.append([int(str(imagehash.phash(p)), 16) for p in both])
        thumbnails.append([np.asarray(p.resize((8, 8), Image.Resampling.BOX), np.float32).ravel() / 255 for p in both])
        if progress:
            progress(1)
    n = len(index)
    return Fingerprints(
        np.array(index, dtype=np.int64),
        np.array(hashes, dtype=np.uint64).reshape(n, 2),
        np.array(thumbnails, dtype=np.float32).reshape(n, 2, 192),
    )


def matches(queries: Fingerprints, references: Fingerprints, chunk: int = 1024) -> list[tuple[int, int, bool]]:
    """Near-duplicate pairs (i, j, mirrored), i an image of ``queries`` and j of ``references``, in that order.

    Memory is bounded by ``chunk`` rows of queries times the number of references.
    """
    found = set()
    for start in range(0, len(queries.index), chunk):
        rows = slice(start, start + chunk)
        for side in (0, 1):
            differing = np.bitwise_count(queries.hashes[rows, side, None] ^ references.hashes[None, :, 0])
            for a, b in zip(*np.nonzero(differing <= BITS), strict=True):
                gap = np.abs(queries.thumbnails[start + a, side] - references.thumbnails[b, 0]).mean()
                if gap <= COLOUR:
                    found.add((int(queries.index[start + a]), int(references.index[b]), bool(side)))
    return sorted(found)


def drop_near_duplicates(images: ImageSet, own: Fingerprints, others: ImageSet | None = None, theirs=None) -> ImageSet:
    """Leave out near-duplicates of an earlier image of the set, or of any of ``others``; each is listed with its twin."""
    reasons: dict[int, str] = {}

    def note(i: int, name: str, mirrored: bool) -> None:
        reasons.setdefault(i, f"near-duplicate of {name}{' (mirrored)' if mirrored else ''}")

    for i, j, mirrored in matches(own, theirs) if others is not None else []:
        note(i, f"{others.name(j)} of {others.folder}", mirrored)
    for i, j, mirrored in matches(own, own):
        if j < i and j not in reasons:
            note(i, images.name(j), mirrored)
    kept = [i for i in range(len(images)) if i not in reasons]
    return images.subset(kept, [{"file": images.name(i), "reason": reason} for i, reason in sorted(reasons.items())])
