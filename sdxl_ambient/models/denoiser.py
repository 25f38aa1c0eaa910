"""The UNet as the function that the objective and the samplers call."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Conditioning:
    """What the UNet is told beside x_t and t. ``prompt_embeds`` (batch, tokens, width), ``pooled`` (batch, width),
    ``time_ids`` (batch, 6): original height and width, crop top and left, target height and width, in pixels."""

    prompt_embeds: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor

    def to(self, device, dtype: torch.dtype) -> Conditioning:
        """Embeddings in ``dtype``; the sizes stay float32, since bfloat16 rounds whole numbers above 256."""
        return Conditioning(
            self.prompt_embeds.to(device, dtype), self.pooled.to(device, dtype), self.time_ids.to(device, torch.float32)
        )

    def rows(self, index) -> Conditioning:
        """That of some samples: a slice or a list of their indices."""
        return Conditioning(self.prompt_embeds[index], self.pooled[index], self.time_ids[index])

    def followed_by(self, other: Conditioning) -> Conditioning:
        """That of this batch and another after it."""
        return Conditioning(
            torch.cat([self.prompt_embeds, other.prompt_embeds]),
            torch.cat([self.pooled, other.pooled]),
            torch.cat([self.time_ids, other.time_ids]),
        )


class Denoiser:
    """The UNet as ``denoise(x_t, t)``, so that the objective never sees diffusers."""

    def __init__(self, unet, conditioning: Conditioning, dtype: torch.dtype = torch.float32):
        self.unet, self.dtype = unet, dtype
        self.conditioning = conditioning

    @property
    def device(self) -> torch.device:
        return self.conditioning.prompt_embeds.device

    def rows(self, index) -> Denoiser:
        """The same for some samples of the batch."""
        return Denoiser(self.unet, self.conditioning.rows(index), self.dtype)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t (n, 4, h, w), t (n,) → the network's raw output, like x_t.

        Fewer rows than the batch's are its first ones; twice as many are the batch twice.

        Raises:
            ValueError: any other number of rows.
        """
        shown, batch = self.conditioning, len(self.conditioning.prompt_embeds)
        if len(x_t) == 2 * batch:
            shown = shown.followed_by(shown)
        elif len(x_t) <= batch:
            shown = shown.rows(slice(len(x_t)))
        else:
            raise ValueError(f"{len(x_t)} rows with conditioning for {batch}")
        return self.unet(
            x_t.to(self.dtype),
            t,
            encoder_hidden_states=shown.prompt_embeds,
            added_cond_kwargs={"text_embeds": shown.pooled, "time_ids": shown.time_ids},
            return_dict=False,
        )[0]
