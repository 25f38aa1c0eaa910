"""What becomes of the flags of other trainers: the table of docs/MIGRATING.md, which a test compares with it."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.provenance import read_json

SCRIPTS = {
    "train_text_to_image_lora_sdxl.py": ("diffusers", "L"),
    "train_dreambooth_lora_sdxl.py": ("diffusers", "D"),
    "train_text_to_image_sdxl.py": ("diffusers", "F"),
    "sdxl_train_network.py": ("kohya", "N"),
    "sdxl_train.py": ("kohya", "F"),
}


@dataclass(frozen=True)
class Flag:
    """A flag of another trainer. ``here``: our option, None where there is none. ``note``: what to know, or why not."""

    name: str
    peer: str  # diffusers or kohya
    scripts: str
    here: str | None
    note: str


@functools.cache
def table() -> tuple[Flag, ...]:
    """Every flag of the peers' scripts, diffusers' first."""
    rows = read_json(Path(__file__).with_name("migration.json"))
    return tuple(Flag(*row) for row in rows)


def find(name: str, peer: str | None = None) -> Flag | None:
    """The row of a flag, by its name without dashes; kohya's dashes are underscores here."""
    rows = [one for one in table() if one.name == name.replace("-", "_") and peer in (None, one.peer)]
    return next((one for one in rows if one.here is not None), rows[0] if rows else None)


def answer(name: str, known: Collection[str]) -> str | None:
    """What to say of an option that isn't there but is one of another trainer's; None where it is none."""
    flag = find(name)
    if flag is None or flag.name in known:
        return None
    note = f" ({plain(flag.note)})" if flag.note else ""
    if flag.here is None:
        return f"{name!r}, which {flag.peer} has, is not here: {plain(flag.note)}"
    return f"{name!r} of {flag.peer} is {flag.here!r} here{note}" if flag.here in known else None


def plain(note: str) -> str:
    """A note of the table without its marks."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", note).replace("`", "")
