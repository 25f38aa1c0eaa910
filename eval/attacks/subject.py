"""What the fine-tuned network says about single images: denoising errors per noise level, reconstructions from noise, and
how much a caption moves its predictions.

All ask the weights directly, whatever sampler the user has: an image that was memorised is denoised better than one like
it that was not, comes back from noise that should have hidden it, and its caption pulls harder. Noise is shared: an image's
depends on its file, the level and the seed, so that models are compared on equal questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

from eval.choices import ATTACK_MODES
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.posterior import Denoise, at_least_float32, posterior_mean, sample_posterior, spaced_times
from sdxl_ambient.randomness import Randomness


def image_generator(digest: str, t: int, seed: int) -> torch.Generator:
    """The noise of an image, by the SHA-256 of its file, at timestep ``t``."""
    digest = hashlib.sha256(f"{digest} {t} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass
class LoadedModel:
    """A model under examination: a stock SDXL pipeline with its fine-tuned weights, and the side of its images in pixels."""

    pipe: object
    resolution: int

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_scheduler(self.pipe.scheduler)

    def square(self, image: Image.Image) -> Image.Image:
        """The image, resized and cropped to the model's square. One that already is comes back as it was."""
        return ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.LANCZOS)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one image: channels, height, width."""
        side = self.resolution // self.pipe.vae_scale_factor
        return self.pipe.vae.config.latent_channels, side, side

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Images, resized and cropped to a square, → latents (n, 4, h, w) as the UNet sees them, float32 on the CPU."""
        from sdxl_ambient.models.vae import encode_image

        squares = [self.pipe.image_processor.preprocess(self.square(image))[0] for image in images]
        return torch.stack([encode_image(self.pipe.vae, pixels) for pixels in squares])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents (n, 4, h, w) as the UNet sees them → images."""
        from sdxl_ambient.models.vae import decode_latents

        return self.pipe.image_processor.postprocess(decode_latents(self.pipe.vae, latents))

    @torch.no_grad()
    def conditioning(self, prompts: Sequence[str | None]) -> Conditioning:
        """What the UNet is told given the prompts; None is an absent prompt, which SDXL's pipeline answers with zeros."""
        given = [p or "" for p in prompts]
        embeds, _, pooled, _ = self.pipe.encode_prompt(given, device=self.pipe.device, do_classifier_free_guidance=False)
        absent = torch.tensor([not p for p in prompts], device=embeds.device)
        if self.pipe.config.force_zeros_for_empty_prompt:
            embeds = torch.where(absent[:, None, None], 0, embeds)
            pooled = torch.where(absent[:, None], 0, pooled)
        side = self.resolution
        ids = torch.tensor([[side, side, 0, 0, side, side]] * len(given), dtype=torch.float32, device=embeds.device)
        return Conditioning(embeds, pooled, ids)

    def denoiser(self, prompts: Sequence[str | None]) -> Denoise:
        """``denoise(x_t, t)`` given the prompts, as :meth:`conditioning` tells them."""
        return Denoiser(self.pipe.unet, self.conditioning(prompts), self.pipe.unet.dtype)


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
    randomness is then the initial noise, and models with different schedulers are asked the same.

    Args:
        with_prompt, without: the network given each image's caption, and given none.
        noise: standard normal (n, 4, h, w). steps: evaluations of each of the two.
    """
    x, magnitude, scale = noise, 0.0, max(1.0, guidance_scale)
    last = torch.full((len(x),), schedule.num_timesteps - 1)
    times = spaced_times(last, torch.full_like(last, CLEAN), steps)
    for t, s in zip(times[:-1].to(x.device), times[1:].to(x.device), strict=True):
        told, untold = (at_least_float32(denoise(x, t)) for denoise in (with_prompt, without))
        pull = schedule.epsilon(told, x, t) - schedule.epsilon(untold, x, t)
        magnitude = magnitude + pull.flatten(1).norm(dim=1) / steps
        # All that networks predict is affine in ε for a given x_t, so that guiding the raw output guides ε̂.
        guided = untold + scale * (told - untold)
        epsilon, x_0 = schedule.epsilon(guided, x, t), schedule.denoised(guided, x, t)
        x = schedule.observe(x_0, s, epsilon)
    return magnitude
