"""Colour profiles: what a file's numbers mean, converted to sRGB, which the model and every viewer take RGB for."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_MODES = frozenset({"RGB", "CMYK", "LAB", "L"})  # that profiles are of
_STEPS = 9  # of the colours that a profile is compared on, along each channel
_SAME = 2  # of 255: what rounding in a profile's tables makes of sRGB itself
UNREADABLE = "unreadable"


def to_srgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """An 8-bit picture as sRGB, and the name of the profile that it was converted from; None where nothing was to be done.

    A picture without a profile is taken for sRGB, as viewers do, and so is one whose profile can't be read or is of another
    kind of picture: its name is then ``unreadable``. Profiles that differ from sRGB by no more than their own rounding
    change no pixel. Relative colorimetric intent with black point compensation.
    """
    data = image.info.get("icc_profile")
    if not data:
        return image.convert("RGB"), None
    if image.mode not in _MODES:  # palettes, YCbCr, HSV, bits: their profile is that of the colours they stand for
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    name, transform = _transform(bytes(data), image.mode)
    if transform is None:
        return image.convert("RGB"), name
    return ImageCms.applyTransform(image, transform), name  # pyright: ignore[reportReturnType]


@functools.lru_cache(64)
def _transform(data: bytes, mode: str) -> tuple[str | None, ImageCms.ImageCmsTransform | None]:
    """A profile's name and its transform of pictures of a mode; no name for sRGB itself, no transform where none is used."""
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(data))
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if _changes(transform, mode):
            return ImageCms.getProfileDescription(profile).strip() or "a profile without a name", transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return UNREADABLE, None
    return None, None


def _changes(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform gives other colours than taking the numbers as they are."""
    steps = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    if mode == "L":
        colours = Image.fromarray(np.arange(256, dtype=np.uint8)[None], "L")
    else:
        grid = np.stack(np.meshgrid(*[steps] * len(mode)), -1).reshape(1, -1, len(mode))
        colours = Image.fromarray(grid, mode)
    plain = np.asarray(colours.convert("RGB"), np.int16)
    return bool(np.abs(np.asarray(ImageCms.applyTransform(colours, transform), np.int16) - plain).max() > _SAME)
