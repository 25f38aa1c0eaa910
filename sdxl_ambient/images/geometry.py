"""How a picture of any size becomes the pixels that are encoded: which target size, which scale, which crop.

Sizes are (height, width) in pixels everywhere.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdxl_ambient.errors import OptionError

Size = tuple[int, int]

MULTIPLE = 8  # what SDXL's VAE shrinks by; the model itself may need more
WIDEST = 4  # aspect ratios of automatic buckets are between 1/4 and 4
# The sizes that SDXL was trained on: Podell et al., arXiv 2307.01952, appendix I.
SDXL_BUCKETS: tuple[Size, ...] = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
    (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896),
    (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640),
    (1600, 640), (1664, 576), (1728, 576), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512),
)  # fmt: skip


def resized(size: Size, target: Size) -> Size:
    """Size of a picture after the resize: its own shape, just large enough to cover ``target``."""
    scale = max(want / side for want, side in zip(target, size, strict=True))
    height, width = (max(want, round(side * scale)) for want, side in zip(target, size, strict=True))
    return height, width


@dataclass(frozen=True)
class Geometry:
    """How a picture is cropped: to a square of side ``resolution``, or to the one of ``buckets`` nearest to its own shape;
    in the middle, or at a place of its own."""

    resolution: int
    center_crop: bool = True
    buckets: tuple[Size, ...] = ()

    @classmethod
    def parse(cls, resolution: int, center_crop: bool, buckets: str | None, bucket_step: int) -> Geometry:
        """With buckets as :func:`parse_buckets` reads them. Raises OptionError."""
        return cls(resolution, center_crop, parse_buckets(buckets, resolution, bucket_step))

    @property
    def targets(self) -> tuple[Size, ...]:
        """Every size that a picture can be cropped to."""
        return self.buckets or ((self.resolution, self.resolution),)

    def target(self, size: Size) -> Size:
        """Size that a picture of this size is cropped to: the nearest aspect ratio, then the larger area, then the first."""

        def rank(bucket: Size) -> tuple[Fraction, int]:
            # The larger ratio over the smaller orders buckets as the distance of the logarithms does, but exactly.
            a, b = size[0] * bucket[1], size[1] * bucket[0]
            return Fraction(max(a, b), min(a, b)), -bucket[0] * bucket[1]

        return min(self.targets, key=rank)

    def place(self, size: Size, content: str) -> tuple[Size, tuple[int, int]]:
        """Size of a picture → its size after the resize, and the crop's top and left, in pixels.

        The picture covers its target. Without ``center_crop`` the place follows from the content's hash, so that a picture
        has one crop for ever.
        """
        target = self.target(size)
        height, width = resized(size, target)
        free = height - target[0], width - target[1]
        if self.center_crop:
            return (height, width), (free[0] // 2, free[1] // 2)
        seed = int.from_bytes(hashlib.sha256(b"crop" + bytes.fromhex(content)).digest()[:8], "big")
        return (height, width), (seed % (free[0] + 1), (seed >> 32) % (free[1] + 1))

    def apply(self, image: Image.Image, content: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Picture → pixels (3, height, width) of its target, float32 in [−1, 1], and the crop's top and left."""
        size = image.height, image.width
        (height, width), (top, left) = self.place(size, content)
        target = self.target(size)
        # Pillow's Lanczos widens its filter when it shrinks, so fine detail doesn't alias.
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + target[1], top + target[0]))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1)
        return pixels.permute(2, 0, 1).contiguous(), (top, left)


def mirrored(time_ids: list[int]) -> list[int]:
    """Time ids of the mirrored picture: what was cut off on its right is now cut off on its left."""
    height, width, top, left, target_height, target_width = time_ids
    free = resized((height, width), (target_height, target_width))[1] - target_width
    # What another program cropped may not have covered its target closely.
    return [height, width, top, max(0, free - left), target_height, target_width]


def bucket_counts(images: Iterable[Mapping[str, Any]]) -> dict[Size, int]:
    """How many pictures of a store's manifest each size has, smallest height first."""
    return dict(sorted(Counter(size_of(i) for i in images).items()))


def size_of(entry: Mapping[str, Any]) -> Size:
    """The size that a picture of a store's manifest was cropped to: the end of its time ids."""
    height, width = entry["time_ids"][4:6]
    return height, width


# -- the list of sizes ----------------------------------------------------------------------


def parse_buckets(text: str | None, resolution: int, step: int) -> tuple[Size, ...]:
    """``--aspect_ratio_buckets`` → sizes; none for None. ``step`` is --bucket_reso_steps.

    Raises:
        OptionError: malformed, a side that is not a multiple of 8, a size given twice, or steps that don't fit.
    """
    if text is None:
        return ()
    if text.strip().lower() != "auto":
        return explicit(text)
    if step % MULTIPLE:
        raise OptionError(f"--bucket_reso_steps: {step} is not a multiple of {MULTIPLE}")
    if resolution % step:
        raise OptionError(f"--bucket_reso_steps: {step} does not divide --resolution {resolution}")
    return SDXL_BUCKETS if (resolution, step) == (1024, 64) else automatic(resolution, step)


def explicit(text: str) -> tuple[Size, ...]:
    """Sizes of the form "h,w;h,w", as diffusers' scripts take them."""
    sizes: list[Size] = []
    for pair in text.split(";"):
        sides = [side.strip() for side in pair.split(",")]
        if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise OptionError(f"--aspect_ratio_buckets: {pair.strip()!r} is not a size; allowed is 'h,w;h,w' or auto")
        size = int(sides[0]), int(sides[1])
        if size[0] % MULTIPLE or size[1] % MULTIPLE:
            raise OptionError(f"--aspect_ratio_buckets: {pair.strip()!r} has a side that is not a multiple of {MULTIPLE}")
        if size in sizes:
            raise OptionError(f"--aspect_ratio_buckets: {pair.strip()!r} is given twice")
        sizes.append(size)
    return tuple(sizes)


def automatic(resolution: int, step: int) -> tuple[Size, ...]:
    """Sizes of at most resolution² pixels, the widest first: for every side the longest other side, lying and upright."""
    sides = range(step, WIDEST * resolution + 1, step)
    longest = [(side, resolution**2 // side // step * step) for side in sides]
    allowed = {(a, b) for a, b in longest if b and max(a, b) <= WIDEST * min(a, b)}
    return tuple(sorted(allowed | {(b, a) for a, b in allowed}, key=lambda size: size[0] / size[1]))
