"""The few ways in which a copy may show a training picture: as it is, mirrored, and its middle; cropped as samples are.

A similarity is the best over them. Null, threshold and planted copies are made with the same views, so that what they let
through by chance is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from PIL import Image, ImageOps

from eval.embedders.registry import Embedder
from eval.images import ImageSet
from sdxl_ambient.images.load import load_rgb

Transform = Callable[[Image.Image], Image.Image]
MIDDLE = 0.9  # of each side
_SAME_SHAPE = 0.05  # aspect ratios that differ by less are one
SOME = 32  # pictures of a set whose shapes are looked at


def centre_crop(image: Image.Image, share: float = MIDDLE) -> Image.Image:
    """The middle ``share`` of each side."""
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def fit(image: Image.Image, aspect: float) -> Image.Image:
    """The largest middle part of this aspect ratio (width by height), as the trainer and the sampler crop."""
    if abs(image.width / image.height / aspect - 1) < _SAME_SHAPE:
        return image
    width, height = min(image.width, image.height * aspect), min(image.height, image.width / aspect)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


# Beside the picture itself.
VIEWS: dict[str, Transform] = {
    "mirrored": ImageOps.mirror,
    "middle": centre_crop,
    "middle, mirrored": lambda image: ImageOps.mirror(centre_crop(image)),
}


def aspect_of(sets: Iterable[ImageSet], default: float = 1.0) -> float:
    """The most frequent aspect ratio of generated images."""
    sizes = Counter(size for images in sets for size in _sizes(images))
    if not sizes:
        return default
    width, height = sizes.most_common(1)[0][0]
    return width / height


def differs(images: ImageSet, aspect: float) -> bool:
    """Whether some pictures of a set have another shape than the samples."""
    return any(abs(width / height / aspect - 1) >= _SAME_SHAPE for width, height in _sizes(images))


def _sizes(images: ImageSet) -> list[tuple[int, int]]:
    return [load_rgb(record.path).size for record in images.thinned(SOME).records]


def through(embedder: Embedder, name: str, *transforms: Transform) -> Embedder:
    """The embedder of pictures that were changed first; it has a cache of its own."""

    def preparing(image: Image.Image):
        for transform in transforms:
            image = transform(image)
        return embedder.prepare(image)

    return replace(embedder, preprocessing={**embedder.preprocessing, "view": name}, preparing=preparing)
