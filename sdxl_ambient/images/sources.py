"""Where pictures come from: a folder of images, a folder of parquet or webdataset files, or a data set of the Hub.

The ``datasets`` library copies what it loads into Arrow files. Here these clean copies lie in a private folder that is
deleted as soon as every process of the machine has mapped them into memory; on Linux the mapping outlives the files' names.
Pictures are never decoded by it: :func:`sdxl_ambient.images.load.load_rgb` gets their bytes.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import gather_object

from sdxl_ambient.errors import ImageError, ImagesMissing, one_line
from sdxl_ambient.images.captions import METADATA, Columns, captions_of, level_of, not_one_of
from sdxl_ambient.images.folder import Ledger, Unread, shown, walk
from sdxl_ambient.images.load import Listing, Record, list_images

Log = Callable[[str], None]
# Kinds of files that hold many pictures: ending → the module of ``datasets`` that reads them.
KINDS = {".parquet": "parquet", ".tar": "webdataset"}
TRAIN = "train"  # the split that is read by default
# Where webdataset's customary names stand for the defaults.
_CUSTOMARY = {"text": ("txt", "json.text", "json.caption")}


@dataclass(frozen=True)
class HubDataset:
    """A data set that the ``datasets`` library loads: its name or path, its configuration, and the split that is read."""

    name: str
    config_name: str | None = None
    split: str = TRAIN


def open_records(
    source: str | Path | HubDataset,
    columns: Columns | None = None,
    *,
    split: str = TRAIN,
    state: PartialState | None = None,
    log: Log = print,
) -> Listing:
    """Every picture of a folder or of a data set, in an order that is the same in every process. All processes call it.

    Args:
        split: of a folder of parquet or webdataset files, the one that is read.

    Raises:
        ImagesMissing: nothing there, a package, data set, split or column that is missing, or wrong values in a column.
    """
    state, columns = state or PartialState(), columns or Columns()
    if isinstance(source, HubDataset):
        location = f"{source.name}, split {source.split}"
        load = partial(_load, "dataset_name", source.name, source.name, name=source.config_name, split=source.split)
        records = _records(_in_private(load, state), location, columns, log)
        return Listing(records, Ledger(0, 0))
    walked = walk(source)
    packed = _packed(Path(source), split, *walked)
    if packed is None:
        return list_images(source, columns, walked)
    files, ledger = packed
    kind = KINDS[files[0].suffix.lower()]
    # Names are patterns to the library.
    names = [glob.escape(str(path.resolve())) for path in files]
    load = partial(_load, "train_data_dir", str(source), kind, data_files=names, split=TRAIN)
    return Listing(_records(_in_private(load, state), str(source), columns, log), ledger)


# -- a folder's files ----------------------------------------------------------------------


def _packed(folder: Path, split: str, files: list[Path], unread: list[Unread]) -> tuple[list[Path], Ledger] | None:
    """The parquet or webdataset files of one split in a folder, and what became of the others; None for a folder of images.

    Raises:
        ImagesMissing: two kinds of them, or no such split.
    """
    packed = [p for p in files if p.suffix.lower() in KINDS and _holds_pictures(p)]
    if not packed:
        if split != TRAIN:
            raise ImagesMissing(f"--dataset_split: {split!r} needs a data set, and {str(folder)!r} is a folder of images")
        return None
    kinds = sorted({p.suffix.lower() for p in packed})
    if len(kinds) > 1:
        raise ImagesMissing(f"--train_data_dir: {str(folder)!r} holds {' and '.join(kinds)} files; allowed is one kind")
    splits = _splits(folder, packed)
    if split == TRAIN and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise ImagesMissing(f"--dataset_split: {split!r} is not one of: {', '.join(splits)} ({str(folder)!r})")
    wanted = splits[split]
    others = {path: f"of the split {name}" for name, some in splits.items() for path in some if path not in wanted}
    beside = f"beside the {kinds[0]} files of a data set, which are read in its place"
    unread = [*unread, *(Unread(shown(p, folder), others.get(p, beside)) for p in files if p not in wanted)]
    count = len(wanted) + sum(one.files for one in unread)
    return wanted, Ledger(count, 0, len(wanted), tuple(sorted(unread, key=lambda one: one.name)))


def _holds_pictures(path: Path) -> bool:
    """Whether a file can hold pictures: a webdataset, or a table with a column of bytes that is not a folder's metadata."""
    if path.name in METADATA:
        return False
    if path.suffix.lower() != ".parquet":
        return True
    try:
        schema = pq.read_schema(path)
    except (pyarrow.ArrowException, OSError):
        return True  # told when it is loaded
    types = [kind for field in schema for kind in (field.type, *_inner(field.type))]
    return any(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) for kind in types)


def _inner(kind: pyarrow.DataType) -> list[pyarrow.DataType]:
    return [kind.field(i).type for i in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []


def _splits(folder: Path, packed: list[Path]) -> dict[str, list[Path]]:
    """The files of each split, by the names that the ``datasets`` library goes by; all of them train where it sees none."""
    try:
        from datasets.data_files import get_data_patterns, resolve_pattern
    except ImportError:
        return {TRAIN: packed}  # told when they are loaded
    base = glob.escape(str(folder.resolve()))
    split_of: dict[Path, str] = {}
    for split, patterns in get_data_patterns(base).items():
        for pattern in patterns:
            with suppress(FileNotFoundError):  # not every pattern of a split has files
                for path in resolve_pattern(pattern, base):
                    split_of.setdefault(Path(path), str(split))
    found: dict[str, list[Path]] = {}
    for path in packed:
        if (split := split_of.get(path.resolve())) is not None:
            found.setdefault(split, []).append(path)
    return found or {TRAIN: packed}


# -- loading ----------------------------------------------------------------------


def _load(option: str, value: str, path: str, *, cache_dir: str, **keywords: Any):
    """``datasets.load_dataset`` with every failure turned into a one-line ImagesMissing that names the option."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImagesMissing(
            f"--{option}: needs the package datasets, which is not installed (pip install datasets)"
        ) from None
    try:
        return load_dataset(path, cache_dir=cache_dir, keep_in_memory=False, **keywords)
    except Exception as error:  # scripts, networks, file formats: whatever they raise
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        raise ImagesMissing(f"--{option}: {value!r} can't be loaded: {reason}") from None


def _in_private(load: Callable, state: PartialState):
    """``load(cache_dir=…)`` in a folder of mode 700 that is gone afterwards: prepared by one process of each machine, mapped
    by all of them. An error in one of them is raised in all, as none may wait for another for ever."""
    own = tempfile.mkdtemp(prefix="sdxl_ambient-") if state.is_local_main_process else None
    try:
        folder = _gather(own, state)[state.process_index - state.local_process_index]
        data = error = None
        for turn in (True, False):
            if state.is_local_main_process == turn:
                try:
                    data = load(cache_dir=folder)
                except ImagesMissing as failure:
                    error = str(failure)
            failed = [e for e in _gather(error, state) if e is not None]
            if failed:
                raise ImagesMissing(failed[0])
        return data
    finally:
        if own is not None:
            shutil.rmtree(own)


def _gather(value: Any, state: PartialState) -> list:
    return gather_object([value]) if state.num_processes > 1 else [value]


# -- rows => records ----------------------------------------------------------------------


def _records(data, location: str, columns: Columns, log: Log) -> list[Record]:
    """One record per row of a :class:`datasets.Dataset`."""
    from datasets import Image

    if not len(data):
        raise ImagesMissing(f"{location} holds no rows")
    column = _image_column(data, columns.image, location, log)
    images = data.select_columns([column]).cast_column(column, Image(decode=False))
    captions = _values(data, "caption_column", columns.caption, location, columns.captions_needed, log)
    levels = None if columns.t_n is None else _values(data, "t_n_column", columns.t_n, location, True, log)
    records = []
    for i, name in enumerate(_names(data, images, column)):
        row = f"{location}, row {i}"
        texts = captions_of(captions[i], columns.caption, row)
        level = None if levels is None or columns.t_n is None else level_of(levels[i], columns.t_n, row)
        records.append(Record(name, partial(_read, images, column, i), texts, level))
    return records


def _read(images, column: str, index: int) -> Path | bytes:
    """A row's picture as the data set holds it."""
    value = images[index][column] or {}
    if value.get("bytes") is not None:
        return value["bytes"]
    if not value.get("path"):
        raise ImageError("the row holds no picture")
    return Path(value["path"])


def _names(data, images, column: str) -> list[str]:
    """``row 3``, with the key or file name that it has in the data set."""
    if "__key__" in data.column_names:
        paths = data["__key__"][:]
    else:
        # Beside the bytes, which are not read here.
        pictures: pyarrow.ChunkedArray = images.data.column(column)
        paths = pictures.flatten()[pictures.type.get_field_index("path")].to_pylist()
    return [f"row {i}" + (f" ({Path(path).name})" if path else "") for i, path in enumerate(paths)]


def _image_like(feature) -> bool:
    from datasets import Image, Value

    holds_bytes = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or holds_bytes or (isinstance(feature, Value) and "binary" in feature.dtype)


def _image_column(data, name: str, location: str, log: Log) -> str:
    pictures = [column for column, feature in data.features.items() if _image_like(feature)]
    if name in pictures:
        return name
    if name in data.features:
        raise ImagesMissing(
            f"--image_column: {name!r} holds no pictures; allowed: {', '.join(pictures) or 'none'} ({location})"
        )
    if name == "image" and len(pictures) == 1:
        log(f"note: the pictures are taken from the column {pictures[0]!r} (--image_column)")
        return pictures[0]
    raise not_one_of("image_column", name, data.column_names, location)


def _values(data, option: str, name: str, location: str, needed: bool, log: Log) -> list:
    """A column's values; one of ``json``, as webdataset has it, is called ``json.NAME``."""
    inner = data.features.get("json")
    known = [*data.column_names, *(f"json.{key}" for key in inner)] if isinstance(inner, dict) else data.column_names
    present = next((n for n in (name, f"json.{name}", *_CUSTOMARY.get(name, ())) if n in known), None)
    if present is None and needed:
        raise not_one_of(option, name, known, location)
    if present is None:
        return [None] * len(data)
    if present != name:
        log(f"note: --{option}: {name!r} is not there, {present!r} is taken")
    try:
        return _column(data, present)
    except ValueError as error:  # bytes that are not UTF-8
        raise ImagesMissing(f"--{option}: {present!r} can't be read ({location}): {one_line(error)}") from None


def _column(data, present: str) -> list:
    if present == "txt":
        return [text.strip() if isinstance(text, str) else text for text in data[present][:]]  # as .txt files are read
    if present in data.column_names:
        return data[present][:]
    return [(row or {}).get(present.removeprefix("json.")) for row in data["json"][:]]
