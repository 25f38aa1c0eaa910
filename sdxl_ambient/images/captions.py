"""Captions and noise levels of the files of a folder, or of the rows of a data set.

A folder has them in ``metadata.jsonl`` or ``metadata.csv`` (imagefolder layout: one row per file, named by ``file_name``),
its own or, for the files below it, a subfolder's; captions also in ``.txt`` files beside the files.
"""

from __future__ import annotations

import csv
import io
import json
import math
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdxl_ambient.errors import ImagesMissing
from sdxl_ambient.levels import CLEAN, MAXIMUM_T_N
from sdxl_ambient.provenance import is_utf8


@dataclass(frozen=True)
class Columns:
    """Which columns hold the captions, the noise levels and, in a data set, the pictures.

    Without ``captions_needed`` the one of the captions may be missing.
    """

    caption: str = "text"
    t_n: str | None = None
    captions_needed: bool = True
    image: str = "image"


@dataclass(frozen=True)
class Description:
    """What is known of one entry."""

    captions: tuple[str, ...] = ()
    t_n: int | None = None  # its own noise level: −1 for clean, None for the set's
    row: dict = field(default_factory=dict)  # all of its metadata
    location: str = ""  # file and line of that row


def captions_of(value: Any, column: str, location: str) -> tuple[str, ...]:
    """A text, a list of texts or nothing → captions without empty ones.

    Raises:
        ImagesMissing: anything else, or half of a surrogate pair, which no file in UTF-8 can hold.
    """
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str | None) for t in texts):
        raise ImagesMissing(f"{location}: {column!r} is not a text or a list of texts: {reprlib.repr(value)}")
    if wrong := [t for t in texts if t and not is_utf8(t)]:
        raise ImagesMissing(f"{location}: {column!r} holds half of a surrogate pair, which is no text: {wrong[0]!a:.80}")
    return tuple(t for t in texts if t)


def level_of(value: Any, column: str, location: str) -> int | None:
    """A timestep, −1 (clean) or None (nothing said); also as a text or a float, as tables spell it.

    Raises:
        ImagesMissing: anything else.
    """
    level = value.strip() if isinstance(value, str) else value
    if level is None or level == "" or (isinstance(level, float) and math.isnan(level)):
        return None
    try:
        number = None if isinstance(level, bool) else float(level)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not CLEAN <= number <= MAXIMUM_T_N or number != int(number):
        raise ImagesMissing(
            f"{location}: --t_n_column: {column!r} is {reprlib.repr(value)}; allowed are 0 to {MAXIMUM_T_N}, "
            f"{CLEAN} for clean, and nothing for --t_n"
        )
    return int(number)


def not_one_of(option: str, value: str, known: Iterable[str], location: object) -> ImagesMissing:
    """The error about a column that isn't there."""
    return ImagesMissing(f"--{option}: {value!r} is not one of: {', '.join(map(str, known))} ({location})")


def read_descriptions(folder: Path, paths: Sequence[Path], columns: Columns) -> list[Description]:
    """The description of each of ``paths`` by a folder's metadata and ``.txt`` files.

    Raises:
        ImagesMissing: metadata or a caption that is damaged or not in UTF-8, metadata that names a file that isn't there,
            lacks a column, or has a wrong value.
    """
    rows = _metadata(folder, paths)
    known = sorted({name for _, row in rows.values() for name in row})
    if columns.t_n is not None and columns.t_n not in known:
        if not rows:
            raise ImagesMissing(f"--t_n_column: {columns.t_n!r} needs a metadata.jsonl or metadata.csv in {str(folder)!r}")
        raise not_one_of("t_n_column", columns.t_n, known, folder)
    described: dict[str, Description] = {}
    for name, (location, row) in rows.items():
        captions = captions_of(row.get(columns.caption), columns.caption, location)
        level = None if columns.t_n is None else level_of(row.get(columns.t_n), columns.t_n, location)
        described[name] = Description(captions, level, row, location)
    entries = []
    for path in paths:
        entry = described.get(path.relative_to(folder).as_posix(), Description())
        entries.append(entry if entry.captions else replace(entry, captions=_sidecar(path)))
    if rows and columns.captions_needed and columns.caption not in known and not any(entry.captions for entry in entries):
        raise not_one_of("caption_column", columns.caption, known, folder)
    return entries


def _metadata(root: Path, paths: Sequence[Path]) -> dict[str, tuple[str, dict]]:
    """File name below ``root`` → where its row stands, and the row; of several the one that stands nearest to the file.

    Nothing where there is no metadata.
    """
    folders = {root} | {f for path in paths for f in path.parents if root in f.parents}
    rows = {}
    for folder in sorted(folders, key=lambda f: (len(f.parts), f)):
        inside = folder.relative_to(root)
        rows |= {(inside / name).as_posix(): row for name, row in _rows_in(folder).items()}
    return rows


def _rows_in(folder: Path) -> dict[str, tuple[str, dict]]:
    """One folder's own metadata."""
    files = [path for name in ("metadata.jsonl", "metadata.csv") if (path := folder / name).is_file()]
    if len(files) > 1:
        raise ImagesMissing(f"{str(folder)!r} holds metadata.jsonl and metadata.csv; keep one of them")
    rows = {}
    for path in files:
        for location, row in _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path):
            name = Path(row["file_name"])
            if "\0" in row["file_name"] or not (folder / name).is_file():
                raise ImagesMissing(f"{location}: {str(name)!r} is not in the folder")
            rows[name.as_posix()] = location, row
    return rows


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        try:
            # NaN is how tables spell that nothing is said.
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ImagesMissing(f"{location}: not a JSON object with a 'file_name'")
        yield location, row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        # Spreadsheets mark the start of a file in UTF-8.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ImagesMissing(f"{path}: not a CSV file in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            location = f"{path}, line {reader.line_num}"
            if None in row or not row.get("file_name"):
                raise ImagesMissing(f"{location}: not a row with a 'file_name' and one field for each column")
            yield location, row
    except csv.Error as error:
        raise ImagesMissing(f"{path}, line {reader.line_num}: {error}") from None


def _sidecar(path: Path) -> tuple[str, ...]:
    text = path.with_suffix(".txt")
    try:
        caption = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
    except UnicodeDecodeError as error:
        raise ImagesMissing(f"{text}: byte {error.start} is not UTF-8, which captions are read in") from None
    return (caption,) if caption else ()
