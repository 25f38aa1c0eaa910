"""The stores that a training run reads: opened, and made first where images were given.

They hold noisy latents, but for the one of ``--low_noise clean``, which is a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.reader import LatentStore, Presentation
from sdxl_ambient.store.settings import StoreSettings
from sdxl_ambient.training.weights import BaseModel

UNPROTECTED = (
    "warning: --low_noise clean keeps CLEAN latents, which decode to the images, in {folder} and trains on them at "
    "t <= t_n; the privacy promise of t_n no longer holds for this run"
)


@dataclass(frozen=True)
class StoresSettings:
    """Which stores a run has, and what they are made of. Names are those of options.

    latents_dir, heldout_latents_dir, clean_latents_dir: the stores' folders; None for one that the run doesn't have.
    train_data_dir, heldout_data_dir, heldout_split: the pictures, as the options of these names.
    store: how pictures become a store of noisy latents; it names the data set where there is one.
    """

    base: BaseModel
    latents_dir: Path
    heldout_latents_dir: Path | None
    clean_latents_dir: Path | None
    train_data_dir: str | None
    heldout_data_dir: str | None
    heldout_split: str | None
    store: StoreSettings

    @property
    def to_build(self) -> list[tuple[str | None, Path, StoreSettings]]:
        """Folder of pictures, store and settings of each store that pictures are given for."""
        has_images = self.train_data_dir is not None or self.store.dataset_name is not None
        wanted = []
        if has_images:
            wanted.append((self.train_data_dir, self.latents_dir, self.store))
        if self.heldout_latents_dir and (self.heldout_data_dir is not None or self.heldout_split is not None):
            own = heldout_of(self.store, self.heldout_data_dir, self.heldout_split)
            wanted.append((self.heldout_data_dir, self.heldout_latents_dir, own))
        if self.clean_latents_dir and has_images:
            # Last, since the noisy one may be refused.
            wanted.append((self.train_data_dir, self.clean_latents_dir, clean_of(self.store)))
        return wanted


def open_stores(
    settings: StoresSettings, accelerator, schedule, presentation: Presentation, check: Callable[[], None] = lambda: None
) -> tuple[LatentStore, LatentStore | None]:
    """The stores of noisy latents for training and for the held-out loss, made first where images were given.

    With ``--low_noise clean`` the one of clean latents is made too, and the run says so. ``check`` is called between
    pictures, and may raise.
    """
    if settings.clean_latents_dir is not None:
        accelerator.print(UNPROTECTED.format(folder=settings.clean_latents_dir))
    if to_build := settings.to_build:
        accelerator.print("Encoding the images to noisy latents, once (a store that is there is checked and reused).")
        base = settings.base
        encoders = load_encoders(
            base.pretrained_model_name_or_path,
            vae=base.pretrained_vae_model_name_or_path,
            revision=base.revision,
            variant=base.variant,
        ).to(accelerator.device)
        for data_dir, store, wanted in to_build:
            build_store(data_dir, store, encoders, schedule, wanted, log=accelerator.print, check=check)
        # VAE and text encoders are out of memory from here on.
        del encoders
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    heldout = settings.heldout_latents_dir
    held = open_store(heldout, accelerator) if heldout is not None else None
    return open_store(settings.latents_dir, accelerator, presentation), held


def open_store(folder: Path, accelerator, presentation: Presentation | None = None) -> LatentStore:
    """A finished store, every bit of it checked once in the run: by each process its part. All call it."""
    store = LatentStore(folder, presentation=presentation)
    store.verify(accelerator.process_index, accelerator.num_processes, quiet=not accelerator.is_main_process)
    return store


def clean_of(settings: StoreSettings) -> StoreSettings:
    """Settings for the clean latents: the same pictures, and no noise.

    Near-duplicates were reported, or refused, when the noisy latents were drawn.
    """
    near = "drop" if settings.near_duplicates == "drop" else "ignore"
    return replace(settings, t_n=None, t_n_column=None, noise_key_file=None, near_duplicates=near)


def heldout_of(settings: StoreSettings, data_dir: str | None, split: str | None) -> StoreSettings:
    """Settings for the held-out images: a folder, or another ``split`` of the data set.

    Near-duplicates among them are left alone, since nothing is trained on them.
    """
    settings = replace(settings, near_duplicates="ignore")
    if data_dir is not None:
        return replace(settings, dataset_name=None)
    return replace(settings, dataset_split=split)
