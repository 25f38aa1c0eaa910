"""The UNet as the function that the objective and the samplers call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    """The UNet as ``denoise(x_t, t)`` for a batch whose conditioning it holds. So the objective never sees diffusers."""

    def __init__(self, unet: Callable[..., Any], conditioning: Conditioning, dtype: torch.dtype = torch.float32):
        self.unet, self.dtype = unet, dtype
        self.conditioning = conditioning

    @property
    def device(self) -> torch.device:
        return self.conditioning.prompt_embeds.device

    def rows(self, index: slice | list[int]) -> Denoiser:
        """The same for some samples of the batch."""
        return Denoiser(self.unet, self.conditioning.rows(index), self.dtype)

    def repeated(self, times: int) -> Denoiser:
        """The same for the whole batch, ``times`` times in a row."""
        rows = list(range(len(self.conditioning.prompt_embeds))) * times
        return self.rows(rows)

    def followed_by(self, conditioning: Conditioning) -> Denoiser:
        """The same for this batch and another one after it."""
        return Denoiser(self.unet, self.conditioning.followed_by(conditioning), self.dtype)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t (batch, 4, h, w), t (batch,) timesteps → the network's raw output, like x_t.

        Raises:
            ValueError: another number of rows than the conditioning's. See :meth:`rows` and :meth:`repeated`.
        """
        batch = len(self.conditioning.prompt_embeds)
        if len(x_t) != batch:
            raise ValueError(f"{len(x_t)} rows with conditioning for {batch}")
        return self.unet(
            x_t.to(self.dtype),
            t,
            encoder_hidden_states=self.conditioning.prompt_embeds,
            added_cond_kwargs={"text_embeds": self.conditioning.pooled, "time_ids": self.conditioning.time_ids},
            return_dict=False,
        )[0]
