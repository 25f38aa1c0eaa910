"""Expectation-maximisation on noisy data: a buffer of posterior samples x̃_0, one per image, that the model itself drew.

x_n *is* x_t at t = t_n, so the reverse chain from x_n under the averaged weights gives a sample of p(x_0 | x_n) (E-step);
plain denoising on it trains the levels at or below t_n (M-step). Sources: Bai et al., arXiv 2405.13712; Hosseintabar et
al., arXiv 2510.12691.

Every process owns the images whose index is its rank modulo the number of processes, walks through them in an order of its
own, and holds the buffer of those alone. The buffer holds what the model drew, never a clean latent.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdxl_ambient.errors import CheckpointError, StoreError, one_line
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.objective import ExtraRows
from sdxl_ambient.posterior import sample_posterior
from sdxl_ambient.randomness import Randomness, sample_generator
from sdxl_ambient.store.batches import Batch, Stream, loader
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.training.extra_rows import ExtraBatch

FOLDER = "restored"


@dataclass(frozen=True)
class RestoreOptions:
    """How posterior samples are drawn and trained on.

    batch_size: restored samples in each forward pass. refresh: how many of those are drawn anew each time; an image without
        a sample gets one when its turn comes. steps: evaluations of the chain that draws one.
    levels: "low" trains them at t ≤ t_n, beside the ambient loss; "all" at every t, in its place.
    """

    batch_size: int
    refresh: int
    steps: int
    levels: str


@dataclass(frozen=True)
class Teacher:
    """The model that samples are drawn by.

    module: called like a UNet; averaged weights, or those that training started from. condition: a batch → what it shows.
    dtype: of the rows that the module is given. first_step: optimizer steps before the first samples are drawn.
    """

    module: Callable[..., Any]
    schedule: NoiseSchedule
    condition: Callable[[Batch], Conditioning]
    dtype: torch.dtype = torch.float32
    first_step: int = 0

    def denoiser(self, conditioning: Conditioning) -> Denoiser:
        """The model for a batch that shows ``conditioning``."""
        return Denoiser(self.module, conditioning, self.dtype)


class PosteriorBuffer:
    """This process's share of the buffer, and the batches that are made from it.

    Args:
        seed, rank, processes: the order of the images, and their draws, follow from these. teacher: for :meth:`rows`.

    Raises:
        StoreError: clean images in the store, images of several sizes, or fewer images than processes.
    """

    def __init__(
        self,
        store: LatentStore,
        options: RestoreOptions,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        teacher: Teacher | None = None,
    ):
        if any(i["t_n"] is None for i in store.images):
            raise StoreError("restore needs noisy latents: the store holds clean ones (t_n none)")
        if len(store.groups) > 1:
            raise StoreError("restore needs images of one size: the store was made with --aspect_ratio_buckets")
        self.own = list(range(rank, len(store), processes))
        if not self.own:
            raise StoreError(f"restore needs an image for each process: {len(store)} images, {processes} processes")
        self.store, self.options, self.seed, self.rank, self.teacher = store, options, seed, rank, teacher
        self.purpose = f"restore {rank} of {processes}"
        self.samples: dict[str, torch.Tensor] = {}
        self.drawn: dict[str, torch.Tensor] = {}  # in the step that is being taken; a checkpoint is of whole steps

    def batches(self, start: int, stop: int, workers: int = 0) -> Iterator[Batch]:
        """This process's batches of images, from micro-step ``start`` to before ``stop``; the same at every resume."""
        stream = Stream(
            len(self.own),
            self.options.batch_size,
            self.seed,
            start=start,
            stop=stop,
            groups=[self.own],
            purpose=self.purpose,
        )
        return iter(loader(self.store, stream, workers))

    def generators(self, batch: Batch) -> list[torch.Generator]:
        """One per sample, seeded by its position in this process's stream."""
        return [sample_generator(self.seed, self.purpose, p) for p in batch.positions]

    def rows(self, batch: Batch, step: int) -> ExtraBatch | None:
        """Samples of a batch's images by the teacher; None before the step that it starts with."""
        assert self.teacher is not None, "rows are drawn by a teacher"
        if step < self.teacher.first_step:
            return None
        generators, conditioning = self.generators(batch), self.teacher.condition(batch)
        rows = self.restored(batch, self.teacher.denoiser(conditioning), self.teacher.schedule, generators)
        return ExtraBatch(rows, conditioning, generators, batch.contents, replace=self.options.levels == "all")

    def restored(
        self,
        batch: Batch,
        denoise: Denoiser,
        schedule: NoiseSchedule,
        generators: list[torch.Generator],
    ) -> ExtraRows:
        """x̃_0 of a batch's images, some of them drawn now, by ``denoise``: the averaged model for that batch.

        Raises:
            FloatingPointError: what it drew is not finite.
        """
        known = ChainMap(self.drawn, self.samples)
        stale = [i for i, c in enumerate(batch.contents) if i < self.options.refresh or c not in known]
        if stale:
            x_n, t_n = batch.x_n[stale], batch.t_n[stale]
            some = denoise.rows(stale)
            randomness = Randomness([generators[i] for i in stale], len(stale))
            x_0 = sample_posterior(some, schedule, x_n.to(some.device), t_n, self.options.steps, randomness).float().cpu()
            if not bool(torch.isfinite(x_0).all()):
                raise FloatingPointError("restoring gave latents that are not finite; lower --learning_rate")
            self.drawn.update((batch.contents[i], as_shown(x_0[k], batch.flipped[i])) for k, i in enumerate(stale))
        top = schedule.num_timesteps - 1
        t_max = torch.full_like(batch.t_n, top) if self.options.levels == "all" else batch.t_n
        shown = zip(batch.contents, batch.flipped, strict=True)
        return ExtraRows(torch.stack([as_shown(known[content], flipped) for content, flipped in shown]), t_max)

    def commit(self) -> None:
        """The step is done: what it drew is kept. A step that fails, and is taken again at a resume, draws again."""
        self.samples.update(self.drawn)
        self.drawn.clear()

    def save(self, folder: Path) -> None:
        """Write this process's samples into a checkpoint's folder."""
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        tensors = {name: x.contiguous() for name, x in sorted(self.samples.items())}
        save_file(tensors, str(folder / FOLDER / f"rank-{self.rank:05d}.safetensors"))

    def load(self, folder: Path) -> None:
        """Read the samples of this process's images from a checkpoint, whichever process wrote them.

        Raises:
            CheckpointError: a damaged file, or samples of another size.
        """
        names = {self.store.images[i]["content"] for i in self.own}
        shape = self.store[0, self.own[0]]["x_n"].shape
        for path in sorted((folder / FOLDER).glob("*.safetensors")):
            try:
                found = {name: x for name, x in load_file(str(path)).items() if name in names}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged ({one_line(error)})") from None
            if any(x.shape != shape or not bool(torch.isfinite(x).all()) for x in found.values()):
                raise CheckpointError(f"{path} is damaged (its samples are of another size, or not finite)")
            self.samples.update(found)


def as_shown(x_0: torch.Tensor, flipped: torch.Tensor) -> torch.Tensor:
    """A sample as a batch shows its image, or one drawn from what was shown as it is kept, which is never mirrored."""
    return x_0.flip(-1) if flipped else x_0
