"""Positive controls: training images put through what a copy goes through, to see how many the threshold finds.

``copy``  the image itself                      ``jpeg``  JPEG at quality 75
``flip``  mirrored                              ``crop``  the middle nine tenths of each side
``vae``   encoded and decoded by the model's own VAE: the ceiling for anything that the model draws

A threshold that does not find these proves nothing by finding nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image, ImageOps

from eval.embedders.registry import Embedder
from eval.embedding import Embedded, normalised
from eval.neighbours import nearest
from sdxl_ambient.images.load import load_rgb

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

MOST = 256  # training images that the controls are made of, at most
SOME = 64  # training images that are compared with their JPEG copies


def jpeg(image: Image.Image, quality: int = 75) -> Image.Image:
    """Through JPEG and back."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def centre_crop(image: Image.Image, share: float = 0.9) -> Image.Image:
    """The middle ``share`` of each side."""
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


Transform = Callable[[Image.Image], Image.Image]

TRANSFORMS: dict[str, Transform] = {
    "copy": lambda image: image,
    "jpeg": jpeg,
    "flip": ImageOps.mirror,
    "crop": centre_crop,
}


def vae_round_trip(vae: AutoencoderKL, resolution: int) -> Transform:
    """A function that resizes and crops an image to a square of ``resolution`` pixels, encodes and decodes it."""
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor()

    @torch.no_grad()
    def through(image: Image.Image) -> Image.Image:
        square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
        pixels = processor.preprocess(square).to(vae.device, vae.dtype)
        latents = cast(torch.FloatTensor, vae.encode(pixels, return_dict=False)[0].mode())
        decoded = vae.decode(latents, return_dict=False)[0].float()
        return cast("list[Image.Image]", processor.postprocess(decoded))[0]  # the output type is "pil"

    return through


def planted(
    train: Embedded,
    embedder: Embedder,
    transforms: dict[str, Transform],
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """For each transform, every changed training image's similarity to its nearest training image: (n,) float32.

    The images are taken evenly from the set, at most :data:`MOST` of them.
    """
    count = min(len(train), MOST)
    chosen = np.arange(count) * len(train) // count
    references = train.embeddings
    similarities: dict[str, list[np.ndarray]] = {name: [] for name in transforms}
    for start in range(0, count, batch_size):
        pictures = [load_rgb(train.images.records[i].path) for i in chosen[start : start + batch_size]]
        for name, change in transforms.items():
            batch = torch.stack([embedder.prepare(change(picture)) for picture in pictures])
            queries = normalised(embedder.encode(batch).numpy())
            similarities[name].append(nearest(queries, references, 1)[0][:, 0])
        if progress:
            progress(len(pictures))
    return {name: np.concatenate(parts) for name, parts in similarities.items()}


def recompressed(train: Embedded, embedder: Embedder, batch_size: int = 32) -> np.ndarray:
    """Similarities of training images to their own JPEG copies, (n,): how near one picture comes to itself.

    The images are taken evenly from the set, at most :data:`SOME` of them.
    """
    some = train.thinned(SOME)
    parts: list[np.ndarray] = []
    for start in range(0, len(some), batch_size):
        rows = slice(start, start + batch_size)
        pictures = [jpeg(load_rgb(record.path)) for record in some.images.records[rows]]
        features = normalised(embedder.encode(torch.stack([embedder.prepare(p) for p in pictures])).numpy())
        parts.append((features * some.embeddings[rows]).sum(1))
    return np.concatenate(parts)
