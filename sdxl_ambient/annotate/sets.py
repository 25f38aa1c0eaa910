"""The two sets that are compared, read and encoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from sdxl_ambient.annotate.settings import AnnotateSettings
from sdxl_ambient.errors import AnnotateError, ImagesMissing
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import list_images, load_rgb
from sdxl_ambient.images.sources import Log
from sdxl_ambient.models.vae import encode_image
from sdxl_ambient.store.records import Skipped
from sdxl_ambient.store.scan import Scanned, content_hash, scan


@dataclass
class ImageSet:
    """The usable files of a set, its distinct pictures in the order of their hashes, and those files that are skipped."""

    name: str
    folder: Path
    pictures: list[Scanned]
    skipped: list[Skipped]
    contents: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.contents = sorted({p.content for p in self.pictures})

    def distinct(self) -> list[Scanned]:
        """One file of each picture, in the order of ``contents``."""
        first = {p.content: p for p in reversed(self.pictures)}
        return [first[c] for c in self.contents]


def read_set(settings: AnnotateSettings, name: str, state: PartialState, log: Log) -> ImageSet:
    """Open every image of a set once. Raises ImagesMissing for one without a usable image."""
    folder = Path(getattr(settings, f"{name}_data_dir"))
    columns = Columns(settings.caption_column, None, not settings.instance_prompt, encoding=settings.caption_encoding)
    listing = list_images(folder, columns)
    for line in listing.ledger.lines(folder):
        log(line)
    pictures, skipped = scan(listing, settings.instance_prompt, state)
    if not pictures:
        raise ImagesMissing(f"none of {len(listing)} images in {str(folder)!r} can be used: {skipped[0]['reason']}")
    if skipped:
        first = f"{skipped[0]['file']}: {skipped[0]['reason']}"
        log(f"note: {len(skipped)} of {len(listing)} {name} images are skipped, the first is {first}")
    return ImageSet(name, folder, pictures, skipped)


def check_sets(trusted: ImageSet, untrusted: ImageSet, folds: int) -> None:
    """Enough images for the folds, and none in both sets; an AnnotateError else."""
    for one in (trusted, untrusted):
        if len(one.contents) < folds:
            raise AnnotateError(
                f"--folds: {folds} is more than the {len(one.contents)} distinct usable images in --{one.name}_data_dir; "
                "each fold needs one of them"
            )
    shared = sorted(set(trusted.contents) & set(untrusted.contents))
    if shared:
        files = [next(p.record.name for p in one.pictures if p.content == shared[0]) for one in (trusted, untrusted)]
        raise AnnotateError(
            f"{len(shared)} images are in both sets, the first is {files[0]} of --trusted_data_dir and {files[1]} of "
            "--untrusted_data_dir; an image is one or the other"
        )


def encode(one: ImageSet, vae, geometry: Geometry) -> torch.Tensor:
    """Clean latents (n, 4, h, w) of a set's distinct pictures, float32 in the CPU's memory; they are written nowhere."""
    latents = []
    for picture in tqdm(one.distinct(), desc=f"encoding {one.name} images", unit="img", mininterval=1):
        image = load_rgb(picture.record.path)
        if content_hash(image) != picture.content:
            raise AnnotateError(f"{picture.record.path} changed while it was being encoded")
        latents.append(encode_image(vae, geometry.apply(image, picture.content)[0]))
    return torch.stack(latents)
