"""Opens every picture once and sorts out which can be used: its content hash, its size, its perceptual fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from sdxl_ambient.errors import ImageError
from sdxl_ambient.images.duplicates import fingerprint as perceptual
from sdxl_ambient.images.load import Record, load_rgb
from sdxl_ambient.provenance import hash_bytes
from sdxl_ambient.store.records import Skipped


def content_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and pixels: the same for copies whose files differ."""
    return hash_bytes(f"{image.width}x{image.height}|".encode() + image.tobytes())


@dataclass(frozen=True)
class Scanned:
    """One usable picture."""

    content: str  # hash of its pixels
    size: tuple[int, int]  # (height, width) in pixels
    record: Record  # with the captions that it is shown with
    print: bytes | None = None  # its perceptual fingerprint, 400 bytes, where the scan makes it
    profile: str | None = None  # the colour profile that it was converted from, if any

    @property
    def caption(self) -> str:
        """Its first caption."""
        return self.record.captions[0]


Check = Callable[[], None]


class Look(NamedTuple):
    """What a scan finds out of a picture: the hash of its content, (height, width) in pixels, fingerprint and profile."""

    content: str
    size: tuple[int, int]
    print: bytes | None = None
    profile: str | None = None


Scan = Callable[[Record], Look]


def scan_image(record: Record) -> Look:
    """Content hash, size and profile of a picture. Raises ImageError."""
    image = load_rgb(record.read())
    return Look(content_hash(image), (image.height, image.width), None, image.info.get("profile"))


def scan_image_with_hash(record: Record) -> Look:
    """The same with its perceptual fingerprint."""
    image = load_rgb(record.read())
    mark = perceptual(image).astype(np.uint8).tobytes()
    return Look(content_hash(image), (image.height, image.width), mark, image.info.get("profile"))


def scan(
    records: Sequence[Record],
    instance_prompt: str | None,
    state: PartialState,
    scan_image: Scan = scan_image,
    check: Check = lambda: None,
) -> tuple[list[Scanned], list[Skipped]]:
    """Open every picture once, each process its share. Returns the usable ones, and the others with the reason.

    Records stay where they are: all processes have the same ones. ``check`` is called before each, and may raise.
    """
    scanned: list[tuple[int, Look]] = []
    skipped: list[tuple[int, Skipped]] = []
    share = range(state.process_index, len(records), state.num_processes)
    for i in tqdm(share, desc="reading images", unit="img", disable=not state.is_main_process, mininterval=1):
        check()
        try:
            if not records[i].captioned(instance_prompt).captions:
                raise ImageError("no caption (a metadata file, a .txt file beside it, a column, or --instance_prompt)")
            scanned.append((i, scan_image(records[i])))
        except ImageError as error:
            skipped.append((i, {"file": records[i].name, "reason": str(error)}))
    if state.num_processes > 1:
        scanned, skipped = gather_object(scanned), gather_object(skipped)
    usable = [
        Scanned(look.content, look.size, records[i].captioned(instance_prompt), look.print, look.profile)
        for i, look in sorted(scanned, key=lambda p: p[0])
    ]
    return usable, [s for _, s in sorted(skipped, key=lambda p: p[0])]
