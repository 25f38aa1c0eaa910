"""Image files → RGB pictures as a person sees them, with a clear reason for each one that can't be used."""

from __future__ import annotations

import functools
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sdxl_ambient.errors import ImageError, ImagesMissing
from sdxl_ambient.images.captions import CAPTION_ENDINGS, Columns, read_descriptions, read_metadata
from sdxl_ambient.images.colour import to_srgb
from sdxl_ambient.images.folder import Ledger, Unread, ending, refuse_unnamed, shown, split_folders, walk

# Formats of Pillow that need another program, or only know that a file is there: an EPS file is a program.
_NO_FORMATS = frozenset({"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "WMF"})
# HEIC, which Pillow reads with the package pillow-heif alone.
_HEIC = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
# What is known to be none and may be large.
_NO_PICTURES = frozenset(
    {*CAPTION_ENDINGS, ".json", ".jsonl", ".csv", ".parquet", ".arrow", ".tar", ".zip", ".safetensors", ".npz", ".npy"}
)
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


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that pictures are read in: all of the installed Pillow's, and HEIC where pillow-heif is there."""
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - _NO_FORMATS))


@functools.cache
def endings() -> frozenset[str]:
    """The endings of pictures, in small letters."""
    known = set(formats())
    return frozenset({e.lower() for e, kind in Image.registered_extensions().items() if kind in known} | _HEIC)


def load_rgb(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """Open any picture as 8-bit sRGB as a viewer shows it. Bytes are a file's.

    EXIF orientation is applied, its colour profile converted to sRGB, transparency laid on white, and 16 bits become 8. Of
    several frames it is the first. ``info["profile"]`` of the result names the profile that was converted, if any was.

    Raises:
        ImageError: unreadable, truncated, smaller than 8 pixels on a side, or implausibly large.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit stands in for Pillow's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as image:
                _check_size(image)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(_unknown(source)) from None
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


def _unknown(source: str | Path | bytes | BinaryIO) -> str:
    if isinstance(source, str | Path) and Path(source).suffix.lower() in _HEIC and "HEIF" not in formats():
        return "HEIC needs the package pillow-heif, which is not installed (pip install pillow-heif)"
    return "not an image, or of an unknown format"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        # Pillow's own conversion clips at 255 instead of scaling.
        values = np.asarray(image).astype(np.float64)
        image = _with_info(Image.fromarray(np.clip(np.round(values / 257.0), 0, 255).astype(np.uint8), "L"), image)
    if image.mode == "F":
        raise ImageError("floating-point pixels have no defined range")
    alpha = None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        mode = "L" if image.mode in ("L", "LA", "La") else "RGB"
        image = _with_info(image.convert("RGBA"), image)
        alpha = image.getchannel("A")
        # Without its alpha channel, and no pixel changed: of a grey picture all channels are equal.
        image = _with_info(image.getchannel("R") if mode == "L" else Image.merge("RGB", image.split()[:3]), image)
    picture, profile = to_srgb(image)
    if alpha is not None:
        picture.putalpha(alpha)
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture).convert("RGB")
    picture.info = {} if profile is None else {"profile": profile}
    return picture


def _with_info(image: Image.Image, other: Image.Image) -> Image.Image:
    image.info = dict(other.info)
    return image


class Listing(list[Record]):
    """The pictures of a source, with what became of its files: ``ledger``."""

    def __init__(self, records: Iterable[Record], ledger: Ledger):
        super().__init__(records)
        self.ledger = ledger


def list_images(
    folder: str | Path, columns: Columns | None = None, walked: tuple[list[Path], list[Unread]] | None = None
) -> Listing:
    """Every picture below ``folder``, in the order of their relative paths, and every other file with the reason.

    What is a picture is told by its ending, by metadata that names it, or by its content. Captions and noise levels come
    from a ``metadata.jsonl``, ``.csv`` or ``.parquet`` (imagefolder layout: ``file_name``, and the columns' names), captions
    also from a ``.txt`` or ``.caption`` file beside the picture.

    Args:
        walked: what :func:`sdxl_ambient.images.folder.walk` found below the folder, where that is known.

    Raises:
        ImagesMissing: no such folder, no pictures, or metadata that is damaged, lacks a column or names a file that isn't
            there.
    """
    folder, columns = Path(folder), columns or Columns()
    files, unread = walked or walk(folder)
    metadata = read_metadata(folder, files, columns)
    named, texts = set(metadata.rows), set(metadata.files)
    paths = [p for p in files if p not in texts and (_is_picture(p) or p.relative_to(folder).as_posix() in named)]
    refuse_unnamed(paths, folder)
    if lost := sorted(named - {p.relative_to(folder).as_posix() for p in paths}):
        location, _ = metadata.rows[lost[0]]
        raise ImagesMissing(f"{location}: {lost[0]!r} lies in a hidden or system folder, or behind a link, and is not read")
    if not paths:
        raise ImagesMissing(f"{str(folder)!r} holds no images, but {_others(files, unread)}")
    described, captions = read_descriptions(folder, paths, columns, metadata)
    read = {*texts, *captions}
    looked_at, stems = {*paths, *read}, {p.with_suffix("") for p in paths}
    unread = [*unread, *(Unread(shown(p, folder), _why_unread(p, stems)) for p in files if p not in looked_at)]
    records = [Record(p.relative_to(folder).as_posix(), p, d.captions, d.t_n) for p, d in zip(paths, described, strict=True)]
    count = len(paths) + len(read) + sum(one.files for one in unread)
    sums = count, len(paths), len(read), tuple(sorted(unread, key=lambda one: one.name))
    return Listing(records, Ledger(*sums, split_folders(folder, paths)))


def _is_picture(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in endings() or (suffix not in _NO_PICTURES and _looks_like_one(path))


def _looks_like_one(path: Path) -> bool:
    """Whether a file begins as pictures do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=formats()):
                return True
    except Exception:  # decoders raise whatever they like
        return False


def _why_unread(path: Path, stems: set[Path]) -> str:
    if path.suffix.lower() not in CAPTION_ENDINGS:
        return ending(path)
    if path.with_suffix("") not in stems:
        return "a text without a picture of its name"
    return "a caption that metadata, or a .txt file, stands in for"


def _others(files: Sequence[Path], unread: Sequence[Unread]) -> str:
    kinds = Counter(p.suffix.lower() or "no ending" for p in files)
    kinds.update({reason: n for one in unread for reason, n in [(f"{one.reason}", one.files)]})
    return ", ".join(f"{n} × {kind}" for kind, n in kinds.most_common(6)) or "nothing"
