"""Captions and noise levels of the files of a folder, or of the rows of a data set.

A folder has them in ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` (imagefolder layout: rows name a file by
``file_name``; several rows of one file are several captions), its own or, for the files below it, a subfolder's; captions
also in ``.txt`` or ``.caption`` files beside the files. Every row lands on a file, or is an error.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq

from sdxl_ambient.errors import ImagesMissing, TextError, one_line
from sdxl_ambient.levels import CLEAN, MAXIMUM_T_N
from sdxl_ambient.provenance import is_utf8
from sdxl_ambient.texts import read_text

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_ENDINGS = (".txt", ".caption")


@dataclass(frozen=True)
class Columns:
    """Which columns hold the captions, the noise levels and, in a data set, the pictures.

    Without ``captions_needed`` the one of the captions may be missing. ``encoding`` is that of text files without a byte
    order mark, UTF-8 where it is None.
    """

    caption: str = "text"
    t_n: str | None = None
    captions_needed: bool = True
    image: str = "image"
    encoding: str | None = None


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


@dataclass(frozen=True)
class Metadata:
    """A folder's metadata: the row of each file that is named, by its path below the folder, with where it stands."""

    rows: dict[str, tuple[str, dict]]
    files: list[Path]


def read_descriptions(
    folder: Path, paths: Sequence[Path], columns: Columns, metadata: Metadata | None = None
) -> tuple[list[Description], list[Path]]:
    """The description of each of ``paths`` by a folder's metadata and caption files, and the caption files that were read.

    Raises:
        ImagesMissing: metadata or a caption that is damaged or in another encoding, metadata that names a file that isn't
            there, lacks a column, or has a wrong value.
    """
    rows = (metadata or read_metadata(folder, paths, columns)).rows
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
    entries, read = [], list[Path]()
    for path in paths:
        entry = described.get(path.relative_to(folder).as_posix(), Description())
        if not entry.captions and (file := sidecar(path)) is not None:
            text = _text(file, columns).strip()
            entry = replace(entry, captions=(text,) if text else ())
            read.append(file)
        entries.append(entry)
    if rows and columns.captions_needed and columns.caption not in known and not any(entry.captions for entry in entries):
        raise not_one_of("caption_column", columns.caption, known, folder)
    return entries, read


def sidecar(path: Path) -> Path | None:
    """The file beside a picture that has its caption; None where there is none."""
    return next((text for ending in CAPTION_ENDINGS if (text := path.with_suffix(ending)).is_file()), None)


def read_metadata(root: Path, paths: Iterable[Path], columns: Columns) -> Metadata:
    """The metadata of a folder and of those below it in which ``paths`` lie; of several rows that of the nearest folder.

    Raises:
        ImagesMissing: damaged, two kinds in one folder, or a row of a file that isn't below its folder.
    """
    folders = {root} | {f for path in paths for f in path.parents if root in f.parents}
    rows, files = {}, []
    for folder in sorted(folders, key=lambda f: (len(f.parts), f)):
        inside = folder.relative_to(root)
        own, read = _rows_in(folder, columns)
        rows |= {(inside / name).as_posix(): row for name, row in own.items()}
        files += read
    return Metadata(rows, files)


def _rows_in(folder: Path, columns: Columns) -> tuple[dict[str, tuple[str, dict]], list[Path]]:
    """One folder's own metadata."""
    files = [path for name in METADATA if (path := folder / name).is_file()]
    if len(files) > 1:
        raise ImagesMissing(f"{str(folder)!r} holds {' and '.join(f.name for f in files)}; keep one of them")
    found: dict[str, list[tuple[str, dict]]] = {}
    for path in files:
        rows = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix](path, columns)
        for location, row in rows:
            found.setdefault(_place(row["file_name"], folder, location), []).append((location, row))
    return {name: _joined(some, columns) for name, some in found.items()}, files


def _place(name: str, folder: Path, location: str) -> str:
    """The path below ``folder`` that a row means. Raises ImagesMissing where it isn't there, or leads elsewhere."""
    if not name.strip() or "\0" in name or not (folder / name).is_file():
        raise ImagesMissing(f"{location}: {name!r} is not in the folder")
    path, root = Path(os.path.normpath(folder / name)), Path(os.path.normpath(folder))
    if not path.is_relative_to(root):  # perhaps only spelled in another way
        path, root = path.parent.resolve() / path.name, root.resolve()
    if not path.is_relative_to(root):
        raise ImagesMissing(f"{location}: {name!r} is outside of the folder {str(folder)!r}")
    return path.relative_to(root).as_posix()


def _joined(rows: list[tuple[str, dict]], columns: Columns) -> tuple[str, dict]:
    """The rows of one file as one, with all their captions. Raises ImagesMissing where they disagree on its noise level."""
    location, first = rows[0]
    if len(rows) == 1:
        return location, first
    captions: list[str] = []
    for place, row in rows:
        captions += [c for c in captions_of(row.get(columns.caption), columns.caption, place) if c not in captions]
        if columns.t_n is not None and (level := row.get(columns.t_n)) != (other := first.get(columns.t_n)):
            raise ImagesMissing(
                f"{place}: --t_n_column: {columns.t_n!r} is {reprlib.repr(level)}, and {reprlib.repr(other)} in {location}, "
                "for the same file"
            )
    joined = {name: value for _, row in reversed(rows) for name, value in row.items()}
    return location, {**joined, columns.caption: captions} if columns.caption in joined else joined


def _text(path: Path, columns: Columns) -> str:
    try:
        return read_text(path, columns.encoding)
    except TextError as error:
        raise ImagesMissing(str(error)) from None


def _json_rows(path: Path, columns: Columns) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_text(path, columns).split("\n"), 1):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        try:
            # NaN is how tables spell that nothing is said.
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ImagesMissing(f"{location}: not a JSON object with a 'file_name'")
        yield location, row


def _csv_rows(path: Path, columns: Columns) -> Iterator[tuple[str, dict]]:
    reader = csv.reader(io.StringIO(_text(path, columns), newline=""), strict=True, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "file_name" not in header or len(set(header)) < len(header):
            raise ImagesMissing(f"{path}: its first line names no 'file_name', or a column twice: {', '.join(header)}")
        for fields in reader:
            location = f"{path}, line {reader.line_num}"
            if not fields:
                continue
            row = dict(zip(header, fields, strict=False))
            if len(fields) > len(header) or not row.get("file_name"):
                raise ImagesMissing(f"{location}: not a row with a 'file_name' and one field for each column")
            yield location, {name: row.get(name) for name in header} | {"file_name": row["file_name"].strip()}
    except csv.Error as error:
        raise ImagesMissing(f"{path}, line {reader.line_num}: {error}") from None


def _parquet_rows(path: Path, columns: Columns) -> Iterator[tuple[str, dict]]:
    wanted = {"file_name", columns.caption, columns.t_n, "original_size", "crop_top_left"}
    try:
        with pq.ParquetFile(path) as file:
            known = file.schema_arrow.names
            rows = file.read([name for name in known if name in wanted]).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ImagesMissing(f"{path} can't be read: {one_line(error)}") from None
    for number, row in enumerate(rows):
        if not isinstance(row.get("file_name"), str):
            raise ImagesMissing(f"{path}, row {number}: it has no 'file_name'")
        # The names of the others are known, their values are never looked at.
        yield f"{path}, row {number}", dict.fromkeys(known) | row
