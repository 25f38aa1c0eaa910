"""Image files → RGB pictures as a person sees them, with a clear reason for each one that can't be used."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sdxl_ambient.errors import ImageError, ImagesMissing
from sdxl_ambient.images.captions import Columns, read_descriptions
from sdxl_ambient.provenance import is_utf8

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MINIMUM_SIDE = 8  # pixels; below this the VAE has nothing to encode
MAXIMUM_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # where Pillow takes a picture for a decompression bomb
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


@dataclass(frozen=True)
class Record:
    """One picture of a data set: its name in reports, the file it is in or the function that reads it, its captions, and its
    own noise level (−1 clean, None: the set's)."""

    name: str
    source: Path | Callable[[], Path | bytes]
    captions: tuple[str, ...] = ()
    t_n: int | None = None

    @property
    def caption(self) -> str | None:
        """Its first caption; None where there is none."""
        return self.captions[0] if self.captions else None

    @property
    def path(self) -> Path:
        """The file it is in, for pictures of a folder."""
        assert isinstance(self.source, Path), "a row of a data set is no file"
        return self.source

    def read(self) -> Path | bytes:
        """What :func:`load_rgb` takes. Raises ImageError for a row that holds nothing."""
        return self.source if isinstance(self.source, Path) else self.source()

    def captioned(self, instance_prompt: str | None) -> Record:
        """With ``instance_prompt`` for its caption where it has none."""
        return self if self.captions or not instance_prompt else replace(self, captions=(instance_prompt,))


def load_rgb(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """Open any picture as 8-bit RGB: EXIF orientation applied, transparency on white, 16 bits to 8. Bytes are a file's.

    Raises:
        ImageError: unreadable, truncated, smaller than 8 pixels on a side, or implausibly large.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit stands in for Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
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


def list_files(folder: str | Path, suffixes: Collection[str]) -> list[Path]:
    """Files below ``folder`` with one of these endings, hidden ones left out, in the order of their relative paths.

    Raises:
        ImagesMissing: no such folder, or files whose names are not UTF-8, which no record or report could name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImagesMissing(f"{str(folder)!r} is not a folder")
    files = sorted(
        (p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()),
        key=lambda p: p.relative_to(folder).as_posix(),
    )
    if unnamed := [name for p in files if not is_utf8(name := p.relative_to(folder).as_posix())]:
        count = "1 file's name is" if len(unnamed) == 1 else f"{len(unnamed)} files' names are"
        raise ImagesMissing(
            f"{str(folder)!r}: {count} not UTF-8, such as {os.fsencode(unnamed[0])!r}; rename or remove what is named so"
        )
    return files


def list_images(
    folder: str | Path, caption_column: str = "text", t_n_column: str | None = None, captions_needed: bool = True
) -> list[Record]:
    """Every picture below ``folder``, in the order of their relative paths.

    Captions and noise levels come from a ``metadata.jsonl`` or ``metadata.csv`` (imagefolder layout: ``file_name``,
    ``caption_column``, ``t_n_column``), captions also from a ``.txt`` file beside the picture.

    Raises:
        ImagesMissing: no such folder, no pictures, or metadata that is damaged, lacks a column or names a file that isn't
            there.
    """
    folder = Path(folder)
    paths = list_files(folder, SUFFIXES)
    if not paths:
        raise ImagesMissing(f"{str(folder)!r} holds no images ({', '.join(sorted(SUFFIXES))})")
    described = read_descriptions(folder, paths, Columns(caption_column, t_n_column, captions_needed))
    return [Record(p.relative_to(folder).as_posix(), p, d.captions, d.t_n) for p, d in zip(paths, described, strict=True)]
