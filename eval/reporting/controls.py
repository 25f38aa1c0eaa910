"""What real images and planted copies reach, which every model's figures are read against."""

from __future__ import annotations

import numpy as np

from eval.embedding import Embedded
from eval.neighbours import nearest
from eval.quality import QUALITY_MOST
from eval.reporting.images import rounded
from eval.reporting.neighbours import similarity_figures
from eval.reporting.quality import frechet
from eval.reporting.references import References
from eval.reporting.shares import share_figures
from eval.schema import ControlFigures, Controls, HeldoutControl


def control_figures(references: References) -> Controls:
    """What the real images do among themselves: held-out → training (the null), training → training, and their FD."""
    own = _own_neighbours(references.train)
    return {
        "heldout_to_train": _heldout(references),
        "train_to_train": None if own is None else _control(own, references),
        "planted": {name: _planted(name, references) for name in references.planted},
        "fd_pixels": frechet(references.train_pooled, references.heldout_pooled),
        "fd_embedding": frechet(references.train, references.heldout),
    }


def _heldout(references: References) -> HeldoutControl | None:
    if references.null is None or references.null_from != "heldout":
        return None
    similarities = [rounded(value) for value in np.sort(references.null)]
    return {**_control(references.null, references), "similarities": similarities}


def _control(values: np.ndarray, references: References) -> ControlFigures:
    return {"n": len(values), "similarity_to_train": similarity_figures(values), **share_figures(values, references)}


def _planted(name: str, references: References) -> ControlFigures:
    """Of one kind of copy; found by a part too, where that was looked for."""
    values, parts = references.planted[name], references.parts
    if references.threshold is None or parts is None or name not in parts.planted:
        return _control(values, references)
    values = values[parts.planted[name][0]]
    figures = share_figures(values, references, found=references.recalled(name))
    return {"n": len(values), "similarity_to_train": similarity_figures(values), **figures}


def _own_neighbours(train: Embedded) -> np.ndarray | None:
    """Training images' similarities to the nearest other one; of a large set, of some."""
    if len(train) < 2:
        return None
    if len(train) <= QUALITY_MOST:
        return nearest(train.embeddings, train.embeddings, 1, leave_one_out=True)[0][:, 0]
    # An image is its own nearest, so the second is the nearest other one.
    return nearest(train.thinned(QUALITY_MOST).embeddings, train.embeddings, 2)[0][:, 1]
