"""The files of a preview: preview.json, the tiles, and the picture that is drawn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdxl_ambient.errors import PreviewError
from sdxl_ambient.preview.picture import draw
from sdxl_ambient.probe import ProbedImage, compare, decode_latent
from sdxl_ambient.provenance import atomic, differences, read_json


def read_preview(output: Path) -> dict[str, Any] | None:
    """The preview.json that is there, or None.

    Raises:
        PreviewError: a damaged one, or another program's.
    """
    path = output / "preview.json"
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        if stored["holds_clean_images"] is True and isinstance(stored["settings"], dict):
            return stored
    except (ValueError, KeyError, TypeError):
        pass
    raise PreviewError(f"{path} is damaged or not a preview's; use another --output_dir")


def refuse_other(stored: dict | None, wanted: dict) -> None:
    """Refuse to go on with a preview that was begun with other settings; ``wanted`` may be a part of them."""
    if stored is None:
        return
    differing = differences({name: stored["settings"].get(name) for name in wanted}, wanted)
    if differing:
        raise PreviewError(f"the preview in --output_dir has other settings ({'; '.join(differing)}); use another folder")


def write_tile(output: Path, name: str, image: Image.Image) -> None:
    """Write a picture whole or not at all."""
    with atomic(output / name) as temporary:
        image.save(temporary)


class TileWriter:
    """Decodes latents of one image and level into tiles, and compares them to the round trip."""

    def __init__(self, output: Path, image: ProbedImage, t: int, vae, reference: Image.Image):
        self.output, self.image, self.t, self.vae, self.reference = output, image, t, vae, reference

    def __call__(self, name: str, latent: torch.Tensor) -> dict[str, Any]:
        picture, path = decode_latent(self.vae, latent), self.image.tile(f"t{self.t:03d}-{name}")
        write_tile(self.output, path, picture)
        return {"tile": path, **compare(picture, self.reference)}


def draw_picture(output: Path) -> tuple[int, int]:
    """preview.json and tiles → preview.png: a row per image, columns by level, the original first. Returns its size, pixels.

    Raises:
        PreviewError: no preview there, or one whose tiles are not.
    """
    preview = read_preview(output)
    if preview is None:
        raise PreviewError(f"{output} holds no preview.json")
    try:
        image = draw(output, preview)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise PreviewError(f"{output} can't be drawn, a file is missing or damaged: {error}") from None
    with atomic(output / "preview.png") as temporary:
        image.save(temporary)
    return image.size
