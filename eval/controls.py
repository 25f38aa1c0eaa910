"""Positive controls: training images put through what a copy goes through, to see how many the threshold finds.

``copy``  the image itself                      ``jpeg``  JPEG at quality 75
``flip``  mirrored                              ``crop``  the middle nine tenths of each side
``blur``  through half the resolution           ``vae``   encoded and decoded by the model's own VAE
``turn``  upside down                           ``border``  reduced to nine tenths, on white
``colour``  a third less saturated, a fifth brighter    ``quarter``  pasted into a quarter of a plain ground

The first six are on the list of what a verdict that clears a model must have seen. The others say what it is blind to.

A threshold that does not find these proves nothing by finding nothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from eval.embedders.registry import Embedder
from eval.embedding import Embedded, normalised
from eval.neighbours import nearest
from eval.views import Transform, centre_crop
from sdxl_ambient.images.load import load_rgb

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

NearestInTrain = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
MOST = 256  # training images that the controls are made of, at most
SOME = 64  # training images that are compared with their JPEG copies


def jpeg(image: Image.Image, quality: int = 75) -> Image.Image:
    """Through JPEG and back."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def blur(image: Image.Image) -> Image.Image:
    """Through half the resolution and back."""
    half = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS)
    return half.resize(image.size, Image.Resampling.BICUBIC)


def border(image: Image.Image) -> Image.Image:
    """Reduced to nine tenths, on white."""
    small = image.resize((max(1, image.width * 9 // 10), max(1, image.height * 9 // 10)), Image.Resampling.LANCZOS)
    framed = Image.new("RGB", image.size, "white")
    framed.paste(small, ((image.width - small.width) // 2, (image.height - small.height) // 2))
    return framed


def colour(image: Image.Image) -> Image.Image:
    """A third less saturated and a fifth brighter."""
    return ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(2 / 3)).enhance(1.2)


def quarter(image: Image.Image) -> Image.Image:
    """At half its size in the upper left quarter of a ground that goes from black to white."""
    ground = Image.linear_gradient("L").resize(image.size).convert("RGB")
    ground.paste(image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS), (0, 0))
    return ground


TRANSFORMS: dict[str, Transform] = {
    "copy": lambda image: image,
    "jpeg": jpeg,
    "blur": blur,
    "flip": ImageOps.mirror,
    "crop": centre_crop,
    "turn": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "border": border,
    "colour": colour,
    "quarter": quarter,
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
    nearest_in_train: NearestInTrain | None = None,
) -> dict[str, np.ndarray]:
    """For each transform, every changed training image's similarity to its nearest training image: (n,) float32.

    The images are taken evenly from the set, at most :data:`MOST` of them.

    Args:
        embedder: as samples are embedded. nearest_in_train: embeddings (m, d) → similarities (m,) and indices (m,); by
            default to the training images as they are.
    """
    search = nearest_in_train or (lambda queries: _nearest(queries, train.embeddings))
    count = min(len(train), MOST)
    chosen = np.arange(count) * len(train) // count
    similarities: dict[str, list[np.ndarray]] = {name: [] for name in transforms}
    for start in range(0, count, batch_size):
        pictures = [load_rgb(train.images.records[i].path) for i in chosen[start : start + batch_size]]
        for name, change in transforms.items():
            batch = torch.stack([embedder.prepare(change(picture)) for picture in pictures])
            queries = normalised(embedder.encode(batch).numpy())
            similarities[name].append(search(queries)[0])
        if progress:
            progress(len(pictures))
    return {name: np.concatenate(parts) for name, parts in similarities.items()}


def _nearest(queries: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    similarities, indices = nearest(queries, references, 1)
    return similarities[:, 0], indices[:, 0]


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
