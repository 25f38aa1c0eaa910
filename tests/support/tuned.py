"""A UNet with a LoRA, and what it gives."""

import copy

import torch

from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.models.lora import add_lora


@torch.no_grad()
def output(unet, inputs):
    return Denoiser(unet.eval(), inputs[2])(*inputs[:2])


def with_lora(unet, seed=0, rank=4, alpha=16.0, targets=("attention",), use_dora=False):
    """A copy of the UNet with a LoRA whose every weight is as if trained."""
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=rank, alpha=alpha, targets=list(targets), use_dora=use_dora)
    generator = torch.Generator().manual_seed(seed)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return tuned


def unet_inputs(unet):
    """x_t, t and conditioning, for two samples."""
    generator = torch.Generator().manual_seed(0)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditioning = Conditioning(
        torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator),
        torch.randn(2, pooled, generator=generator),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    )
    return torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([3, 900]), conditioning
