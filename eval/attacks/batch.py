"""A batch of images as the attacks take it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from eval.attacks.model import LoadedModel
from eval.attacks.settings import AttackSettings
from eval.embedders.registry import Embedder
from eval.embedding import normalised
from eval.images import ImageSet
from sdxl_ambient.errors import ImageError
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.randomness import attack_generator


@dataclass
class Batch:
    """Some images of one set, with what several attacks need of them."""

    model: LoadedModel
    embedder: Embedder
    images: ImageSet
    pictures: list[Image.Image]

    @cached_property
    def x_0(self) -> torch.Tensor:
        """Latents (n, 4, h, w) on the model's device."""
        return self.model.encode(self.pictures).to(self.model.pipe.device)

    @cached_property
    def sources(self) -> list[Image.Image]:
        """The pictures after the VAE's round trip, the nearest that the model can come to them."""
        return self.model.decode(self.x_0)

    @cached_property
    def source_features(self) -> np.ndarray:
        return self.embed(self.sources)

    def embed(self, pictures: list[Image.Image]) -> np.ndarray:
        """Unit vectors (n, d)."""
        return normalised(self.embedder.encode(torch.stack([self.embedder.prepare(p) for p in pictures])).numpy())

    def prompts(self, settings: AttackSettings) -> list[str | None]:
        return [record.caption if settings.attack_prompts == "caption" else None for record in self.images.records]

    def generators(self, t: int, settings: AttackSettings) -> list[torch.Generator]:
        return [attack_generator(digest, t, settings.seed) for digest in self.images.hashes]


def readable(images: ImageSet) -> tuple[ImageSet, list[Image.Image]]:
    """The images that can be opened, and their pictures; the others are listed as excluded."""
    kept, pictures, excluded = [], [], []
    for i, record in enumerate(images.records):
        try:
            pictures.append(load_rgb(record.path))
            kept.append(i)
        except ImageError as error:
            excluded.append({"file": images.name(i), "reason": str(error)})
    return images.subset(kept, excluded), pictures
