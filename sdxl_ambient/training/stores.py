"""The stores that a training run reads: opened, and made first where images were given.

They hold noisy latents, but for the one of ``--low_noise clean``, which is a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState

from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.sources import TRAIN, Log
from sdxl_ambient.models.load import Encoders, load_encoders
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.store.build import build_collected
from sdxl_ambient.store.collect import apart, collect
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
            folder = self.train_data_dir if self.heldout_data_dir is None else self.heldout_data_dir
            wanted.append((folder, self.heldout_latents_dir, own))
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
    if settings.to_build:
        accelerator.print("Encoding the images to noisy latents, once (a store that is there is checked and reused).")
        base = settings.base
        encoders = load_encoders(
            base.pretrained_model_name_or_path,
            vae=base.pretrained_vae_model_name_or_path,
            revision=base.revision,
            variant=base.variant,
        ).to(accelerator.device)
        build_all(settings, encoders, schedule, accelerator.print, check)
        # VAE and text encoders are out of memory from here on.
        del encoders
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    heldout = settings.heldout_latents_dir
    held = open_store(heldout, accelerator) if heldout is not None else None
    train = open_store(settings.latents_dir, accelerator, presentation)
    compared = {settings.latents_dir, heldout} <= {folder for _, folder, _ in settings.to_build}  # the pictures themselves
    if held is not None and not compared:
        check_apart(held, train, settings.store.near_duplicates, accelerator.print)
    return train, held


def build_all(
    settings: StoresSettings, encoders: Encoders, schedule: NoiseSchedule, log: Log, check: Callable[[], None]
) -> None:
    """Make every store that pictures are given for, when all of them were opened: what is to be refused is refused first."""
    state, near = PartialState(), settings.store.near_duplicates
    opened = []
    for data_dir, folder, wanted in settings.to_build:
        heldout = folder == settings.heldout_latents_dir
        collected = collect(data_dir, encoders, wanted, state, log, check, prints=heldout and near != "ignore")
        # Training images come first, if there are any.
        opened.append(apart(collected, opened[0], near, state, log) if heldout and opened else collected)
    for (_, folder, wanted), collected in zip(settings.to_build, opened, strict=True):
        build_collected(collected, folder, encoders, schedule, wanted, state, log, check)


def check_apart(heldout: LatentStore, train: LatentStore, policy: str, log: Log) -> None:
    """Say that held-out pictures are training pictures, by their pixels; a StoreError where that is to be refused."""
    shared = len(heldout.observed.keys() & train.observed.keys())
    if not shared:
        return
    what = f"{shared} of {len(heldout)} held-out images in {heldout.folder} are training images"
    if policy == "refuse":
        raise StoreError(f"--near_duplicates refuse: {what}")
    log(f"warning: {what}. The held-out loss falls while these are learnt by heart")


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

    Near-duplicates among them are left alone, since nothing is trained on them. Those of training images are not
    (:func:`build_all`).
    """
    settings = replace(settings, near_duplicates="ignore")
    if data_dir is not None:
        return replace(settings, dataset_name=None, dataset_split=TRAIN)
    return replace(settings, dataset_split=split)
