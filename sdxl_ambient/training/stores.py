"""The stores that a training run reads: opened, and made first where images were given.

They hold noisy latents, but for the one of ``--low_noise clean``, which is a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.reader import LatentStore, Presentation
from sdxl_ambient.store.settings import StoreSettings

UNPROTECTED = (
    "warning: --low_noise clean keeps CLEAN latents, which decode to the images, in {folder} and trains on them at "
    "t <= t_n; the privacy promise of t_n no longer holds for this run"
)


def open_stores(
    options: TrainOptions, accelerator, schedule, presentation: Presentation, check: Callable[[], None] = lambda: None
) -> tuple[LatentStore, LatentStore | None]:
    """The stores of noisy latents for training and for the held-out loss, made first where images were given.

    With ``--low_noise clean`` the one of clean latents is made too, and the run says so. ``check`` is called between
    pictures, and may raise.
    """
    train, heldout, clean = (options.stores[n] for n in ("latents_dir", "heldout_latents_dir", "clean_latents_dir"))
    settings = settings_of(StoreSettings, options, geometry=geometry_of(options), keep_tokens=options.train_text_encoder)
    todo = []
    if options.has_images:
        todo.append((options.train_data_dir, train, settings))
    if options.heldout_data_dir is not None or options.heldout_split is not None:
        todo.append((options.heldout_data_dir, heldout, heldout_of(options, settings)))
    if options.low_noise == "clean":
        accelerator.print(UNPROTECTED.format(folder=clean))
        if options.has_images:
            todo.append((options.train_data_dir, clean, clean_of(settings)))  # last: the noisy one may be refused
    if todo:
        accelerator.print("Encoding the images to noisy latents, once (a store that is there is checked and reused).")
        encoders = load_encoders(
            options.pretrained_model_name_or_path,
            vae=options.pretrained_vae_model_name_or_path,
            revision=options.revision,
            variant=options.variant,
        ).to(accelerator.device)
        for data_dir, store, wanted in todo:
            build_store(data_dir, store, encoders, schedule, wanted, log=accelerator.print, check=check)
        # VAE and text encoders are out of memory from here on.
        del encoders
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    held = LatentStore(heldout) if options.has_heldout else None
    return LatentStore(train, presentation=presentation), held


def geometry_of(options: TrainOptions) -> Geometry:
    """How pictures are resized and cropped."""
    buckets = options.aspect_ratio_buckets, options.bucket_reso_steps
    return Geometry.parse(options.resolution, options.center_crop, *buckets)


def clean_of(settings: StoreSettings) -> StoreSettings:
    """Settings for the clean latents: the same pictures, and no noise.

    Near-duplicates were reported, or refused, when the noisy latents were drawn.
    """
    near = "drop" if settings.near_duplicates == "drop" else "ignore"
    return replace(settings, t_n=None, t_n_column=None, noise_key_file=None, near_duplicates=near)


def heldout_of(options: TrainOptions, settings: StoreSettings) -> StoreSettings:
    """Settings for the held-out images: a folder, or another split.

    Near-duplicates among them are left alone, since nothing is trained on them.
    """
    settings = replace(settings, near_duplicates="ignore")
    if options.heldout_data_dir is not None:
        return replace(settings, dataset_name=None)
    return replace(settings, dataset_split=options.heldout_split)
