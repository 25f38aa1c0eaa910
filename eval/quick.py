"""The evaluation's fast path, for a look at weights while they are trained: how many of a folder's images are copies.

No attacks, no quality figures, one sampler: for a verdict run ``python -m eval.memorization`` on the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from eval.choices import ALPHA, CONFIDENCE, EMBEDDING_BATCH
from eval.embedders.registry import Embedder, check_embedder
from eval.embedding import Embedded, normalised
from eval.images import ImageSet, read_folder
from eval.reporting.folder import quick_figures
from eval.reporting.references import References, ReferenceSets, make_references
from eval.schema import Excluded
from eval.sets import (
    Embedding,
    SetSettings,
    check_set_folders,
    embed_sets,
    in_the_shape,
    read_sets,
    seen_otherwise,
)
from eval.statistics.calibrate import smallest_null
from sdxl_ambient.errors import ImageError, OptionError, StageError
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.load import load_rgb

ASPECT = 1.0  # of the images that are drawn during training


class QuickLook:
    """Embeds both sets once, and then compares folders of drawn images with them.

    One process does it by itself while others train or wait. Embeddings of the images, which are clean, stay in its memory;
    the embedder is loaded for each look and dropped again, so that training has the device to itself.

    Args:
        train_data_dir, heldout_data_dir: the images trained on, and such as were not.
        work_dir: a folder outside both; nothing is written into it.
        embedder: one of the evaluation's, as NAME, or NAME=WEIGHTS with a local folder or file, or a name on the Hub.
        alpha: share of held-out images above the threshold.
        columns: where the captions are in both folders' metadata.

    Raises:
        OptionError: a folder or an embedder that can't be had.
    """

    def __init__(
        self,
        train_data_dir: str,
        heldout_data_dir: str,
        work_dir: str | Path,
        embedder: str,
        alpha: float = ALPHA,
        columns: Columns | None = None,
    ):
        name, _, weights = embedder.partition("=")
        check_set_folders(train_data_dir, heldout_data_dir, str(work_dir))
        try:
            check_embedder(name, weights or None)
        except StageError as error:
            raise OptionError(str(error)) from None
        self.alpha = alpha
        self.settings = SetSettings(
            train_data_dir=train_data_dir,
            heldout_data_dir=heldout_data_dir,
            caption_column=(columns or Columns()).caption,
            caption_encoding=(columns or Columns()).encoding,
            output_dir=str(work_dir),
            embedder=name,
            embedder_weights=weights or None,
            embedding_batch_size=EMBEDDING_BATCH,
            clip_score_model=None,
            near_duplicates="drop",
            device="auto",
        )
        self.references: References | None = None

    def __call__(self, folder: str | Path) -> dict[str, Any]:
        """Of a folder of images: the share above the threshold, its excess over the held-out share, both with intervals, and
        the similarities to the training set, by the names of the evaluation's report; and the ``threshold``."""
        references = self.prepare()
        drawn = _InMemory(self.settings)(read_folder(folder))
        _free()
        return {**quick_figures(drawn, references), "threshold": references.threshold}

    def prepare(self) -> References:
        """Embed both sets and calibrate, once.

        Raises:
            OptionError: too few held-out images for a threshold, or an embedder that can't be loaded.
            ImagesMissing: a folder without images.
        """
        if self.references is None:
            try:
                self.references = self._references()
            except StageError as error:
                raise OptionError(f"--memorization_every: {error}") from None
            _free()
        return self.references

    def _references(self) -> References:
        train_images, heldout_images = read_sets(self.settings)
        check_quick(len(heldout_images or ()), self.alpha)
        embedding = _InMemory(self.settings)
        train, heldout = embed_sets(self.settings, train_images, heldout_images, embedding)
        check_quick(len(heldout or ()), self.alpha)  # near-duplicates are left out by now
        views, as_sampled = seen_otherwise(train.images, embedding, ASPECT), in_the_shape(heldout, embedding, ASPECT)
        sets = ReferenceSets(train, heldout, None, None, views=views, as_sampled=as_sampled)
        return make_references(sets, self.alpha, CONFIDENCE, self.settings.embedder, planted={})


def check_quick(heldout: int, alpha: float) -> None:
    """Raises OptionError where so many held-out images can't give a threshold at ``alpha``."""
    if heldout < (needed := smallest_null(alpha)):
        raise OptionError(
            f"--memorization_every: {heldout} held-out images, without repeated ones, are too few to tell chance from "
            f"copies at {alpha:g}; at least {needed} are needed (--heldout_data_dir)"
        )


class _InMemory(Embedding):
    """Embeds alone and without files, where :func:`eval.embedding.embed` has a cache and other processes."""

    def __call__(self, images: ImageSet, embedder: Embedder | None = None) -> Embedded:
        embedder = embedder or self.embedder
        kept: list[int] = []
        parts: list[np.ndarray] = []
        excluded: list[Excluded] = []
        with tqdm(total=len(images), unit="image", desc=f"embed {images.folder.name} ({embedder.name})", delay=2) as bar:
            for start in range(0, len(images), self.batch_size):
                pixels = []
                for i in range(start, min(start + self.batch_size, len(images))):
                    try:
                        pixels.append(embedder.prepare(load_rgb(images.records[i].path)))
                        kept.append(i)
                    except ImageError as error:
                        excluded.append({"file": images.name(i), "reason": str(error)})
                if pixels:
                    parts.append(embedder.encode(torch.stack(pixels)).numpy())
                bar.update(min(self.batch_size, len(images) - start))
        if not kept:
            reason = excluded[0]["reason"] if excluded else "none there"
            raise StageError(f"{images.folder}: no usable image; the first problem: {reason}")
        features = np.concatenate(parts).astype(np.float32)
        if not np.isfinite(features).all():
            raise StageError(f"{images.folder}: an {embedder.name} embedding is not finite; the weights may be damaged")
        norms = np.linalg.norm(features.astype(np.float64), axis=1).astype(np.float32)
        return Embedded(images.subset(kept, excluded), normalised(features), norms, len(kept))


def _free() -> None:
    """Give the embedder's memory back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
