"""Every file below a folder: which are looked at, and which are not, with the reason. Nothing is passed over without a word.

Hidden and system folders hold what a program keeps for itself: deleted pictures, thumbnails, copies of other names. Folders
behind links may lie anywhere, and lead in circles. None of them is read, and all are counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_ambient.errors import ImagesMissing
from sdxl_ambient.provenance import is_utf8

# In small letters. Of macOS archives, Synology, QNAP and Windows, and what a check of a file system found.
SYSTEM_FOLDERS = frozenset(
    {
        *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "recycler"),
        *("system volume information", "lost+found"),
    }
)
SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"})
MOST_NAMED = 3  # files that a message names for each reason
MOST_LISTED = 1000  # entries that a manifest or report lists


# Subfolders of these names are splits to the ``datasets`` library, whose imagefolder reads one of them.
_SPLITS = frozenset(
    ("train", "training", "test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev", "heldout")
)


def split_folders(folder: Path, pictures: Iterable[Path]) -> dict[str, int]:
    """How many pictures lie in each subfolder that is called like a split; {} where fewer than two are."""
    tops = Counter(path.relative_to(folder).parts[0] for path in pictures if path.parent != folder)
    found = {name: count for name, count in sorted(tops.items(), reverse=True) if name.lower() in _SPLITS}
    return found if len(found) > 1 else {}


@dataclass(frozen=True)
class Unread:
    """A file that isn't read, or a folder with ``files`` of them, by its path below the folder that was given."""

    name: str
    reason: str
    files: int = 1


@dataclass(frozen=True)
class Ledger:
    """What became of the files below a folder: ``files`` = ``pictures`` + ``texts`` + those of ``unread``.

    Args:
        pictures: files that are taken for pictures; some of them may turn out to be unusable later.
        texts: files that were read and are no pictures: metadata, captions, and the files of a data set.
        splits: how many pictures lie in subfolders that are called like splits (train, test, …), where several are; all of
            them are read.
    """

    files: int
    pictures: int
    texts: int = 0
    unread: tuple[Unread, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)

    @property
    def not_read(self) -> int:
        return sum(one.files for one in self.unread)

    def reasons(self) -> dict[str, list[Unread]]:
        """What wasn't read, by its reason, the most frequent first."""
        found: dict[str, list[Unread]] = {}
        for one in self.unread:
            found.setdefault(one.reason, []).append(one)
        return dict(sorted(found.items(), key=lambda item: -sum(one.files for one in item[1])))

    def lines(self, folder: str | Path) -> list[str]:
        """As a run tells it in its first lines."""
        texts = f", {self.texts} texts about them" if self.texts else ""
        lines = [f"{folder}: {self.files} files: {self.pictures} images{texts}, {self.not_read} not read"]
        for reason, some in self.reasons().items():
            named = ", ".join(one.name for one in some[:MOST_NAMED]) + (", …" if len(some) > MOST_NAMED else "")
            lines.append(f"  {sum(one.files for one in some)} not read: {reason} ({named})")
        if self.splits:
            named = ", ".join(f"{count} in {name}/" for name, count in self.splits.items())
            one = str(Path(folder) / next(iter(self.splits)))
            lines.append(f"warning: subfolders are called like splits ({named}), and all are read; give {one!r} to read one")
        return lines

    def record(self, used: int, left_out: int) -> dict[str, Any]:
        """As a manifest or report keeps it, when so many of the pictures were used and could not be used."""
        return {
            "files": self.files,
            "used": used,
            "left_out": left_out,
            "texts": self.texts,
            "not_read": self.not_read,
            "reasons": {reason: sum(one.files for one in some) for reason, some in self.reasons().items()},
            "unread": [{"file": one.name, "reason": one.reason, "files": one.files} for one in self.unread[:MOST_LISTED]],
        }


def ledger_line(record: Mapping[str, Any]) -> str:
    """The sums of a recorded ledger (:meth:`Ledger.record`) in one line."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in record["reasons"].items())
    return (
        f"Files: {record['files']}: {record['used']} images used, {record['left_out']} left out, {record['texts']} texts "
        f"about them, {record['not_read']} not read{f' ({reasons})' if reasons else ''}"
    )


def is_hidden(name: str) -> str | None:
    """Why a file or folder of this name isn't read; None where nothing speaks against it."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in SYSTEM_FOLDERS or name.lower() in SYSTEM_FILES:
        return "kept by a system for itself"
    return None


def walk(folder: str | Path) -> tuple[list[Path], list[Unread]]:
    """The files below a folder that may be looked at, in the order of their relative paths, and all others with the reason.

    Raises:
        ImagesMissing: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImagesMissing(f"{str(folder)!r} is not a folder")
    files, unread, todo = list[Path](), list[Unread](), [folder]
    while todo:
        try:
            entries = list(os.scandir(todo.pop()))
        except OSError as error:
            place = Path(error.filename)
            unread.append(Unread(shown(place, folder) + "/", f"the folder can't be listed: {error.strerror}"))
            continue
        for entry in entries:
            path = Path(entry.path)
            if (reason := _reason(entry)) is not None:
                count = _count(path) if entry.is_dir(follow_symlinks=False) else 1
                if count:
                    name = shown(path, folder) + ("/" if path.is_dir() else "")
                    unread.append(Unread(name, reason, count))
            elif entry.is_dir():
                todo.append(path)
            else:
                files.append(path)
    return sorted(files, key=lambda p: p.relative_to(folder).as_posix()), sorted(unread, key=lambda one: one.name)


def shown(path: Path, folder: Path) -> str:
    """A path below a folder, as a message or report can hold it: bytes that are not UTF-8 are escaped."""
    name = path.relative_to(folder).as_posix()
    return name if is_utf8(name) else os.fsencode(name).decode("utf-8", "backslashreplace")


def refuse_unnamed(files: Iterable[Path], folder: Path) -> None:
    """Raises ImagesMissing where names are not UTF-8, which no record or report could name."""
    if unnamed := [name for p in files if not is_utf8(name := p.relative_to(folder).as_posix())]:
        count = "1 file's name is" if len(unnamed) == 1 else f"{len(unnamed)} files' names are"
        raise ImagesMissing(
            f"{str(folder)!r}: {count} not UTF-8, such as {os.fsencode(unnamed[0])!r}; rename or remove what is named so"
        )


def list_files(folder: str | Path, suffixes: Iterable[str]) -> tuple[list[Path], list[Unread]]:
    """The files below a folder with one of these endings, and all others with the reason.

    Raises:
        ImagesMissing: no such folder, or files whose names are not UTF-8.
    """
    folder, endings = Path(folder), frozenset(suffixes)
    files, unread = walk(folder)
    wanted = [path for path in files if path.suffix.lower() in endings]
    refuse_unnamed(wanted, folder)
    others = [Unread(shown(path, folder), ending(path)) for path in files if path.suffix.lower() not in endings]
    return wanted, [*unread, *others]


def ending(path: Path) -> str:
    """The reason that a file isn't read for what it is."""
    return f"its kind is not one that is read: {path.suffix.lower() or 'no ending'}"


def inside(folder: str | Path, other: str | Path) -> bool:
    """Whether a folder, which need not be there, is another one or lies in it."""
    return Path(folder).resolve().is_relative_to(Path(other).resolve())


def _reason(entry: os.DirEntry) -> str | None:
    if (reason := is_hidden(entry.name)) is not None:
        return reason
    if entry.is_symlink():
        if not os.path.exists(entry.path):
            return "a link to nothing"
        if entry.is_dir():
            return "a folder behind a link: give that folder itself, or copy it"
    return None if entry.is_dir() or entry.is_file() else "no regular file"


def _count(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))
