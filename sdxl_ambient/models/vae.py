"""Pixels → latents and back, by the VAE."""

from __future__ import annotations

import torch

from sdxl_ambient.errors import ModelError
from sdxl_ambient.images.geometry import Geometry


@torch.no_grad()
def encode_image(vae, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (3, H, W) in [−1, 1] → latent (4, H/8, W/8) as the UNet sees it, float32 on the CPU.

    The mean of the VAE's posterior, not a sample: a draw here would be one more unrecorded observation. One picture at a
    time, since the last bits of a convolution change with the batch.

    Raises:
        ModelError: the VAE gives NaN or infinity.
    """
    latent = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()
    if not bool(torch.isfinite(latent).all()):
        raise ModelError(f"the VAE gives values that are not finite in {vae.dtype}; its weights are damaged or unsafe")
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latent = (latent - latent.new_tensor(mean).view(1, -1, 1, 1)) / latent.new_tensor(std).view(1, -1, 1, 1)
    return (latent * vae.config.scaling_factor)[0].float().cpu()


@torch.no_grad()
def decode_latents(vae, latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, 4, h, w) as the UNet sees them → float32 pixels (n, 3, 8h, 8w) in about [−1, 1]."""
    latents = latents / vae.config.scaling_factor
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latents = latents * latents.new_tensor(std).view(1, -1, 1, 1) + latents.new_tensor(mean).view(1, -1, 1, 1)
    return vae.decode(latents.to(vae.device, vae.dtype)).sample.float()


def check_geometry(geometry: Geometry, vae) -> None:
    """Every size that pictures are cropped to must fit the model. Raises ModelError."""
    check_resolution(geometry.resolution, vae)
    for side in sorted({side for size in geometry.buckets for side in size}):
        check_resolution(side, vae, "aspect_ratio_buckets")


def check_resolution(resolution: int, vae, option: str = "resolution") -> None:
    """The side must be a multiple of the VAE's factor times what the UNet halves twice (8 × 4 = 32 pixels for SDXL)."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % (factor * 4):
        raise ModelError(f"--{option}: {resolution} is not a multiple of {factor * 4}, which this model needs")
