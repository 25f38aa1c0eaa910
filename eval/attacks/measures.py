"""What the fine-tuned network says about single images: denoising errors per noise level, reconstructions from noise, and
how much a caption moves its predictions.

All look at the weights directly, whatever sampler the user has: an image that was memorised is denoised better than one like
it that was not, comes back from noise that should have hidden it, and its caption pulls harder. Noise is shared: an image's
depends on its file, the level and the seed (:func:`sdxl_ambient.randomness.attack_generator`), so that models are compared
on equal noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eval.choices import ATTACK_MODES
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.posterior import Denoise, at_least_float32, posterior_mean, sample_posterior, spaced_times
from sdxl_ambient.randomness import Randomness


@torch.no_grad()
def denoising_errors(
    denoise: Denoise, schedule: NoiseSchedule, x_0: torch.Tensor, t: int, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Mean squared error of ε̂ per image, (n,) float32: ‖ε − ε̂(α_t x_0 + σ_t ε, t)‖² / d with each image's own noise.

    Lower on members than on others is what membership inference on diffusion models rests on (Carlini et al. 2023, arXiv
    2301.13188, §7; Duan et al. 2023, arXiv 2302.01316).
    """
    level, clean = (torch.full((len(x_0),), value, device=x_0.device) for value in (t, CLEAN))
    noise = Randomness(list(generators), len(x_0)).normal(x_0)
    x_t = schedule.renoise(x_0, clean, level, noise)
    epsilon = schedule.epsilon(at_least_float32(denoise(x_t, level)), x_t, level)
    return (noise - epsilon).square().flatten(1).mean(1)


@torch.no_grad()
def reconstruct(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_0: torch.Tensor,
    t: int,
    generators: Sequence[torch.Generator],
    mode: str,
    steps: int = 25,
) -> torch.Tensor:
    """The noise attack: noise latents to timestep ``t`` and denoise them again, like ``x_0`` (n, 4, h, w).

    "one_step" gives x̂_0 = E[x_0|x_t] (arXiv 2404.10177, §5, at t = 900); "posterior" a sample of p(x_0|x_t) by ``steps``
    reverse steps, which shows detail where the mean is a blur.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ATTACK_MODES:
        raise ValueError(f"mode: {mode!r} is not one of {', '.join(ATTACK_MODES)}")
    randomness = Randomness(list(generators), len(x_0))
    level, clean = (torch.full((len(x_0),), value, device=x_0.device) for value in (t, CLEAN))
    x_t = schedule.renoise(x_0, clean, level, randomness.normal(x_0))
    if mode == "one_step":
        return posterior_mean(denoise, schedule, x_t, level)
    return sample_posterior(denoise, schedule, x_t, level.cpu(), steps, randomness)


@torch.no_grad()
def conditional_magnitude(
    with_prompt: Denoise, without: Denoise, schedule: NoiseSchedule, noise: torch.Tensor, steps: int, guidance_scale: float
) -> torch.Tensor:
    """Mean over the sampling steps of ‖ε̂(x_t, c) − ε̂(x_t, ∅)‖₂, (n,) like ``noise``: how hard a caption pulls.

    Wen et al. 2024, *Detecting, Explaining, and Mitigating Memorization in Diffusion Models* (ICLR), §3: memorised
    captions pull the prediction away from the unconditional one at every step, whatever the initial noise. x_t runs along
    the guided trajectory from ``noise`` at the last timestep, ε̂ = ε̂(∅) + w (ε̂(c) − ε̂(∅)), with w = 1, the conditional one,
    for a ``guidance_scale`` up to 1 as in diffusers. The steps are deterministic ones between evenly spaced times,
    x_s = α_s x̂_0 + σ_s ε̂ (DDIM with η = 0, Song et al. 2021, arXiv 2010.02502, eq. 12), not the base model's scheduler: all
    randomness is then the initial noise, and models with different schedulers take the same steps.

    Args:
        with_prompt, without: the network given each image's caption, and given none.
        noise: standard normal (n, 4, h, w). steps: evaluations of each of the two.
    """
    x, magnitude, scale = noise, noise.new_zeros(len(noise)), max(1.0, guidance_scale)
    last = torch.full((len(x),), schedule.num_timesteps - 1)
    times = spaced_times(last, torch.full_like(last, CLEAN), steps)
    for t, s in zip(times[:-1].to(x.device), times[1:].to(x.device), strict=True):
        conditional, unconditional = (at_least_float32(denoise(x, t)) for denoise in (with_prompt, without))
        pull = schedule.epsilon(conditional, x, t) - schedule.epsilon(unconditional, x, t)
        magnitude = magnitude + pull.flatten(1).norm(dim=1) / steps
        # All that networks predict is affine in ε for a given x_t, so that guiding the raw output guides ε̂.
        output = unconditional + scale * (conditional - unconditional)
        epsilon, x_0 = schedule.epsilon(output, x, t), schedule.denoised(output, x, t)
        x = schedule.observe(x_0, s, epsilon)
    return magnitude
