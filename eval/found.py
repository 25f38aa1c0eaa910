"""Copies that need no threshold: generated images that are a training file, its pixels, or the same picture by fingerprint.

The first two are copies whatever else is drawn. Fingerprints may agree by chance, in sets of pictures that are much alike;
so many of them are copies as lie beyond what held-out pictures of the same source reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from eval.images import ImageSet
from eval.schema import Contained, FoundCopy
from sdxl_ambient.images.duplicates import Fingerprints, matching
from sdxl_ambient.images.load import load_rgb

FILE, PIXELS, NEAR, MIRRORED = "same file", "same pixels", "near-duplicate", "near-duplicate, mirrored"
CERTAIN = (FILE, PIXELS)
LISTED = 24  # copies that a report lists of a folder


@dataclass
class KnownPictures:
    """The training pictures, none left out, with their fingerprints; and how many held-out ones show one of them.

    Attributes:
        files: the training set as it was listed, pictures that can't be opened too.
        images, prints: its usable images, and their fingerprints in the same order.
        twins, heldout: held-out images that are near-duplicates of a training image, and held-out images; 0 without.
    """

    files: ImageSet
    images: ImageSet
    prints: Fingerprints
    twins: int = 0
    heldout: int = 0

    def find(self, generated: ImageSet, prints: Fingerprints) -> dict[str, FoundCopy]:
        """What each generated image is a copy of, by its name; images that aren't are left out.

        ``prints``: of the images, in order.
        """
        by_file = {digest: self.files.name(i) for i, digest in enumerate(self.files.hashes)}
        found: dict[str, FoundCopy] = {}
        for i, digest in enumerate(generated.hashes):
            if digest in by_file:
                found[generated.name(i)] = {"file": generated.name(i), "train": by_file[digest], "kind": FILE}
        for i, columns, mirrored in matching(prints, self.prints):
            if generated.name(i) not in found:
                found[generated.name(i)] = self._as(generated, i, columns, mirrored)
        return dict(sorted(found.items()))

    def _as(self, generated: ImageSet, i: int, columns: np.ndarray, mirrored: np.ndarray) -> FoundCopy:
        pixels = _pixels(generated.records[i].path)
        for j in columns[~mirrored]:
            if _pixels(self.images.records[j].path) == pixels:
                return {"file": generated.name(i), "train": self.images.name(int(j)), "kind": PIXELS}
        first = int(np.argmin(mirrored))  # one that isn't mirrored, if any
        kind = MIRRORED if mirrored[first] else NEAR
        return {"file": generated.name(i), "train": self.images.name(int(columns[first])), "kind": kind}


def _pixels(path: Path) -> tuple[tuple[int, int], bytes]:
    image = load_rgb(path)
    return image.size, image.tobytes()


def contained(found: list[FoundCopy], n: int, known: KnownPictures) -> Contained:
    """The report's section on the copies found among n distinct images."""
    kinds = [one["kind"] for one in found]
    certain = sum(kind in CERTAIN for kind in kinds)
    return {
        "same_file": kinds.count(FILE),
        "same_pixels": kinds.count(PIXELS),
        "near_duplicates": kinds.count(NEAR) + kinds.count(MIRRORED),
        "heldout_twins": known.twins,
        "n_heldout": known.heldout,
        "near_duplicates_p_value": chance(len(kinds), n, known.twins, known.heldout),
        "certain": certain,
        "copies": found[:LISTED],
    }


def chance(near: int, n: int, twins: int, heldout: int) -> float | None:
    """Fisher's exact test, one-sided: so many of n generated images beside ``twins`` of ``heldout``; None without those.

    The hypergeometric tail P(X ≥ near) where near + twins of n + heldout images are twins (Fisher 1935).
    """
    if not heldout or not n:
        return None
    table = [[near, n - near], [twins, heldout - twins]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)  # pyright: ignore[reportAttributeAccessIssue]
