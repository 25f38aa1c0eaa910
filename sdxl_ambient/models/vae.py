"""The VAE: loaded, and called for pixels → latents and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from sdxl_ambient.errors import ModelError, one_line
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.models.finite import check_finite
from sdxl_ambient.models.libraries import LOADING_ERRORS, in_precision
from sdxl_ambient.models.parts import load_config, load_part
from sdxl_ambient.models.single_file import VAE, is_single_file, network_of, tensors

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # of a VAE


def load_vae(
    name_or_path: str | Path,
    vae: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
) -> AutoencoderKL:
    """The base model's VAE, or ``vae``: a folder of a VAE or one that holds it, or a .safetensors file. Frozen, evaluating.

    A file has no configuration; that of the base model's VAE holds for it.

    Args:
        dtype: float32 to encode: SDXL's own overflows in float16, and it runs once per picture.
        revision, variant: of the base model; they don't hold for ``vae``.

    Raises:
        ModelError: one that is missing or damaged.
    """
    if is_single_file(vae or name_or_path):
        return _from_file(vae or name_or_path, name_or_path, dtype, revision).requires_grad_(False).eval()
    subfolder: str | None = "vae"
    if vae is not None:
        name_or_path, revision, variant = vae, None, None
        subfolder = "vae" if (Path(vae) / "vae").is_dir() else None
    loaded = load_part(
        AutoencoderKL,
        name_or_path,
        "VAE",
        subfolder=subfolder,
        revision=revision,
        variant=variant,
        use_safetensors=True,
        **in_precision(dtype),
    )
    return loaded.requires_grad_(False).eval()


def _from_file(path: str | Path, base: str | Path, dtype: torch.dtype, revision: str | None) -> AutoencoderKL:
    """The VAE of a whole model's file, or a file of a VAE alone, in the original release's layout or in diffusers'.

    Raises:
        ModelError: no VAE in it, an incomplete or damaged one, or one of another architecture than the base's.
    """
    source = f"the VAE of {str(path)!r}"
    try:
        header = tensors(path, VAE) or tensors(path, "")
    except LOADING_ERRORS as error:
        raise ModelError(f"{source} can't be read: {one_line(error)}") from None
    try:
        weights = {name.removeprefix(VAE): tensor for name, tensor in header.items()}
        # Of a VAE's own training there may be more in its file: averages, a discriminator.
        weights = {name: tensor for name, tensor in weights.items() if name.startswith(_PARTS)}
        if not any(name.startswith("decoder.") for name in weights):
            advice = "; give one with --pretrained_vae_model_name_or_path" if path == base else ""
            raise ModelError(f"{source} can't be loaded: it holds none{advice}")
        config = load_config(AutoencoderKL, base, subfolder="vae", revision=revision)
        original = any(".mid.block_1." in name for name in weights)
        loaded = network_of(AutoencoderKL, weights, config, convert_ldm_vae_checkpoint if original else None, dtype)
    except ModelError:
        raise
    except LOADING_ERRORS as error:
        another = f"is incomplete, or of another architecture than that of {str(base)!r}"
        raise ModelError(f"{source} {another}: {one_line(error)}") from None
    check_finite(loaded.state_dict(), source)
    return loaded


@torch.no_grad()
def encode_image(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
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
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents (n, 4, h, w) as the UNet sees them → float32 pixels (n, 3, 8h, 8w) in about [−1, 1]."""
    latents = latents / vae.config.scaling_factor
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latents = latents * latents.new_tensor(std).view(1, -1, 1, 1) + latents.new_tensor(mean).view(1, -1, 1, 1)
    return vae.decode(latents.to(vae.device, vae.dtype)).sample.float()


def check_geometry(geometry: Geometry, vae: Any) -> None:
    """Every size that pictures are cropped to must fit the model. Raises ModelError."""
    check_resolution(geometry.resolution, vae)
    for side in sorted({side for size in geometry.buckets for side in size}):
        check_resolution(side, vae, "aspect_ratio_buckets")


def check_resolution(resolution: int, vae: Any, option: str = "resolution") -> None:
    """The side must be a multiple of the VAE's factor times what the UNet halves twice (8 × 4 = 32 pixels for SDXL).

    Raises:
        ModelError: it isn't. The message names ``option``.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution % (factor * 4):
        raise ModelError(f"--{option}: {resolution} is not a multiple of {factor * 4}, which this model needs")
