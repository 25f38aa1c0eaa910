"""The stores of noisy latents that a training run reads: opened, and made first where images were given."""

from __future__ import annotations

from pathlib import Path

import torch

from sdxl_ambient.data import LatentStore, Showing
from sdxl_ambient.latents import build_store
from sdxl_ambient.models import load_encoders
from sdxl_ambient.options import TrainOptions


def open_stores(options: TrainOptions, accelerator, schedule, showing: Showing) -> tuple[LatentStore, LatentStore | None]:
    """The stores of noisy latents for training and for the held-out loss, made first where images were given."""
    output = Path(options.output_dir)
    train = Path(options.latents_dir or output / "latents")
    heldout = Path(options.heldout_latents_dir or output / "latents_heldout")
    todo = []
    if options.has_images:
        todo.append((options.train_data_dir, train, options.of_a_store()))
    if options.heldout_data_dir is not None or options.heldout_split is not None:
        todo.append((options.heldout_data_dir, heldout, heldout_of(options)))
    if todo:
        accelerator.print("Encoding the images to noisy latents, once (a store that is there is checked and reused).")
        encoders = load_encoders(
            options.pretrained_model_name_or_path,
            vae=options.pretrained_vae_model_name_or_path,
            revision=options.revision,
            variant=options.variant,
        ).to(accelerator.device)
        how = dict(keep_tokens=options.train_text_encoder, say=accelerator.print)
        for data_dir, store, told in todo:
            build_store(data_dir, store, encoders, schedule, options.geometry(), **told, **how)
        # VAE and text encoders are out of memory from here on.
        del encoders
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    held = LatentStore(heldout) if options.has_heldout else None
    return LatentStore(train, showing=showing), held


def heldout_of(options: TrainOptions) -> dict:
    """What :func:`sdxl_ambient.latents.build_store` is told of the held-out images: a folder, or another split.

    Near-duplicates among them are left alone, since nothing is trained on them.
    """
    told = {**options.of_a_store(), "near_duplicates": "ignore"}
    if options.heldout_data_dir is not None:
        return {**told, "dataset_name": None}
    return {**told, "dataset_split": options.heldout_split}
