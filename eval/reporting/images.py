"""Single images in the report: every generated one with its figures, and the training images that are copied most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.embedding import Embedded
from eval.reporting.neighbours import Neighbours
from eval.reporting.references import References
from eval.schema import CopiedImage, FoundCopy, ImageRow

COPIED_MOST = 24  # training images that a report names as copied most


def rounded(value: float) -> float:
    """As the report has figures of single images: six digits."""
    return round(float(value), 6)


def most_copied(generated: Embedded, neighbours: Neighbours, references: References) -> list[CopiedImage]:
    """Training images by how many generated ones lie above the threshold beside them, then by how many they are nearest
    to."""
    train, to_train = references.train, neighbours.to_train
    copied: list[CopiedImage] = []
    for j in np.unique(neighbours.indices):
        rows = np.flatnonzero(neighbours.indices == j)
        best = int(rows[np.argmax(to_train[rows])])
        above = None if references.threshold is None else int(np.sum(to_train[rows] > references.threshold))
        copied.append(
            {
                "file": train.images.name(int(j)),
                "caption": train.images.records[int(j)].caption,
                "nearest_of": len(rows),
                "above_threshold": above,
                "highest": rounded(to_train[best]),
                "generated": generated.images.name(best),
            }
        )
    copied.sort(key=lambda row: (-(row["above_threshold"] or 0), -row["nearest_of"], -row["highest"], row["file"]))
    return copied[:COPIED_MOST]


def image_rows(
    generated: Embedded,
    neighbours: Neighbours,
    p: np.ndarray | None,
    train: Embedded,
    copies: Sequence[FoundCopy | None],
) -> list[ImageRow]:
    """One entry per image, in the order of the files; ``p`` are the p-values (n,), ``copies`` what was found of each."""

    def at(values: np.ndarray | None, i: int) -> float | None:
        return None if values is None else rounded(values[i])

    rows: list[ImageRow] = []
    for i, record in enumerate(generated.images.records):
        j = int(neighbours.indices[i])
        rows.append(
            {
                "file": generated.images.name(i),
                "prompt": record.caption,
                "nearest_train": train.images.name(j),
                "nearest_train_caption": train.images.records[j].caption,
                "similarity_to_train": rounded(neighbours.to_train[i]),
                "similarity_to_heldout": at(neighbours.to_nearest_heldout, i),
                "l2_ratio": rounded(neighbours.l2_ratios[i]),
                "p_value": at(p, i),
                "score_normalized": at(neighbours.normalized, i),
                "found": _found(copies[i]),
            }
        )
    return rows


def _found(copy: FoundCopy | None) -> str | None:
    return None if copy is None else f"{copy['kind']}: {copy['train']}"
