"""The kinds of attack, each one score per image: the higher, the more the model knows of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from eval.attacks.batch import Batch
from eval.attacks.inpaint import hole, inpaint
from eval.attacks.measures import conditional_magnitude, denoising_errors, reconstruct
from eval.attacks.membership import Scores
from eval.attacks.settings import AttackSettings
from sdxl_ambient.randomness import Randomness, attack_generator


def noise_attack(batch: Batch, settings: AttackSettings) -> Scores:
    """``error/T`` mean squared errors of ε̂ and ``MODE/T`` similarities of each image to itself, (n,) each."""
    model, schedule = batch.model, batch.model.schedule
    scores: Scores = {}
    denoise = model.denoiser(batch.prompts(settings))
    for t in settings.attack_t:
        errors = denoising_errors(denoise, schedule, batch.x_0, t, batch.generators(t, settings))
        scores[f"error/{t}"] = errors.cpu().numpy()
        for mode in settings.attack_modes:
            generators = batch.generators(t, settings)
            back = reconstruct(denoise, schedule, batch.x_0, t, generators, mode, settings.attack_steps)
            similarity = batch.embed(model.decode(back)) * batch.source_features
            scores[f"{mode}/{t}"] = similarity.sum(1)
    return scores


def mask_attack(batch: Batch, settings: AttackSettings) -> Scores:
    """``mask`` similarities of what the hole was filled with to what was there after the VAE's round trip, (n,)."""
    model = batch.model
    box = hole(model.resolution, settings.mask_share, model.pipe.vae_scale_factor)
    squares = [model.square(picture) for picture in batch.pictures]
    # All of the hole is noise at first, as an image is at the last timestep.
    generators = batch.generators(model.schedule.num_timesteps - 1, settings)
    prompts = batch.prompts(settings)
    filled = inpaint(model, squares, prompts, generators, box, settings.attack_steps, settings.guidance_scale)
    patches, own = ([picture.crop(box) for picture in pictures] for pictures in (filled, batch.sources))
    return {"mask": (batch.embed(patches) * batch.embed(own)).sum(1)}


def magnitude_attack(batch: Batch, settings: AttackSettings) -> Scores:
    """``magnitude`` of the images that have a caption, (n,); nothing where none has one."""
    rows = [i for i, record in enumerate(batch.images.records) if record.caption]
    if not rows:
        return {}
    model, images = batch.model, batch.images.subset(rows)
    generators = [attack_generator(d, model.schedule.num_timesteps - 1, settings.seed) for d in images.hashes]
    like = torch.empty(len(rows), *model.latent_shape, device=model.pipe.device)
    captioned, free = (model.denoiser(p) for p in ([r.caption for r in images.records], [None] * len(rows)))
    noise = Randomness(generators, len(rows)).normal(like)
    steps, guidance = settings.attack_steps, settings.guidance_scale
    magnitudes = conditional_magnitude(captioned, free, model.schedule, noise, steps, guidance)
    return {"magnitude": magnitudes.cpu().numpy()}


KINDS: dict[str, Callable[[Batch, AttackSettings], Scores]] = {
    "noise": noise_attack,
    "mask": mask_attack,
    "magnitude": magnitude_attack,
}
