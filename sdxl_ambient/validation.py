"""What is looked at during training: the ambient loss on held-out images, and images drawn at fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sdxl_ambient.data import LatentStore, collate, sample_generator
from sdxl_ambient.manifest import atomic
from sdxl_ambient.models import Denoiser
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.objective import ObjectiveOptions, ambient_objective
from sdxl_ambient.pipeline import load_pipeline, sample


@torch.no_grad()
def heldout_loss(
    accelerator,
    unet,
    schedule: NoiseSchedule,
    store: LatentStore,
    options: ObjectiveOptions,
    *,
    batch_size: int,
    dtype: torch.dtype,
) -> float:
    """Mean ambient loss over a store of held-out images. All processes call it; each takes a share.

    It needs no clean image. Times and noise of every image are the same at each call, so that two steps of a run, or two
    runs at one t_n, can be compared without the noise of the draw.
    """
    # The ambient loss alone: weights and what is done below t_n would make it incomparable between runs.
    plain = ObjectiveOptions(loss_space=options.loss_space)
    was_training = unet.training
    unet.eval()
    total = torch.zeros((), dtype=torch.float64)
    mine = range(accelerator.process_index, len(store), accelerator.num_processes)
    for start in range(0, len(mine), batch_size):
        batch = collate([store[i, i] for i in mine[start : start + batch_size]])
        generators = [sample_generator(0, "heldout", i) for i in batch.positions]
        denoise = Denoiser(unet, batch.conditioning.to(accelerator.device, dtype), dtype)
        with accelerator.autocast():
            losses = ambient_objective(denoise, schedule, batch.x_n.to(accelerator.device), batch.t_n, generators, plain)
        total += losses.ambient.double().sum().cpu()
    unet.train(was_training)
    return float(accelerator.reduce(total.float().to(accelerator.device), "sum")) / len(store)


@torch.no_grad()
def validation_images(
    accelerator,
    unet,
    base: str,
    folder: Path,
    prompts: Sequence[str],
    *,
    count: int,
    sampler: str,
    t_n: int | None,
    steps: int,
    seed: int,
    full_finetune: bool,
    vae: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> dict[str, list]:
    """Draw ``count`` images per prompt into ``folder`` at seeds that never change. Returns prompt → PIL images.

    VAE and text encoders are loaded for this and dropped again.
    """
    where = dict(vae=vae, revision=revision, variant=variant)
    was_training = unet.training
    pipe = load_pipeline(base, dtype=unet.dtype, device=accelerator.device, **where)
    base_unet = pipe.unet if sampler == "hybrid" and full_finetune else None
    pipe.unet = unet.eval()
    drawn = {}
    try:
        for i, prompt in enumerate(prompts):
            generators = [sample_generator(seed, "validation", i * count + k) for k in range(count)]
            with accelerator.autocast():
                images = sample(
                    pipe,
                    [prompt] * count,
                    sampler=sampler,
                    t_n=t_n,
                    base_unet=base_unet,
                    generators=generators,
                    num_inference_steps=steps,
                )
            for k, image in enumerate(images):
                with atomic(folder / f"{i:02d}-{k:02d}.png") as temporary:
                    image.save(temporary)
            drawn[prompt] = images
    finally:
        unet.train(was_training)
        del pipe
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return drawn


def track_images(accelerator, drawn: dict, step: int) -> None:
    """Show images (prompt → PIL images) in the trackers that take them."""
    import numpy as np

    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            for prompt, images in drawn.items():
                tracker.writer.add_images(prompt, np.stack([np.asarray(i) for i in images]), step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": [wandb.Image(i, caption=p) for p, im in drawn.items() for i in im]}, step=step)
