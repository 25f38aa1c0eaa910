"""Copies of a part: keypoints that one homography carries from a generated image to a training picture.

SIFT keypoints (Lowe 2004) are matched by the ratio test, and a homography is fitted to them robustly (MAGSAC++, Barath and
others 2020). How many agree with it, the inliers, tells a pasted, turned, cropped or halved picture from an unrelated one.
Pictures to compare with come from an index of all training keypoints, a shard of them at a time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count

import numpy as np
from PIL import Image, ImageOps

MOST = 800  # keypoints of a picture
LONGEST, SHORTEST = 512, 256  # pixels of the longer side: larger pictures are reduced, smaller ones enlarged
CONTRAST = 0.01  # least of a keypoint, of what lies around it
RATIO = 0.75  # of the distances to the nearest and the second nearest keypoint
TOLERANCE = 3.0  # pixels
CANDIDATES = 5  # training pictures of a shard that an image is compared with
SHARD = 4096  # training pictures whose keypoints are held at once: 0.1 MB each, and as much for the index
FLOOR = 20  # inliers that unrelated photographs hardly reach
_LEAST, _SPAN = 4, 16.0  # points of a homography; how many times an area may grow or shrink

Load = Callable[[int], Image.Image]


def available() -> str | None:
    """None where keypoints can be looked for, else which package is missing."""
    missing = [name for name, module in (("opencv-python-headless", "cv2"), ("faiss-cpu", "faiss")) if not _there(module)]
    return " and ".join(missing) or None


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@dataclass
class Keypoints:
    """Of one picture: places (n, 2) float32, from 0 to 1 of each side; descriptors (n, 128) uint8; size in pixels."""

    points: np.ndarray
    descriptors: np.ndarray
    size: tuple[int, int]


@dataclass
class Match:
    """The training picture that most keypoints of an image agree on.

    Attributes:
        inliers: how many agree; 0 where none does. index: of the training picture.
        region, train_region: the box around them in either picture: left, top, right, bottom, from 0 to 1.
    """

    inliers: int = 0
    index: int = -1
    mirrored: bool = False
    region: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)
    train_region: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)


def detect(image: Image.Image) -> Keypoints:
    """The strongest :data:`MOST` SIFT keypoints of a picture, none for one without texture."""
    import cv2  # an extra

    scale = min(LONGEST / max(image.size), 1.0) if max(image.size) >= SHORTEST else SHORTEST / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BICUBIC))
    sift = cv2.SIFT_create(nfeatures=MOST, contrastThreshold=CONTRAST)  # pyright: ignore[reportAttributeAccessIssue]
    keypoints, descriptors = sift.detectAndCompute(grey, None)
    if descriptors is None or not len(keypoints):
        return Keypoints(np.empty((0, 2), np.float32), np.empty((0, 128), np.uint8), size)
    points = np.array([k.pt for k in keypoints], np.float32)[:MOST] / np.array(size, np.float32)
    return Keypoints(points, descriptors[:MOST].astype(np.uint8), size)


def verify(one: Keypoints, other: Keypoints) -> Match:
    """How many keypoints of ``one`` a homography carries to ``other``, and the boxes around them."""
    import cv2  # an extra

    a, b = _matches(one, other)
    if len(a) < _LEAST:
        return Match()
    a, b = (points * np.array(of.size, np.float32) for points, of in ((a, one), (b, other)))
    cv2.setRNGSeed(0)
    homography, inside = cv2.findHomography(a, b, cv2.USAC_MAGSAC, TOLERANCE, maxIters=2000, confidence=0.995)
    if homography is None or not _sane(homography, one.size, a, inside):
        return Match()
    kept = inside.ravel().astype(bool)
    return Match(int(kept.sum()), region=_box(a[kept], one.size), train_region=_box(b[kept], other.size))


def _matches(one: Keypoints, other: Keypoints) -> tuple[np.ndarray, np.ndarray]:
    """Places of keypoints that are each other's by the ratio test, no place twice."""
    if len(one.points) < _LEAST or len(other.points) < _LEAST:
        return np.empty((0, 2)), np.empty((0, 2))
    a, b = one.descriptors.astype(np.float32), other.descriptors.astype(np.float32)
    distances = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    two = np.argpartition(distances, 1, axis=1)[:, :2]
    both = np.take_along_axis(distances, two, 1)
    order = np.argsort(both, axis=1)
    both, two = np.take_along_axis(both, order, 1), np.take_along_axis(two, order, 1)
    rows = np.flatnonzero(both[:, 0] < RATIO**2 * both[:, 1])
    rows = rows[np.argsort(both[rows, 0], kind="stable")]
    pairs = [(one.points[i], other.points[two[i, 0]]) for i in rows]
    seen: tuple[set, set] = (set(), set())
    kept = []
    for p, q in pairs:
        keys = tuple(np.round(p * 256).astype(int)), tuple(np.round(q * 256).astype(int))
        if keys[0] not in seen[0] and keys[1] not in seen[1]:
            kept.append((p, q))
            seen[0].add(keys[0])
            seen[1].add(keys[1])
    if not kept:
        return np.empty((0, 2)), np.empty((0, 2))
    return np.array([p for p, _ in kept]), np.array([q for _, q in kept])


def _sane(homography: np.ndarray, size: tuple[int, int], points: np.ndarray, inside: np.ndarray) -> bool:
    """Whether the box around the inliers stays a convex figure of the same sense, neither a point nor far larger."""
    left, top, right, bottom = (v * s for v, s in zip(_box(points[inside.ravel() > 0], size), size * 2, strict=True))
    corners = np.array([(left, top, 1), (right, top, 1), (right, bottom, 1), (left, bottom, 1)]).T
    mapped = homography @ corners
    if (mapped[2] <= 0).any() and (mapped[2] >= 0).any():
        return False
    quad = (mapped[:2] / mapped[2]).T
    edges = np.roll(quad, -1, 0) - quad
    after = np.roll(edges, -1, 0)
    turns = edges[:, 0] * after[:, 1] - edges[:, 1] * after[:, 0]
    x, y = quad.T
    area = 0.5 * (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()
    growth = area / max((right - left) * (bottom - top), 1e-6)
    return bool((turns > 0).all() and 1 / _SPAN < growth < _SPAN)


def _box(points: np.ndarray, size: tuple[int, int]) -> tuple[float, ...]:
    if not len(points):
        return (0.0, 0.0, 1.0, 1.0)
    low, high = points.min(0) / size, points.max(0) / size
    return tuple(float(np.clip(v, 0, 1)) for v in (*low, *high))


def best_matches(
    images: int, load: Load, train: int, load_train: Load, progress: Callable[[int], object] | None = None
) -> list[Match]:
    """For each of so many images, mirrored too, the training picture that most of its keypoints agree on.

    Memory: the keypoints of all images, 0.2 MB each, and of :data:`SHARD` training pictures.

    Args:
        load, load_train: index → RGB picture. progress: called with the pictures and pairs done.
    """
    step = progress or (lambda _: None)
    with ThreadPoolExecutor(cpu_count()) as pool:

        def both(i: int) -> tuple[Keypoints, Keypoints]:
            image = load(i)
            return detect(image), detect(ImageOps.mirror(image))

        queries = list(_counted(pool.map(both, range(images)), step))
        best = [Match() for _ in range(images)]
        for start in range(0, train, SHARD):
            rows = range(start, min(start + SHARD, train))
            shard = list(_counted(pool.map(lambda j: detect(load_train(j)), rows), step))
            index = _Index(shard)
            if index.empty:
                continue
            found = pool.map(lambda pair, index=index, shard=shard: _best_of(pair, index, shard), queries)
            for i, match in enumerate(_counted(found, step)):
                if match.inliers > best[i].inliers:
                    match.index += start
                    best[i] = match
    return best


def _counted(items: Iterator, step: Callable[[int], object]) -> Iterator:
    for item in items:
        step(1)
        yield item


def _best_of(pair: tuple[Keypoints, Keypoints], index: _Index, shard: Sequence[Keypoints]) -> Match:
    best = Match()
    for mirrored, one in enumerate(pair):
        for j in index.candidates(one):
            match = verify(one, shard[j])
            if match.inliers > best.inliers:
                match.index, match.mirrored = j, bool(mirrored)
                if mirrored:
                    left, top, right, bottom = match.region
                    match.region = (1 - right, top, 1 - left, bottom)
                best = match
    return best


class _Index:
    """Keypoints of a shard of pictures, by their descriptors: which pictures have most of an image's keypoints."""

    def __init__(self, shard: Sequence[Keypoints]):
        import faiss  # an extra

        counts = [len(k.points) for k in shard]
        self.owner = np.repeat(np.arange(len(shard)), counts)
        self.empty = not len(self.owner)
        if self.empty:
            return
        rows = np.concatenate([k.descriptors for k in shard]).astype(np.float32)
        cells = int(min(1024, len(rows) // 256))
        if cells < 16:  # so few are searched whole
            self.index = faiss.IndexFlatL2(128)
        else:
            quantizer = faiss.IndexFlatL2(128)
            self.index = faiss.IndexIVFScalarQuantizer(quantizer, 128, cells, faiss.ScalarQuantizer.QT_8bit_direct)
            self.index.cp.seed, self.index.cp.niter, self.index.nprobe = 0, 8, 4
            self.index.train(rows[:: max(1, len(rows) // (cells * 64))])
        self.index.add(rows)

    def candidates(self, one: Keypoints) -> list[int]:
        """At most :data:`CANDIDATES` pictures, by how far their keypoints are nearer than those of the others."""
        if len(one.points) < _LEAST:
            return []
        k = min(8, len(self.owner))
        distances, rows = self.index.search(one.descriptors.astype(np.float32), k)
        worst = np.where(rows >= 0, distances, -np.inf).max(1, keepdims=True)
        votes = np.zeros(int(self.owner[-1]) + 1)
        gain = np.where(rows >= 0, np.sqrt(np.maximum(worst, 0)) - np.sqrt(np.maximum(distances, 0)), 0)
        np.add.at(votes, self.owner[rows[rows >= 0]], gain[rows >= 0])
        order = np.argsort(-votes)[:CANDIDATES]
        return [int(j) for j in order if votes[j] > 0]


def limit_of(null: Sequence[int]) -> int:
    """More inliers than this are a copy of a part: as many as any of n unrelated pictures has, and at least :data:`FLOOR`.

    A further unrelated picture has more with a probability of at most 1/(n + 1), where it is exchangeable with them (Vovk,
    Gammerman and Shafer 2005).
    """
    return max(FLOOR, *null) if null else FLOOR
