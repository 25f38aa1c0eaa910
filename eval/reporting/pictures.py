"""Which pictures the page embeds, and what stands in place of the others: ``--pictures``.

``all``        generated and training pictures.
``generated``  generated ones alone. One that is a training or held-out picture is held back like those.
``none``       no picture, and no name or caption of one: files are named by the start of their SHA-256.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypedDict

from eval.images import data_uri
from eval.schema import ImageRow, Report
from sdxl_ambient.provenance import hash_file

MOST_PICTURES = 1200  # on a page, so that its size is bounded
LARGE, SMALL = 192, 96  # pixels on the longer side: in pairs, in tables
SAME = 0.999999  # similarity from which a generated picture counts as a real one; the report has six digits
HASH_DIGITS = 16


class Choice(NamedTuple):
    """What is embedded (all, generated, none), and why."""

    shown: str
    reason: str

    @property
    def sentence(self) -> str:
        """For the page, and for the last lines of a command."""
        what = {"all": "generated and training ones", "generated": "generated ones alone", "none": "none, hashes instead"}
        return f"Pictures on the page: {what[self.shown]} ({self.reason})."


class Picture(TypedDict):
    """A ``data:`` address, or None and the words that stand in its place."""

    uri: str | None
    words: str


def choose(pictures: str, max_excess: float | None) -> Choice:
    """What ``--pictures`` amounts to beside a budget: ``auto`` is all without one, and none with one."""
    if pictures != "auto":
        return Choice(pictures, f"--pictures {pictures}")
    if max_excess is None:
        return Choice("all", "the default without a budget")
    return Choice("none", "the default with a budget, --max_excess: nothing embeds clean pictures unless it is told to")


class Shown:
    """The pictures and names of one page.

    Args:
        root: the folder that relative folders in the report start from.
        choice: what may be embedded.
    """

    def __init__(self, report: Report, root: str | Path, choice: Choice):
        self.report, self.root, self.choice = report, Path(root), choice
        self.embedded = self.left_out = self.held_back = 0
        self._made: dict[tuple[Path, int], str | None] = {}
        self._hashes: dict[Path, str | None] = {}
        self._real: dict[int, list[Path]] | None = None

    # -- pictures --------------------------------------------------------------------

    def train(self, file: str, size: int = LARGE) -> Picture:
        """A training picture."""
        path = self._path(self.report["data"]["train"]["folder"], file)
        if self.choice.shown == "all":
            return self._picture(path, size)
        return {"uri": None, "words": "(not shown)" if self.choice.shown == "generated" else self._hash(path)}

    def generated(self, folder: str, file: str, row: ImageRow | None, size: int = LARGE) -> Picture:
        """A generated picture. ``row``: the report's of it; None stands for a copy that was found without a threshold."""
        path = self._path(folder, file)
        if self.choice.shown == "none":
            return {"uri": None, "words": self._hash(path)}
        if self.choice.shown == "generated" and (row is None or _as_real(row) or self._is_real(path)):
            self.held_back += 1
            return {"uri": None, "words": "(held back: it is a training or held-out picture, or nearly)"}
        return self._picture(path, size)

    def _picture(self, path: Path, size: int) -> Picture:
        if (path, size) not in self._made:
            self._made[path, size] = data_uri(path, size)
        uri = self._made[path, size]
        if uri is None:
            return {"uri": None, "words": "(file not found)"}
        if self.embedded >= MOST_PICTURES:
            self.left_out += 1
            return {"uri": None, "words": "(left out: the page is full)"}
        self.embedded += 1
        return {"uri": uri, "words": ""}

    def _is_real(self, path: Path) -> bool:
        """Whether a file has the bytes of one in the training or held-out folder."""
        if self._real is None:
            self._real, data = {}, self.report["data"]
            for figures in filter(None, (data["train"], data["heldout"])):
                for file in self._path(figures["folder"], "").rglob("*"):
                    if file.is_file():
                        self._real.setdefault(file.stat().st_size, []).append(file)
        if not path.is_file():
            return False
        return any(self._hash(other) == self._hash(path) for other in self._real.get(path.stat().st_size, []))

    def _path(self, folder: str, file: str) -> Path:
        inside = self.root / folder / file
        return inside if inside.exists() else Path(folder) / file

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = hash_file(path) if path.is_file() else None
        digest = self._hashes[path]
        return f"SHA-256 {digest[:HASH_DIGITS]}…" if digest else "(file not found)"

    # -- names -----------------------------------------------------------------------

    @property
    def names(self) -> bool:
        """Whether the page names files and captions."""
        return self.choice.shown != "none"

    def train_name(self, file: str) -> str:
        """A training picture's name, or its hash."""
        return file if self.names else self._hash(self._path(self.report["data"]["train"]["folder"], file))

    def generated_name(self, folder: str, file: str) -> str:
        """A generated picture's name, or its hash."""
        return file if self.names else self._hash(self._path(folder, file))

    def caption(self, text: str | None) -> str | None:
        """A caption or prompt, or nothing."""
        return text if self.names else None

    def found(self, text: str | None) -> str | None:
        """What a row says of a copy that was found: its kind, and its training picture where that may be named."""
        return text if self.names or text is None else text.partition(":")[0]


def _as_real(row: ImageRow) -> bool:
    nearest = max(row["similarity_to_train"], row["similarity_to_heldout"] or 0.0)
    return row["found"] is not None or nearest >= SAME
