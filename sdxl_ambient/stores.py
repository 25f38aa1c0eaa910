"""The stores of noisy latents that a training run reads: opened, and made first where images were given."""

from __future__ import annotations

from pathlib import Path

import torch

from sdxl_ambient.data import LatentStore
from sdxl_ambient.latents import build_store
from sdxl_ambient.models import load_encoders
from sdxl_ambient.options import TrainOptions


def open_stores(options: TrainOptions, accelerator, schedule) -> tuple[LatentStore, LatentStore | None]:
    """The stores of noisy latents for training and for the held-out loss, made first where images were given."""
    output = Path(options.output_dir)
    train = Path(options.latents_dir or output / "latents")
    heldout = Path(options.heldout_latents_dir or output / "latents_heldout")
    todo = [(d, s) for d, s in ((options.train_data_dir, train), (options.heldout_data_dir, heldout)) if d is not None]
    if todo:
        accelerator.print("Encoding the images to noisy latents, once (a store that is there is checked and reused).")
        encoders = load_encoders(
            options.pretrained_model_name_or_path,
            vae=options.pretrained_vae_model_name_or_path,
            revision=options.revision,
            variant=options.variant,
        ).to(accelerator.device)
        for data_dir, store in todo:
            build_store(
                data_dir,
                store,
                encoders,
                schedule,
                options.geometry(),
                **options.of_a_store(),
                say=accelerator.print,
            )
        # VAE and text encoders are out of memory from here on.
        del encoders
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    has_heldout = options.heldout_data_dir is not None or options.heldout_latents_dir is not None
    return LatentStore(train), LatentStore(heldout, options.heldout_samples) if has_heldout else None
