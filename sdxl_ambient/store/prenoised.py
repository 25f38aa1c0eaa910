"""Latents that are noisy already: .safetensors files with one tensor ``latent`` (4, h, w) each.

They are x_n = α_n x_0 + σ_n z in the UNet's own units, with float16, bfloat16 or float32 values. Nothing is drawn and no
picture is read: a store of them holds what the files hold, as float32. Captions and noise levels come as for pictures
(metadata.jsonl, metadata.csv, .txt files); metadata may give ``original_size`` and ``crop_top_left`` as [height, width] and
[top, left] in pixels, which otherwise are the latent's own size and [0, 0].
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sdxl_ambient.errors import ImageError, ImagesMissing, one_line
from sdxl_ambient.images.captions import Columns, Description, read_descriptions, read_metadata
from sdxl_ambient.images.folder import Ledger, list_files
from sdxl_ambient.images.load import Listing, Record
from sdxl_ambient.models.conditioning import time_ids
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import hash_bytes
from sdxl_ambient.store.plan import FORMAT_VERSION, fingerprint_of_text
from sdxl_ambient.store.records import Fingerprint, LatentSettings
from sdxl_ambient.store.scan import Look, Scanned

SUFFIX, TENSOR = ".safetensors", "latent"
FACTOR = 8  # pixels of a latent's side
MULTIPLE = 4  # what the UNet halves twice
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LatentRecord(Record):
    """One file of a noisy latent. ``original_size`` (height, width) and ``crop_top_left`` in pixels where they are known."""

    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] | None = None


def list_latents(folder: str | Path, t_n: int | None, columns: Columns | None = None) -> Listing:
    """Every .safetensors file below ``folder``, in the order of their relative paths; ``t_n`` is of those without their own.

    Raises:
        ImagesMissing: no such folder or files, broken metadata, or a latent without a noise level.
    """
    folder = Path(folder)
    paths, unread = list_files(folder, {SUFFIX})
    if not paths:
        raise ImagesMissing(f"--pre_noised: {str(folder)!r} holds no {SUFFIX} files")
    records: list[Record] = []
    metadata = read_metadata(folder, paths, columns or Columns())
    if lost := sorted(metadata.rows.keys() - {p.relative_to(folder).as_posix() for p in paths}):
        raise ImagesMissing(f"{metadata.rows[lost[0]][0]}: {lost[0]!r} is no {SUFFIX} file")
    found, captions = read_descriptions(folder, paths, columns or Columns(), metadata)
    for path, described in zip(paths, found, strict=True):
        name = path.relative_to(folder).as_posix()
        if described.t_n is None and t_n is None:
            raise ImagesMissing(
                f"--pre_noised: {name} has no noise level; allowed are --t_n, or -1 in --t_n_column for clean"
            )
        size, corner = (_pair(described, column) for column in ("original_size", "crop_top_left"))
        records.append(LatentRecord(name, path, described.captions, described.t_n, size, corner))
    texts = {p.relative_to(folder).as_posix() for p in (*metadata.files, *captions)}
    unread = [one for one in unread if one.name not in texts]
    count = len(paths) + len(texts) + sum(one.files for one in unread)
    return Listing(records, Ledger(count, len(paths), len(texts), tuple(unread)))


def _pair(described: Description, column: str) -> tuple[int, int] | None:
    """Two whole numbers of a row, which a CSV file spells as JSON; None where there is nothing."""
    value = described.row.get(column) or None
    try:
        pair = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        pair = value
    if pair is None:
        return None
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(v) is int and v >= 0 for v in pair):
        raise ImagesMissing(
            f"{described.location}: {column!r} is {value!r}; allowed are two whole numbers of pixels, as [512, 768]"
        )
    return pair[0], pair[1]


def load_latent(path: Path) -> torch.Tensor:
    """The latent of a file, (4, h, w) float32. Raises ImageError: what is wrong with it."""
    try:
        with safe_open(str(path), "pt") as file:
            names = sorted(file.keys())
            if names != [TENSOR]:
                raise ImageError(f"holds {', '.join(names[:4]) or 'no tensor'}{' …' * (len(names) > 4)}, not one {TENSOR!r}")
            latent = file.get_tensor(TENSOR)
    except (SafetensorError, OSError) as error:
        raise ImageError(f"unreadable: {one_line(error, most=None)}") from None
    if latent.dtype not in _DTYPES:
        raise ImageError(f"{latent.dtype} values; allowed are float16, bfloat16, float32")
    if latent.ndim != 3 or latent.shape[0] != 4 or 0 in latent.shape or any(side % MULTIPLE for side in latent.shape[1:]):
        raise ImageError(f"shape {tuple(latent.shape)}; allowed is (4, h, w), h and w multiples of {MULTIPLE}")
    if not bool(torch.isfinite(latent).all()):
        raise ImageError("values that are not finite")
    return latent.float().contiguous()


def latent_hash(latent: torch.Tensor) -> str:
    """SHA-256 of a float32 latent's shape and values."""
    return hash_bytes(f"{tuple(latent.shape)}|".encode() + latent.numpy().tobytes())


def scan_latent(record: Record) -> Look:
    """Content hash and (height, width) in pixels of a latent. Raises ImageError."""
    latent = load_latent(record.path)
    return Look(latent_hash(latent), (FACTOR * latent.shape[1], FACTOR * latent.shape[2]))


def ids_of_latent(p: Scanned) -> list[int]:
    """Time ids of a latent: what its row says, or its own size without a crop."""
    record = p.record
    assert isinstance(record, LatentRecord)
    return time_ids(record.original_size or p.size, record.crop_top_left or (0, 0), p.size)


def fingerprint_of_latents(encoders: Encoders, schedule: NoiseSchedule, t_n: int | None) -> Fingerprint:
    """Everything but the latents that a store of them depends on; there is no VAE and no resolution in it."""
    latent: LatentSettings = {"pre_noised": True, "resolution": None, "schedule": schedule.hash, "t_n": t_n}
    return {"format_version": FORMAT_VERSION, "latent": latent, "text": fingerprint_of_text(encoders)}
