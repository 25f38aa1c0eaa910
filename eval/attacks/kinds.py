"""The kinds of attack, each one score per image: the higher, the more the model knows of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from eval.attacks.batch import Batch
from eval.attacks.inpaint import hole, inpaint
from eval.attacks.membership import Scores
from eval.attacks.options import AttackOptions
from eval.attacks.subject import conditional_magnitude, denoising_errors, image_generator, reconstruct
from sdxl_ambient.randomness import Randomness


def noise_attack(batch: Batch, options: AttackOptions) -> Scores:
    """``error/T`` mean squared errors of ε̂ and ``MODE/T`` similarities of each image to itself, (n,) each."""
    schedule, answers = batch.subject.schedule, {}
    denoise = batch.subject.denoiser(batch.prompts(options))
    for t in options.attack_t:
        errors = denoising_errors(denoise, schedule, batch.x_0, t, batch.generators(t, options))
        answers[f"error/{t}"] = errors.cpu().numpy()
        for mode in options.attack_modes:
            generators = batch.generators(t, options)
            back = reconstruct(denoise, schedule, batch.x_0, t, generators, mode, options.attack_steps)
            similarity = batch.embed(batch.subject.decode(back)) * batch.source_features
            answers[f"{mode}/{t}"] = similarity.sum(1)
    return answers


def mask_attack(batch: Batch, options: AttackOptions) -> Scores:
    """``mask`` similarities of what the hole was filled with to what was there after the VAE's round trip, (n,)."""
    subject = batch.subject
    box = hole(subject.resolution, options.mask_share, subject.pipe.vae_scale_factor)
    squares = [subject.square(picture) for picture in batch.pictures]
    # All of the hole is noise at first, as an image is at the last timestep.
    generators = batch.generators(subject.schedule.num_timesteps - 1, options)
    how = dict(steps=options.attack_steps, guidance_scale=options.guidance_scale)
    filled = inpaint(subject, squares, batch.prompts(options), generators, box, **how)
    patches, own = ([picture.crop(box) for picture in pictures] for pictures in (filled, batch.sources))
    return {"mask": (batch.embed(patches) * batch.embed(own)).sum(1)}


def magnitude_attack(batch: Batch, options: AttackOptions) -> Scores:
    """``magnitude`` of the images that have a caption, (n,); nothing where none has one."""
    rows = [i for i, record in enumerate(batch.images.records) if record.caption]
    if not rows:
        return {}
    subject, images = batch.subject, batch.images.subset(rows)
    generators = [image_generator(d, subject.schedule.num_timesteps - 1, options.seed) for d in images.hashes]
    like = torch.empty(len(rows), *subject.latent_shape, device=subject.pipe.device)
    told, untold = (subject.denoiser(p) for p in ([r.caption for r in images.records], [None] * len(rows)))
    noise = Randomness(generators, len(rows)).normal(like)
    how = dict(steps=options.attack_steps, guidance_scale=options.guidance_scale)
    return {"magnitude": conditional_magnitude(told, untold, subject.schedule, noise, **how).cpu().numpy()}


KINDS: dict[str, Callable] = {"noise": noise_attack, "mask": mask_attack, "magnitude": magnitude_attack}
