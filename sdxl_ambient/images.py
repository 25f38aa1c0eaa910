"""Image files → RGB pictures as a person sees them, with a clear reason for each one that can't be used."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MINIMUM_SIDE = 8  # pixels; below this the VAE has nothing to encode
MAXIMUM_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow takes a picture for a decompression bomb
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class ImageError(ValueError):
    """An image that can't be used; the message is the reason."""


class ImagesMissing(ValueError):
    """A folder without a single usable entry, or with broken metadata."""


@dataclass(frozen=True)
class Record:
    """One picture of a data set: where it is, and its caption (None where there is none)."""

    path: Path
    caption: str | None


def load_rgb(path: str | Path) -> Image.Image:
    """Open any picture as 8-bit RGB: EXIF orientation applied, transparency on white, 16 bits scaled to 8.

    Raises:
        ImageError: unreadable, truncated, smaller than 8 pixels on a side, or implausibly large.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit stands in for Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check_size(image)
                image.load()
                image = ImageOps.exif_transpose(image)
                return _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image, or of an unknown format") from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAXIMUM_PIXELS} pixels") from None
    except Exception as error:  # decoders of damaged files raise whatever they like: struct.error, zlib.error, …
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ImageError(f"unreadable: {reason}") from None


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < MINIMUM_SIDE:
        raise ImageError(f"too small: {width}x{height} pixels, at least {MINIMUM_SIDE} on each side are needed")
    if width * height > MAXIMUM_PIXELS:
        raise ImageError(f"too large: {width}x{height} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        # Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(np.round(values / 257.0), 0, 255).astype(np.uint8), "L").convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def list_images(folder: str | Path, caption_column: str = "text") -> list[Record]:
    """Every picture below ``folder``, in the order of their relative paths.

    Captions come from a ``metadata.jsonl`` (imagefolder layout: ``file_name`` and ``caption_column``) or from a ``.txt``
    file beside the picture.

    Raises:
        ImagesMissing: no such folder, no pictures, or metadata that is damaged or names a file that isn't there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImagesMissing(f"{str(folder)!r} is not a folder")
    captions = _metadata(folder, caption_column)
    paths = sorted(
        (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()),
        key=lambda p: p.relative_to(folder).as_posix(),
    )
    if not paths:
        raise ImagesMissing(f"{str(folder)!r} holds no images ({', '.join(sorted(SUFFIXES))})")
    return [Record(p, captions.get(p.relative_to(folder).as_posix()) or _sidecar(p)) for p in paths]


def _metadata(folder: Path, caption_column: str) -> dict[str, str | None]:
    path = folder / "metadata.jsonl"
    if not path.exists():
        return {}
    captions = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = Path(row["file_name"]), row.get(caption_column)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ImagesMissing(f"{path}, line {number}: not a JSON object with a 'file_name'") from None
        if not (folder / name).is_file():
            raise ImagesMissing(f"{path}, line {number}: {str(name)!r} is not in the folder")
        if not isinstance(caption, str | None):
            raise ImagesMissing(f"{path}, line {number}: {caption_column!r} is not a text: {caption!r}")
        captions[name.as_posix()] = caption
    if captions and all(c is None for c in captions.values()):
        raise ImagesMissing(f"{path} has no column {caption_column!r}; it has: {', '.join(sorted(row))}")
    return captions


def _sidecar(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8", errors="replace").strip() or None if text.is_file() else None
