"""A folder of images that were drawn: its two files beside them, and whether each image is as it was drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from sdxl_ambient.errors import JsonError, StageError
from sdxl_ambient.provenance import hash_file, parse_json

MANIFEST, METADATA = "manifest.json", "metadata.jsonl"  # what determines the images; a row for each, written last
_END = b"IEND\xaeB`\x82"  # of a PNG


def drawn_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each image's file as it was drawn, by name; {} for a folder that isn't complete, or isn't ours.

    Raises:
        StageError: damaged rows.
    """
    path = folder / METADATA
    if not (folder / MANIFEST).is_file() or not path.is_file():
        return {}
    try:
        rows = [parse_json(line, str(path)) for line in path.read_bytes().splitlines() if line.strip()]
        return {row["file_name"]: row["sha256"] for row in rows if "sha256" in row}
    except (JsonError, TypeError, KeyError) as error:
        raise StageError(f"{path} is damaged ({error}); delete that file and draw again") from None


def check_drawn(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raises StageError where an image of a folder is not as it was drawn, or is gone.

    Args:
        hashes: SHA-256 of the files that are there, by name.
    """
    for name, wanted in drawn_hashes(folder).items():
        if hashes.get(name) != wanted:
            what = "is not as it was drawn" if name in hashes else "is gone"
            raise StageError(f"{folder / name} {what}; draw again into that folder, which makes it anew")


def whole_images(folder: Path, files: Iterable[str]) -> set[str]:
    """Which images are there as they were drawn: by their SHA-256 where the folder is complete, else by PNG's own checksums.

    One that is damaged is told; the caller draws it again.
    """
    known, whole = drawn_hashes(folder), set()
    for file in files:
        path = folder / file
        if not path.is_file():
            continue
        if hash_file(path) == known[file] if file in known else _is_png(path):
            whole.add(file)
        else:
            tqdm.write(f"{path} is damaged and is made again", file=sys.stderr)
    return whole


def _is_png(path: Path) -> bool:
    """Whether a file is a whole PNG, by the checksum of each of its parts."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return path.read_bytes().endswith(_END)
