"""Near-duplicates: the same picture at another size, recompressed, or mirrored.

Pictures are near-duplicates where the perceptual hashes (64-bit DCT hash of the ``imagehash`` library) of the two, or of
one and the other's mirror image, differ in at most 4 bits and their 8×8 colour thumbnails in the same orientation differ
by at most .05 on average (the hash alone is blind to colour).

Two noisy latents of one picture are two observations of it, whose average has less noise than t_n promises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image, ImageOps

BITS, COLOUR = 4, 0.05
_SIDE, _HASH = 3 * 8 * 8, 8


def fingerprint(image: Image.Image) -> np.ndarray:
    """Hash and thumbnail of an RGB picture and of its mirror image, as 400 bytes in float32."""
    parts = []
    for view in (image, ImageOps.mirror(image)):
        parts.append(np.frombuffer(int(str(imagehash.phash(view)), 16).to_bytes(_HASH, "big"), np.uint8))
        parts.append(np.asarray(view.resize((8, 8), Image.Resampling.BOX)).ravel())
    return np.concatenate(parts).astype(np.float32)


@dataclass
class Fingerprints:
    """Of n images: hashes (n, 2) uint64 and thumbnails (n, 2, 192) in [0, 1], as they stand and mirrored."""

    hashes: np.ndarray
    thumbnails: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Fingerprints:
        """From :func:`fingerprint` of each image: (n, 400). Whole numbers to float32's rounding, as a cache returns them."""
        both = np.rint(features).astype(np.uint8).reshape(len(features), 2, _HASH + _SIDE)
        hashes = np.ascontiguousarray(both[:, :, :_HASH]).view(">u8")[:, :, 0].astype(np.uint64)
        return cls(hashes, both[:, :, _HASH:].astype(np.float32) / 255)


def matches(queries: Fingerprints, references: Fingerprints, pairs: int = 1 << 24) -> list[tuple[int, int, bool]]:
    """Near-duplicate pairs (i, j, mirrored), i an image of ``queries`` and j of ``references``, in that order.

    Compares ``pairs`` of them at once, which bounds memory: 16 bytes for each.
    """
    return [
        (i, int(j), bool(side))
        for i, *arrays in matching(queries, references, pairs)
        for j, side in zip(*arrays, strict=True)
    ]


def matching(
    queries: Fingerprints, references: Fingerprints, pairs: int = 1 << 24, earlier: bool = False
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The same by images of ``queries`` that match any: i, the indices j in order, and for each whether it is mirrored.

    With ``earlier``, where both are one set, only j < i are looked at, which is half the work.
    """
    chunk = max(1, pairs // max(1, len(references.hashes)))
    for start in range(0, len(queries.hashes), chunk):
        stop = min(start + chunk, len(queries.hashes))
        hits: dict[int, list[np.ndarray]] = {}
        for side in (0, 1):
            others = references.hashes[None, : stop if earlier else None, 0]
            rows, columns = np.nonzero(np.bitwise_count(queries.hashes[start:stop, side, None] ^ others) <= BITS)
            if earlier:
                before = columns < rows + start
                rows, columns = rows[before], columns[before]
            # Thumbnails row by row: in a set of near-blank pictures every hash may match every other.
            edges = np.searchsorted(rows, np.arange(stop - start + 1))
            for row in np.unique(rows):
                js = columns[edges[row] : edges[row + 1]]
                gap = np.abs(queries.thumbnails[start + row, side] - references.thumbnails[js, 0]).mean(1)
                # Twice the index, and one more where it is mirrored: sorts by both.
                hits.setdefault(start + int(row), []).append(2 * js[gap <= COLOUR] + side)
        for i in sorted(hits):
            if len(both := np.sort(np.concatenate(hits[i]))):
                yield i, both // 2, both % 2 == 1


def earlier_twins(own: Fingerprints, kept_only: bool = False) -> Iterator[tuple[int, int, bool]]:
    """(i, j, mirrored) for every image i that shows an earlier one, j the first of those; so at most one for each image.

    With ``kept_only``, images that are found are taken to be left out, and what shows only them stays.
    """
    gone = np.zeros(len(own.hashes), dtype=bool)
    for i, js, mirrored in matching(own, own, earlier=True):
        stays = ~gone[js]
        if stays.any():
            first = int(np.argmax(stays))
            gone[i] = kept_only
            yield i, int(js[first]), bool(mirrored[first])
