"""Which generated images show a part of a training picture, and how many keypoints unrelated pictures have in common.

Everything that is looked for goes through the training pictures in one pass. What was found of an image is kept by its hash;
keypoints, from which a picture could be told, are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from eval import keypoints
from eval.images import ImageSet
from eval.keypoints import Match, best_matches, limit_of
from eval.schema import LocalCopy, LocalFigures
from eval.stored import read_object
from sdxl_ambient.errors import StageError
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.provenance import hash_json, write_sealed

BLOCK = 8192  # images whose keypoints are held at once: 0.2 MB each
LISTED = 24  # copies that a report lists of a folder
_METHOD = ("MOST", "LONGEST", "SHORTEST", "CONTRAST", "RATIO", "TOLERANCE", "CANDIDATES", "SHARD")


@dataclass
class Parts:
    """What was found.

    Attributes:
        matches: by the hash of an image's file; images that needn't be looked at are left out.
        null: inliers (n,) of held-out images, unrelated to the training set; empty without any.
        planted: by what was done to planted copies, the rows that were looked at and their inliers.
        missing: the packages for want of which nothing was looked for; None where it was.
    """

    train: ImageSet
    matches: dict[str, Match] = field(default_factory=dict)
    null: list[int] = field(default_factory=list)
    planted: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    missing: str | None = None

    @property
    def limit(self) -> int:
        """More inliers than this are a copy."""
        return limit_of(self.null)

    @property
    def false_alarms(self) -> float:
        """With what probability an unrelated image has more, at most; 0 where nothing was looked for."""
        return 0.0 if self.missing or not self.null else 1 / (len(self.null) + 1)

    def flags(self, images: ImageSet) -> np.ndarray:
        """Which images (n,) show a part of a training picture."""
        return np.array([digest in self.matches and self.matches[digest].inliers > self.limit for digest in images.hashes])

    def copies(self, images: ImageSet) -> list[LocalCopy]:
        """Those images, the surest first."""
        rows = sorted(np.flatnonzero(self.flags(images)), key=lambda i: -self.matches[images.hashes[i]].inliers)
        return [self._as(images.name(int(i)), self.matches[images.hashes[i]]) for i in rows]

    def _as(self, name: str, match: Match) -> LocalCopy:
        return {
            "file": name,
            "train": self.train.name(match.index),
            "inliers": match.inliers,
            "mirrored": match.mirrored,
            "region": [round(v, 4) for v in match.region],
            "train_region": [round(v, 4) for v in match.train_region],
        }

    def figures(self, images: ImageSet) -> LocalFigures | None:
        """The report's section on a folder; None where nothing was looked for."""
        if self.missing:
            return None
        copies = self.copies(images)
        return {
            "looked_at": sum(digest in self.matches for digest in images.hashes),
            "limit": self.limit,
            "highest_of_heldout": max(self.null, default=None),
            "n_heldout": len(self.null),
            "count": len(copies),
            "copies": copies[:LISTED],
        }


@dataclass
class Looked:
    """Images to look at: a name of each that lasts, and how to open it."""

    keys: list[str] = field(default_factory=list)
    loads: list[Callable[[], Image.Image]] = field(default_factory=list)

    def add(self, key: str, load: Callable[[], Image.Image]) -> None:
        """One more, once."""
        if key not in self.keys_seen:
            self.keys_seen.add(key)
            self.keys.append(key)
            self.loads.append(load)

    def add_set(self, images: ImageSet, rows: np.ndarray | None = None) -> None:
        """A set's images, or those of some rows."""
        for i in range(len(images)) if rows is None else rows:
            self.add(images.hashes[i], lambda path=images.records[i].path: load_rgb(path))

    def __post_init__(self) -> None:
        self.keys_seen: set[str] = set(self.keys)


def look(looked: Looked, train: ImageSet, path: Path) -> dict[str, Match]:
    """The best match of each image by its key, from ``path`` where an earlier run left it there."""
    method = {name: getattr(keypoints, name) for name in _METHOD}
    settings = {"method": hash_json(method), "train": hash_json(train.hashes)}
    found = _stored(path, settings)
    new = [i for i, key in enumerate(looked.keys) if key not in found]
    for start in range(0, len(new), BLOCK):
        block = new[start : start + BLOCK]
        shards = -(-len(train) // keypoints.SHARD)
        total = len(block) * (1 + shards) + len(train)
        with tqdm(total=total, unit="picture", desc="look for parts", delay=2) as bar:
            matches = best_matches(
                len(block),
                lambda i, block=block: looked.loads[block[i]](),
                len(train),
                lambda j: load_rgb(train.records[j].path),
                bar.update,
            )
        found |= {looked.keys[i]: match for i, match in zip(block, matches, strict=True)}
        write_sealed(path, {"settings": settings, "matches": {key: asdict(match) for key, match in found.items()}})
    return found


def _stored(path: Path, settings: dict) -> dict[str, Match]:
    if not path.exists():
        return {}
    try:
        stored = read_object(path, ["settings", "matches"], "it is computed anew")
        if stored["settings"] != settings:
            return {}
        return {key: Match(**{**row, **_regions(row)}) for key, row in stored["matches"].items()}
    except (StageError, TypeError, KeyError, AttributeError) as error:
        tqdm.write(f"passed over: {error}")
        return {}


def _regions(row: dict) -> dict:
    return {name: tuple(map(float, row[name])) for name in ("region", "train_region")}
