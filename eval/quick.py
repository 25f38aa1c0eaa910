"""The evaluation's fast path, for a look at weights while they are trained: how many of a folder's images are copies.

No attacks, no quality figures, one sampler: for a verdict run ``python -m eval.memorization`` on the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from eval.images import read_folder
from eval.memorization import Embedding, embed_sets, plant, read_sets
from eval.options import Options
from eval.summary import References, make_references, share_figures
from sdxl_ambient.config import OptionError


class QuickLook:
    """Embeds both sets once, and then compares folders of drawn images with them.

    Args:
        train_data_dir, heldout_data_dir: the images trained on, and such as were not.
        work_dir: embeddings are kept there; of clean images, so let it be a temporary folder.
        embedder: one of the evaluation's. alpha: share of held-out images above the threshold.

    Raises:
        OptionError, StageError, ImagesMissing: as the evaluation raises them, among them too few held-out images.
    """

    def __init__(self, train_data_dir: str, heldout_data_dir: str, work_dir: str | Path, embedder: str, alpha: float = 0.02):
        self.options = Options(
            train_data_dir=train_data_dir,
            heldout_data_dir=heldout_data_dir,
            output_dir=str(work_dir),
            embedder=embedder,
            alpha=alpha,
            generated_dir=[str(train_data_dir)],  # some folder; which one is said later
            skip_attacks=True,
        )
        self.options.validate()
        self.embedding = Embedding(self.options)
        self.references: References | None = None

    def __call__(self, folder: str | Path) -> dict:
        """Of a folder of images: the share above the threshold, its excess over the held-out share, both with intervals, and
        the similarities to the training set, by the names of the evaluation's report."""
        self.prepare()
        return share_figures(self.embedding(read_folder(folder)), self.references)

    def prepare(self) -> None:
        """Embed both sets and calibrate, once.

        Raises:
            OptionError: too few held-out images for a threshold.
        """
        self.references = self.references or self._references()
        if self.references.threshold is None:
            raise OptionError(f"--memorization_every: {self.references.refusal}")

    def _references(self) -> References:
        train, heldout = embed_sets(self.options, *read_sets(self.options), self.embedding)
        copies = plant(self.options, train, self.embedding.embedder)
        asked = (self.options.alpha, self.options.confidence, self.options.embedder)
        return make_references(train, heldout, None, None, *asked, copies, None)
