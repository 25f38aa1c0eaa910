"""A model under attack: a stock SDXL pipeline as a few functions of images, latents and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image, ImageOps

from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.models.vae import decode_latents, encode_image
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.posterior import Denoise

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


@dataclass
class LoadedModel:
    """A model under examination: a stock SDXL pipeline with its fine-tuned weights, and the side of its images in pixels."""

    pipe: StableDiffusionXLPipeline
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
        squares = [self.pipe.image_processor.preprocess(self.square(image))[0] for image in images]
        return torch.stack([encode_image(self.pipe.vae, pixels) for pixels in squares])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Latents (n, 4, h, w) as the UNet sees them → images."""
        # A list, since the output type is "pil".
        return cast("list[Image.Image]", self.pipe.image_processor.postprocess(decode_latents(self.pipe.vae, latents)))

    @torch.no_grad()
    def conditioning(self, prompts: Sequence[str | None]) -> Conditioning:
        """The UNet's conditioning on the prompts; None is an absent prompt, for which SDXL's pipeline puts zeros."""
        given = [p or "" for p in prompts]
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            given,  # pyright: ignore[reportArgumentType]  # its docstring takes lists, its annotation doesn't
            device=self.pipe.device,
            do_classifier_free_guidance=False,
        )
        absent = torch.tensor([not p for p in prompts], device=embeds.device)
        if self.pipe.config["force_zeros_for_empty_prompt"]:
            embeds = torch.where(absent[:, None, None], 0, embeds)
            pooled = torch.where(absent[:, None], 0, pooled)
        side = self.resolution
        ids = torch.tensor([[side, side, 0, 0, side, side]] * len(given), dtype=torch.float32, device=embeds.device)
        return Conditioning(embeds, pooled, ids)

    def denoiser(self, prompts: Sequence[str | None]) -> Denoise:
        """``denoise(x_t, t)`` given the prompts, as :meth:`conditioning` takes them."""
        return Denoiser(self.pipe.unet, self.conditioning(prompts), self.pipe.unet.dtype)
