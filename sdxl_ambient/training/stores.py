"""The stores that a training run reads: opened, and made first where images were given.

They hold noisy latents, but for the one of ``--low_noise clean``, which is a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.reader import LatentStore, Presentation

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
    todo = []
    if options.has_images:
        todo.append((options.train_data_dir, train, options.of_a_store()))
    if options.heldout_data_dir is not None or options.heldout_split is not None:
        todo.append((options.heldout_data_dir, heldout, heldout_of(options)))
    if options.low_noise == "clean":
        accelerator.print(UNPROTECTED.format(folder=clean))
        if options.has_images:
            todo.append((options.train_data_dir, clean, clean_of(options)))  # last: the noisy one may be refused
    if todo:
        accelerator.print("Encoding the images to noisy latents, once (a store that is there is checked and reused).")
        encoders = load_encoders(
            options.pretrained_model_name_or_path,
            vae=options.pretrained_vae_model_name_or_path,
            revision=options.revision,
            variant=options.variant,
        ).to(accelerator.device)
        how = dict(keep_tokens=options.train_text_encoder, log=accelerator.print, check=check)
        for data_dir, store, told in todo:
            build_store(data_dir, store, encoders, schedule, options.geometry(), **told, **how)
        # VAE and text encoders are out of memory from here on.
        del encoders
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    held = LatentStore(heldout) if options.has_heldout else None
    return LatentStore(train, presentation=presentation), held


def clean_of(options: TrainOptions) -> dict:
    """What :func:`sdxl_ambient.store.build.build_store` is told of the clean latents: the same pictures, and no noise.

    Near-duplicates were reported, or refused, when the noisy latents were drawn.
    """
    near = "drop" if options.near_duplicates == "drop" else "ignore"
    return {**options.of_a_store(), "t_n": None, "t_n_column": None, "noise_key_file": None, "near_duplicates": near}


def heldout_of(options: TrainOptions) -> dict:
    """What :func:`sdxl_ambient.store.build.build_store` is told of the held-out images: a folder, or another split.

    Near-duplicates among them are left alone, since nothing is trained on them.
    """
    told = {**options.of_a_store(), "near_duplicates": "ignore"}
    if options.heldout_data_dir is not None:
        return {**told, "dataset_name": None}
    return {**told, "dataset_split": options.heldout_split}
