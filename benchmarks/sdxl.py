"""SDXL as stable-diffusion-xl-base-1.0 configures it: its noise schedule, and its networks with random weights."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_ambient.formats.names import SDXL_UNET
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.noise import NoiseSchedule


def sdxl_schedule() -> NoiseSchedule:
    """SDXL's noise schedule, for ε prediction."""
    return NoiseSchedule.from_scheduler(
        DDPMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    )


def sdxl(dtype):
    """UNet and encoders with random weights; and the latent's side, the embeddings' width and the pooled one's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 2.6 billion weights once, in the precision they are used in
    unet = UNet2DConditionModel(**SDXL_UNET, sample_size=128)
    first = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                       projection_dim=1280, hidden_act="gelu")
    )  # fmt: skip
    vae = sdxl_vae(dtype=torch.float32)
    torch.set_default_dtype(before)
    encoders = Encoders(vae, (), (first, second))
    for module in (vae, first, second):
        module.requires_grad_(False).eval()
    return unet, encoders, 128, 2048, 1280


def sdxl_vae(dtype) -> AutoencoderKL:
    """SDXL's VAE with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    blocks: dict[str, Any] = dict(  # diffusers annotates tuples of any length as of length one
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    vae = AutoencoderKL(layers_per_block=2, latent_channels=4, sample_size=1024, **blocks)
    torch.set_default_dtype(before)
    return vae.requires_grad_(False).eval()
