"""The ambient loss on held-out and on training images at fixed times and noise: how well the noise of each band is found.

It needs no clean image. Where training lowers the loss of training images more than that of held-out ones, the network tells
the two apart, the first sign of memorisation: that difference is the denoising gap. Losses differ more between pictures than
training changes any of them, so each picture is compared with itself, as the weights denoised it that training started from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.objective import ambient_loss
from sdxl_ambient.posterior import Denoise
from sdxl_ambient.randomness import sample_generator
from sdxl_ambient.store.batches import Batch, collate
from sdxl_ambient.store.reader import LatentStore

# -- losses ----------------------------------------------------------------------


def band_edges(schedule: NoiseSchedule, t_n: int, bands: int) -> list[tuple[int, int]]:
    """Equal ranges (first, last timestep) of the times above ``t_n`` (−1: clean), which overlap where there are too few."""
    first, count = t_n + 1, schedule.num_timesteps - 1 - t_n
    starts, ends = ([first + (k + more) * count // bands for k in range(bands)] for more in (0, 1))
    return [(a, max(a, b - 1)) for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class BandSettings:
    """How the losses of bands are taken.

    bands: equal parts of the times above t_n.
    batch_size: pictures per process and forward pass.
    loss_space: as in :class:`sdxl_ambient.objective.ObjectiveOptions`.
    """

    bands: int
    batch_size: int
    loss_space: str = "epsilon"


@torch.no_grad()
def band_losses(
    accelerator: Accelerator,
    unet: torch.nn.Module,
    denoiser: Callable[[Batch], Denoise],
    schedule: NoiseSchedule,
    store: LatentStore,
    indices: list[int],
    settings: BandSettings,
) -> torch.Tensor:
    """Ambient loss of pictures of a store in every band: (pictures, bands) float64, the same on all processes.

    Each picture gets one time per band and noise that are the same at each call. All processes call it, and make equally
    many forward passes, so that weights may be spread over them.

    Args:
        unet: as it is trained, in or out of its wrapper; it is put into evaluation mode meanwhile.
        denoiser: a batch → ``unet`` as the function that denoises it.
    """
    was_training = unet.training
    unet.eval()
    losses: list[tuple[int, int, float]] = []
    for pictures, band in _jobs(store, indices, settings.batch_size * accelerator.num_processes, settings.bands):
        # The last batch of a size is filled up, so that every process has one; what fills it is counted once below.
        offset = accelerator.process_index * settings.batch_size
        own = [pictures[(offset + k) % len(pictures)] for k in range(settings.batch_size)]
        batch = collate([store[i, i] for i in own])
        t, xi = _draws(schedule, batch, band, settings.bands)
        denoise, x_n = denoiser(batch), batch.x_n.to(accelerator.device)
        with accelerator.autocast():
            values = ambient_loss(denoise, schedule, x_n, batch.t_n, t, xi.to(x_n), settings.loss_space)
        losses += [(i, band, float(loss)) for i, loss in zip(own, values, strict=True)]
    unet.train(was_training)
    if accelerator.num_processes > 1:
        losses = gather_object(losses)
    place = {picture: row for row, picture in enumerate(indices)}
    table = torch.zeros(len(indices), settings.bands, dtype=torch.float64)
    for picture, band, loss in losses:
        table[place[picture], band] = loss
    return table


def _jobs(store: LatentStore, indices: list[int], together: int, bands: int) -> list[tuple[list[int], int]]:
    """Pictures of one size, at most ``together``, and a band, for each forward pass of all processes."""
    return [
        (size[start : start + together], band)
        for size in _by_size(store, indices)
        for start in range(0, len(size), together)
        for band in range(bands)
    ]


def _draws(schedule: NoiseSchedule, batch: Batch, band: int, bands: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Times (batch,) within the band and noise like x_n, which are each picture's own at every call."""
    generators = [sample_generator(0, f"heldout band {band}", i) for i in batch.positions]
    t = [_time(schedule, int(t_n), bands, band, g) for t_n, g in zip(batch.t_n, generators, strict=True)]
    xi = torch.stack([torch.randn(x.shape, generator=g) for x, g in zip(batch.x_n, generators, strict=True)])
    return torch.tensor(t), xi


def _by_size(store: LatentStore, indices: list[int]) -> list[list[int]]:
    wanted = set(indices)
    groups = [[i for i in members if i in wanted] for members in store.groups.values()]
    return [g for g in groups if g]


def _time(schedule: NoiseSchedule, t_n: int, bands: int, band: int, generator: torch.Generator) -> int:
    first, last = band_edges(schedule, t_n, bands)[band]
    return first + int(torch.rand((), generator=generator, dtype=torch.float64) * (last - first + 1))


# -- the gap ----------------------------------------------------------------------


@dataclass
class Losses:
    """Ambient losses (pictures, bands) of held-out and of training pictures."""

    heldout: torch.Tensor
    train: torch.Tensor

    def bands(self) -> list[Losses]:
        """Those of each band alone, as (pictures, 1)."""
        return [Losses(h[:, None], t[:, None]) for h, t in zip(self.heldout.T, self.train.T, strict=True)]


def gap(now: Losses, start: Losses) -> dict[str, float]:
    """How much more training has lowered the loss of training pictures than of held-out ones, as part of the held-out loss.

    The standard error is that of a difference of two means, of the pictures' own changes.
    """
    changes = [(a - b).mean(1) for a, b in ((now.heldout, start.heldout), (now.train, start.train))]
    difference = float(changes[0].mean() - changes[1].mean())
    error = math.sqrt(sum(float(x.var()) / len(x) for x in changes if len(x) > 1))
    whole = float(now.heldout.mean()) or 1.0
    return {"value": difference / whole, "standard_error": error / whole}


def compare(step: int, now: Losses, start: Losses, edges: list[tuple[int, int]] | None) -> dict:
    """The record of one validation. ``start``: the losses that training started from.

    ``edges``: the bands' times where all pictures are at one level, else None and bands are numbered.
    """
    names = [f"{a}-{b}" for a, b in edges] if edges else [f"band {k + 1}" for k in range(now.heldout.shape[1])]
    bands = [{"band": n, **_means(a, b)} for n, a, b in zip(names, now.bands(), start.bands(), strict=True)]
    return {"step": step, **_means(now, start), "bands": bands}


def _means(now: Losses, start: Losses) -> dict:
    return {"heldout": float(now.heldout.mean()), "train": float(now.train.mean()), "gap": gap(now, start)}


def scalars(record: dict) -> dict[str, float]:
    """A record as a tracker takes it."""
    flat = {
        "heldout_loss": record["heldout"],
        "train_loss_fixed": record["train"],
        "denoising_gap": record["gap"]["value"],
        "denoising_gap_standard_error": record["gap"]["standard_error"],
    }
    for band in record["bands"]:
        flat[f"heldout_loss/{band['band']}"] = band["heldout"]
        flat[f"denoising_gap/{band['band']}"] = band["gap"]["value"]
    return flat


# -- stopping ----------------------------------------------------------------------


@dataclass
class EarlyStopping:
    """When there have been enough validations: ``patience`` of them in a row without a lower held-out loss, or a denoising
    gap that is above ``max_gap`` by more than two standard errors. None: never."""

    patience: int | None = None
    max_gap: float | None = None
    records: list[dict] = field(default_factory=list)

    def add(self, record: dict) -> bool:
        """One more validation. Returns whether its held-out loss is the lowest so far."""
        lowest = self.best is None or record["heldout"] < self.best["heldout"]
        self.records.append(record)
        return lowest

    @property
    def best(self) -> dict | None:
        """The record with the lowest held-out loss, the earliest of equal ones."""
        return min(self.records, key=lambda r: r["heldout"], default=None)

    @property
    def reason(self) -> str | None:
        """Why training should stop, in words."""
        best = self.best
        if best is None:
            return None
        since = len(self.records) - 1 - self.records.index(best)
        if self.patience is not None and since >= self.patience:
            lowest = f"{best['heldout']:.4f} at step {best['step']}"
            return f"the held-out loss has not fallen for {since} validations (lowest {lowest})"
        own = self.records[-1]["gap"]
        if self.max_gap is not None and own["value"] - 2 * own["standard_error"] > self.max_gap:
            part, error = 100 * own["value"], 200 * own["standard_error"]
            return f"held-out images are denoised worse than training images by {part:.1f} ± {error:.1f} %"
        return None
