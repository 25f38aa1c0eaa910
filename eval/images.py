"""Folders of images as the stages see them: which files count, by content, and which were left out and why."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from eval.drawn import check_drawn
from eval.schema import Excluded
from sdxl_ambient.errors import ImageError
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.folder import Ledger
from sdxl_ambient.images.load import Record, list_images, load_rgb
from sdxl_ambient.provenance import hash_file
from sdxl_ambient.spread import spread


@dataclass
class ImageSet:
    """Images of one folder in the order of their paths, with the SHA-256 of each file, and what was left out."""

    folder: Path
    records: list[Record]
    hashes: list[str]
    excluded: list[Excluded] = field(default_factory=list)
    ledger: Ledger = Ledger(0, 0)  # what became of every file below the folder

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """The image's path relative to the folder, with forward slashes."""
        return self.records[index].path.relative_to(self.folder).as_posix()

    def thinned(self, most: int) -> ImageSet:
        """At most ``most`` of the images, evenly."""
        return self.subset(spread(range(len(self)), most))

    def subset(self, indices: Iterable[int], excluded: Sequence[Excluded] = ()) -> ImageSet:
        """The images at ``indices``; ``excluded`` is added to what was left out before."""
        picked = [(self.records[i], self.hashes[i]) for i in indices]
        left_out = [*self.excluded, *excluded]
        return ImageSet(self.folder, [r for r, _ in picked], [h for _, h in picked], left_out, self.ledger)

    def record(self) -> dict[str, Any]:
        """What became of every file below the folder, as the report keeps it."""
        return self.ledger.record(len(self), len(self.excluded))


def read_folder(folder: str | Path, columns: Columns | None = None) -> ImageSet:
    """List a folder as training does (:func:`sdxl_ambient.images.load.list_images`), and hash every image's file.

    Raises:
        sdxl_ambient.images.load.ImagesMissing: no such folder, nothing in it, or damaged metadata.
        StageError: images that a stage drew and that are not as it drew them.
    """
    folder = Path(folder)
    listing = list_images(folder, columns or Columns(captions_needed=False))
    images = ImageSet(folder, [], [], ledger=listing.ledger)
    for record in listing:
        try:
            digest = hash_file(record.path)
        except OSError as error:
            name = record.path.relative_to(folder).as_posix()
            images.excluded.append({"file": name, "reason": f"unreadable: {error.strerror}"})
            continue
        images.records.append(record)
        images.hashes.append(digest)
    check_drawn(folder, {images.name(i): digest for i, digest in enumerate(images.hashes)})
    return images


def drop_duplicates(images: ImageSet, others: ImageSet | None = None) -> ImageSet:
    """Leave out files whose content came before in the set, or stands in ``others``.

    A repeated training image counts twice among the nearest neighbours, and a held-out image that is also a training
    image would put its similarity of 1 into the null distribution.
    """
    known = {h: f"same file as {others.name(i)} of {others.folder}" for i, h in enumerate(others.hashes)} if others else {}
    kept: list[int] = []
    excluded: list[Excluded] = []
    for index, digest in enumerate(images.hashes):
        if digest in known:
            excluded.append({"file": images.name(index), "reason": known[digest]})
        else:
            known[digest] = f"same file as {images.name(index)}"
            kept.append(index)
    return images.subset(kept, excluded)


def data_uri(path: str | Path, size: int = 144) -> str | None:
    """An image as a ``data:`` address, at most ``size`` pixels on a side and never enlarged; None if it can't be
    opened.
    """
    try:
        image = load_rgb(path)
    except ImageError:
        return None
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    png = buffer.getvalue()
    if len(png) > 12_000:  # photographs: the page stays small as JPEG
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
