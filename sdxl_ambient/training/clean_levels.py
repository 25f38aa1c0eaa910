"""Clean latents for the levels at or below t_n (``--low_noise clean``): nothing protects the pictures there.

"Does Generation Require Memorization?" (arXiv 2502.21278): the ambient loss trains t > t_n on noisy latents, the plain
denoising loss trains t ≤ t_n on the clean latents of the same pictures, each up to its own t_n. The clean latents lie in a
store of their own. Pictures that are clean in the noisy store train every level there and have no part in this.

All processes draw from one stream over the protected pictures, as they do from that of the noisy ones: what a step is given
follows from its number alone, so a resume needs no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sdxl_ambient.errors import StoreError
from sdxl_ambient.models.denoiser import Conditioning
from sdxl_ambient.objective import ExtraRows
from sdxl_ambient.randomness import sample_generator
from sdxl_ambient.store.batches import Batch, Stream, loader
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.training.extra_rows import ExtraBatch

PURPOSE = "clean"


class CleanLevels:
    """This process's batches of clean latents, ``batch_size`` in each forward pass.

    Args:
        store: of clean latents. noisy: the store that is trained on above t_n, whose levels are each picture's highest here.
        condition: a batch → what the UNet is shown of it, for :meth:`rows`.

    Raises:
        StoreError: the two are not of the same pictures, cropped and encoded alike; noisy latents in ``store``; pictures of
            several sizes.
    """

    def __init__(
        self,
        store: LatentStore,
        noisy: LatentStore,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        condition: Callable[[Batch], Conditioning] | None = None,
    ):
        check_clean(store, noisy)
        self.store, self.batch_size, self.seed, self.rank, self.processes = store, batch_size, seed, rank, processes
        self.condition = condition
        self.t_n = {i["content"]: i["t_n"] for i in noisy.images if i["t_n"] is not None}
        # In the noisy store's order, whatever else the clean one holds.
        place = {entry["content"]: index for index, entry in enumerate(store.images)}
        self.protected = [place[content] for content in self.t_n]

    @property
    def record(self) -> dict:
        """What a resume must agree in. Which latents they are follows from the noisy store."""
        return {"clean_samples_per_pass": self.batch_size * self.processes}

    def batches(self, start: int, stop: int, workers: int = 0) -> Iterator[Batch]:
        """This process's batches, from micro-step ``start`` to before ``stop``; the same at every resume."""
        stream = Stream(
            len(self.protected),
            self.batch_size,
            self.seed,
            start=start,
            stop=stop,
            rank_and_size=(self.rank, self.processes),
            groups=[self.protected],
            purpose=PURPOSE,
        )
        return iter(loader(self.store, stream, workers))

    def generators(self, batch: Batch) -> list[torch.Generator]:
        """One per sample, seeded by its position in the stream."""
        return [sample_generator(self.seed, PURPOSE, p) for p in batch.positions]

    def rows(self, batch: Batch, step: int) -> ExtraBatch:
        """A batch's clean latents, in every step."""
        assert self.condition is not None, "rows are shown with a caption"
        generators, conditioning = self.generators(batch), self.condition(batch)
        return ExtraBatch(self.clean_rows(batch), conditioning, generators, batch.contents)

    def commit(self) -> None:
        """Nothing: what a step is given follows from its number alone."""

    def save(self, folder: Path) -> None:
        """Nothing, as for :meth:`commit`."""

    def load(self, folder: Path) -> None:
        """Nothing, as for :meth:`commit`."""

    def clean_rows(self, batch: Batch) -> ExtraRows:
        """The clean latents of a batch as rows of the objective, each trained at t ≤ its picture's own t_n."""
        return ExtraRows(batch.x_n, torch.tensor([self.t_n[content] for content in batch.contents]), "clean")


def check_clean(store: LatentStore, noisy: LatentStore) -> None:
    """Raises StoreError where ``store`` isn't the clean latents of what ``noisy`` protects: one line that says in what."""
    name = f"the store of clean latents {store.folder}"
    protected = {i["content"]: i["time_ids"] for i in noisy.images if i["t_n"] is not None}
    clean = {i["content"]: i["time_ids"] for i in store.images}
    if any(i["t_n"] is not None for i in store.images):
        raise StoreError(f"{name} holds noisy ones; give another --clean_latents_dir")
    if store.lineage:
        raise StoreError(f"{name} holds restored samples; give another --clean_latents_dir")
    missing, more = protected.keys() - clean.keys(), clean.keys() - {i["content"] for i in noisy.images}
    if missing or more:
        raise StoreError(
            f"{name} is not of the images in {noisy.folder}: it lacks {len(missing)} and has {len(more)} others; give "
            "another --clean_latents_dir"
        )
    moved = sum(clean[content] != ids for content, ids in protected.items())
    if moved or latent_settings(store) != latent_settings(noisy):
        what = f"{moved} of its images are cropped otherwise" if moved else "its VAE, geometry or schedule is another"
        raise StoreError(f"{name} was made with other settings than {noisy.folder}: {what}")
    if len(noisy.groups) > 1:
        raise StoreError("--low_noise clean needs images of one size: the store was made with --aspect_ratio_buckets")


def latent_settings(store: LatentStore) -> dict:
    """What shapes a store's latents beside the noise."""
    return {name: value for name, value in store.manifest["fingerprint"]["latent"].items() if name != "t_n"}
