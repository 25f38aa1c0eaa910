"""The mask attack: a square is cut out of an image and the model fills it in; how near is that to what was there?

A model that memorised an image completes it from its surroundings, where one that did not has to make something up. The
filling is stock inpainting: diffusers' ``StableDiffusionXLInpaintPipeline`` with the examined weights, at strength 1.

That pipeline shows a UNet of 4 channels the surroundings through latents of the *whole* image. The VAE's encoder has
attention over all of it, so that those latents hold traces of what the hole hides. Here the hole is painted over before
the image is encoded: nothing inside it can reach the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from eval.attacks.model import LoadedModel
from sdxl_ambient.errors import StageError
from sdxl_ambient.randomness import Randomness

Box = tuple[int, int, int, int]


def hole(side: int, share: float, cell: int) -> Box:
    """The hole in a square image: (left, top, right, bottom) in pixels, as PIL crops it.

    It lies in the middle, on the grid of latents, so that the masks of pixels and of latents are the same.

    Args:
        side: of the image in pixels. cell: pixels to a latent. share: the hole's side over the image's, in (0, 1); rounded
            to whole latents, at least one, with at least one around it.

    Raises:
        StageError: an image of fewer than three latents a side, or another share.
    """
    cells = side // cell
    if cells < 3 or not 0 < share < 1:
        raise StageError(
            f"--mask_share: an image of {cells} × {cells} latents has no place for a hole of {share} of its side"
        )
    size = min(max(1, round(share * cells)), cells - 2)
    start = (cells - size) // 2
    return start * cell, start * cell, (start + size) * cell, (start + size) * cell


def painted_over(image: Image.Image, box: Box) -> Image.Image:
    """The RGB image with the hole in one colour, the mean of the pixels around it: less of an edge than grey."""
    pixels = np.array(image)
    left, top, right, bottom = box
    ring = np.zeros(pixels.shape[:2], dtype=bool)
    ring[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
    ring[top:bottom, left:right] = False
    pixels[top:bottom, left:right] = pixels[ring].mean(0).round()
    return Image.fromarray(pixels)


@torch.no_grad()
def inpaint(
    model: LoadedModel,
    images: Sequence[Image.Image],
    prompts: Sequence[str | None],
    generators: Sequence[torch.Generator],
    box: Box,
    steps: int,
    guidance_scale: float,
) -> list[Image.Image]:
    """Square RGB images of the model's size with what is within ``box`` made anew, each from its own generator.

    The rest comes back as the VAE leaves it. Prompts may be None, as
    :meth:`eval.attacks.model.LoadedModel.conditioning` takes them.
    """
    latents = model.encode([painted_over(image, box) for image in images])
    noise = Randomness(list(generators), len(images)).normal(latents)
    conditional, unconditional = model.conditioning(prompts), model.conditioning([None] * len(prompts))
    device, dtype = model.pipe.device, model.pipe.unet.dtype
    # Latents in and latents out: given pixels, the stock pipeline leaves out latents_mean and latents_std when it encodes,
    # though not when it decodes, and casts a VAE that was loaded in float32 to the UNet's precision.
    filled = _stock(model)(
        image=latents.to(device),
        mask_image=_mask(model.resolution, box),
        latents=noise.to(device, dtype),
        generator=list(generators),
        prompt_embeds=conditional.prompt_embeds,
        pooled_prompt_embeds=conditional.pooled,
        negative_prompt_embeds=unconditional.prompt_embeds,
        negative_pooled_prompt_embeds=unconditional.pooled,
        # Without any prompt guidance changes nothing, and costs as much again.
        guidance_scale=guidance_scale if any(prompts) else 1.0,
        strength=1.0,
        num_inference_steps=steps,
        height=model.resolution,
        width=model.resolution,
        output_type="latent",
    ).images
    return model.decode(filled.float())


def _stock(model: LoadedModel) -> Callable[..., Any]:
    from diffusers import StableDiffusionXLInpaintPipeline

    # Not from_pipe, which casts the shared weights to float32; and a scheduler of its own, since it keeps its place.
    pipe = model.pipe
    parts = {**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    zeros = pipe.config["force_zeros_for_empty_prompt"]
    stock = StableDiffusionXLInpaintPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    return stock


def _mask(side: int, box: Box) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, box)
    return mask
